"""Texts from outside never order a terminal about: no control character and no markup of theirs gets there."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done
from hypothesis import given
from hypothesis import strategies as st
from mutations import changed
from rich.console import RenderableType

from ttcompress import terminal
from ttcompress.errors import CheckpointError
from ttcompress.files.header import read_metadata
from ttcompress.records.common import printable
from ttcompress.records.report import Report
from ttcompress.report.text import as_text, render, render_bench, render_side_by_side

Run = Callable[..., Done]
OLDER = Path(__file__).parent / "records" / "older"
FILE: dict[str, Any] = read_metadata(OLDER / "trained.safetensors")
HOSTILE = [
    "\x1b[31mred", "\x1b]0;title\x07", "a\rb", "a\nall parameters    9 -> 1", "\x9b31m", "\u202etxt.exe", "\u2028",
    "\x7f\x08",
    "[/red]", "[bold]", "[link=http://x]", "[", "[/]", ":smile:",
]  # fmt: skip


def is_clean(text: str) -> bool:
    return all(each == "\n" or unicodedata.category(each)[0] not in "CZ" or each == " " for each in text)


@given(st.text())
def test_what_is_printable_has_one_line_and_no_controls(text: str) -> None:
    shown = printable(text)
    assert is_clean(shown)
    assert "\n" not in shown
    assert shown == text or not text.isprintable()


def texts(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all texts in a document."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from texts(inner, (*place, key))
        elif isinstance(inner, str):
            yield (*place, key)


def hostile_reports() -> Iterator[tuple[str, Report]]:
    """The report of a file with each of its texts replaced, where that may be any text."""
    for number, place in enumerate(texts(FILE)):
        for words in (HOSTILE[number % len(HOSTILE)], HOSTILE[-1 - number % len(HOSTILE)]):
            with suppress(CheckpointError):
                report = Report.from_json(changed(FILE, place, words))
                yield words, replace(report, file=words, file_bytes=1)


def test_no_text_of_a_file_reaches_the_terminal_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """As a table, beside another, as the benchmark and as Python prints it; markup is text like any other."""
    seen = []
    for words, report in hostile_reports():
        shown: list[RenderableType] = [render(report), render_side_by_side([report, report])]
        shown += [render_bench(report.bench)] if report.bench else []
        for each in shown:
            terminal.print_table(each)
        out = capsys.readouterr().out + as_text(report)
        assert is_clean(out)
        if printable(words) in out:
            seen.append(words)
    assert len(seen) > 40
    assert set(seen) == set(HOSTILE)


@pytest.mark.parametrize("words", HOSTILE)
def test_errors_are_one_clean_line(words: str, run: Run, tmp_path: Path) -> None:
    name = words.replace("/", "%")
    (tmp_path / f"{name}.toml").write_text(f"{json.dumps(words)} = 1")
    torch.save({words: torch.zeros(3, 3), "x": 3}, tmp_path / f"{name}.pt")
    for arguments in (
        ("report", f"{name}.safetensors"),
        ("compress", f"{name}.pt", "--ranks", "2"),
        ("compress", "x.pt", "--recipe", f"{name}.toml"),
        ("compress", "x.pt", "--arch", words),
        ("evaluate", "x.pt", "--data", f"npz:{name}"),
        (words,),
        ("report", f"--{name}"),
    ):
        done = run(*arguments)
        assert (arguments, done.code, done.out) == (arguments, 2, "")
        assert is_clean(done.err)
        assert done.err.count("\n") == 1


def test_names_of_a_checkpoint_in_a_report(run: Run, tmp_path: Path) -> None:
    """What compress and expand print of names that a checkpoint brought."""
    for number, words in enumerate(HOSTILE):
        torch.save(
            {f"{words}.weight": torch.randn(32, 32), "a.weight": torch.randn(32, 32)}, tmp_path / "c.pt"
        )
        output = f"{number}.safetensors"
        done = run("compress", "c.pt", "--arch", "none", "--ranks", "2", "-o", output)
        assert is_clean(done.out + done.err)
        if done.code == 0:
            for arguments in (
                ("report", output),
                ("report", output, output),
                ("expand", output, "-o", f"{number}.pt"),
            ):
                done = run(*arguments)
                assert (done.code, done.err) == (0, "")
                assert is_clean(done.out)


def test_json_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    value = {words: words for words in HOSTILE}
    terminal.print_json(value)
    out = capsys.readouterr().out
    assert is_clean(out)
    assert json.loads(out) == value
