"""What the documents say: README blocks run, their output has the shown form, every option is documented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from command_line import run_command

from ttcompress.cli import commands

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _console() -> Iterator[tuple[str, str]]:
    """Each `$ command` of the README's console blocks, in order, with the output shown under it."""
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def _form(text: str) -> list[str]:
    """Output without its numbers and column widths: these may differ in the last digit from machine to machine.

    An interval of few images may begin below 0 where that of all does not.
    """
    lines = text.strip().splitlines()
    return [
        " ".join(
            line.split()
            if line == "..."
            else re.sub(r"[\d,.]+", "#", line.replace("interval -", "interval ")).split()
        )
        for line in lines
    ]


def _shows(shown: list[str], printed: list[str]) -> bool:
    """Whether what is shown is what was printed, with any lines in the places of `...`."""
    if not shown or shown[0] != "...":
        return (
            bool(shown and printed and shown[0] == printed[0] and _shows(shown[1:], printed[1:]))
            or shown == printed
        )
    return any(_shows(shown[1:], printed[start:]) for start in range(len(printed) + 1))


@pytest.mark.slow
def test_readme_commands_print_what_it_shows(
    checkpoints: Path, cifar10_root: Path, small_cifar10_root: Path, tmp_path: Path
) -> None:
    """All images to calibrate on, since formats hang on them; 500 to measure on, for only the form is compared."""
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10-train.npz").symlink_to(cifar10_root / "cifar10-train.npz")
    (tmp_path / "cifar10" / "cifar10-test.npz").symlink_to(small_cifar10_root / "cifar10-test.npz")
    (tmp_path / "resnet20-12fca82f.th").symlink_to(checkpoints / "resnet20-12fca82f.th")
    ran = 0
    for command, shown in _console():
        name, *rest = shlex.split(command.replace("> ", ">"))
        arguments = [word for word in rest if not word.startswith(">")]
        assert name == "ttcompress"
        done = run_command(*arguments, cwd=tmp_path)
        assert (done.code, done.err) == (0, ""), command
        if arguments == rest:
            assert _shows(_form(shown), _form(done.out)), command
        ran += 1
    assert ran >= 5


def test_readme_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README", "exec"), names)
    assert isinstance(names["layer"], torch.nn.Module)
    assert (tmp_path / "net-tt.safetensors").stat().st_size < 784 * 512 * 4 / 3


def test_readme_is_short_and_names_the_exports() -> None:
    import ttcompress

    assert len(README.splitlines()) < 150
    assert all(f"`{name}`" in README for name in ttcompress.__all__)


def test_every_option_is_documented() -> None:
    documented = set(re.findall(r"`(-[\w-]+)", (ROOT / "docs" / "cli.md").read_text()))
    options = {
        name
        for command in [commands, *commands.commands.values()]
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    assert options - documented == set()
    assert documented - options - {"-h", "--help"} == set()


def test_format_page_is_enough_to_write_a_reader() -> None:
    """The NumPy reader of docs/format.md gives the weight that the layer computes with."""
    page = (ROOT / "docs" / "format.md").read_text()
    (code,) = re.findall(r"(    def dense_weight.*?)\n\n", page, re.DOTALL)
    names: dict[str, object] = {"np": np}
    exec(compile(re.sub("^    ", "", code, flags=re.MULTILINE), "format.md", "exec"), names)
    from ttcompress import TTConv2d

    conv = torch.nn.Conv2d(5, 7, (3, 2))
    for name in ("matrix", "naive", "chain", "lowrank"):
        layer = TTConv2d.from_dense(conv, name)
        cores = [core.detach().numpy().astype(np.float64) for core in layer.cores]
        rebuilt = names["dense_weight"](cores, (7, 5, 3, 2))  # type: ignore[operator]
        np.testing.assert_allclose(rebuilt, conv.weight.detach().numpy(), atol=1e-6)


def test_the_page_on_the_layout_names_rooms_that_there_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py|(?:\w+/)+)`", page))
    assert len(named) > 25
    missing = {
        each for each in named if not (ROOT / "ttcompress" / each).exists() and not (ROOT / each).exists()
    }
    assert missing == set()


def test_the_page_on_the_layout_names_every_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    packages = {path.parent.name for path in (ROOT / "ttcompress").glob("*/__init__.py")}
    modules = {path.name for path in (ROOT / "ttcompress").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert all(f"`{package}/`" in page for package in packages)
    assert all(f"`{module}`" in page for module in modules)


def test_the_page_on_refusals_quotes_what_is_said() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    table = page.partition("## When it refuses")[2].partition("\n## ")[0]
    quoted = [
        each
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for each in re.findall("`(.*?)`", row)
    ]
    assert len(quoted) > 15
    code = "\n".join(path.read_text() for path in (ROOT / "ttcompress").rglob("*.py"))
    # Long messages are written over several lines.
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    assert [each for each in quoted if each not in joined] == []
