"""What a person sees beside results: lines of a log, a line of blocks."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from ttcompress import terminal
from ttcompress.report.text import Blocks


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    monkeypatch.setattr(terminal, "LOGGED_SECONDS", 2.0)
    return clock


def test_a_log_has_a_line_for_each_stage_that_took_a_while(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with terminal.working() as progress:
        assert progress is not None
        for what, seconds in (
            ("statistics", 3), ("statistics", 2.2), ("spectra of a.conv1", 0.1), ("spectra of a.conv2", 0.3),
            ("fitting a.conv1", 1), ("fitting a.conv2", 8.4), ("evaluating", 1.9),
        ):  # fmt: skip
            progress(what, 1, 2)
            clock.now += seconds
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["ttcompress: statistics, 5 s", "ttcompress: fitting, 9 s"]


def test_epochs_have_lines_of_their_own(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.working() as progress:
        assert progress is not None
        for epoch in range(5):
            progress(f"{epoch} loss 0.123 91.0 % 1,000/s", epoch, 5)
            clock.now += 60
    assert capsys.readouterr().err == ""


def test_processes_that_do_not_lead_say_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.working(shown=False) as progress:
        assert progress is None
        clock.now += 60
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_meanwhile_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.working():
        print("from a user's network")
    assert capsys.readouterr() == ("", "from a user's network\n")


def shown(blocks: Blocks, width: int, is_terminal: bool, encoding: str = "utf-8") -> str:
    class Output(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    console = Console(file=Output(), width=width, force_terminal=is_terminal, color_system=None)
    console.print(blocks)
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def test_blocks_are_as_high_as_the_shares() -> None:
    assert Blocks([0, 1, 8, 4, 2]).line == "▁▁█▄▂"
    assert Blocks([5, 5]).line == "██"
    rising = Blocks(range(1, 50)).line
    assert list(rising) == sorted(rising)
    assert set(rising) == set("▁▂▃▄▅▆▇█")


def test_blocks_are_for_terminals_with_room() -> None:
    blocks = Blocks([1, 2, 3])
    assert blocks.line in shown(blocks, 80, is_terminal=True)
    assert shown(blocks, 80, is_terminal=False).strip() == ""
    assert shown(blocks, 20, is_terminal=True).strip() == ""
    assert shown(blocks, 80, is_terminal=True, encoding="ascii").strip() == ""
