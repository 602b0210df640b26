"""`ttcompress demo`: the whole path on something real, in its own folder and nowhere else."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from pages import Page

from ttcompress import cli
from ttcompress.commands.demo import train_digits
from ttcompress.report.text import read_report

FILES = {"digits.pt", "digits-tt.safetensors", "digits-dense.pt", "digits.html"}


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.chdir(tmp_path)
    cli.main(["demo"])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_demo(output: str, tmp_path: Path) -> None:
    commands = [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("$ ")]
    assert all(command[0] == "ttcompress" for command in commands)
    assert {"compress", "evaluate", "report"} <= {command[1] for command in commands}

    assert [path.name for path in tmp_path.iterdir()] == ["ttcompress-demo"]
    folder = tmp_path / "ttcompress-demo"
    assert {path.name for path in folder.iterdir()} == FILES

    assert output.splitlines()[-1].endswith("ttcompress-demo/digits.html")
    page = Page((folder / "digits.html").read_text())
    assert page.sections == ["summary", "curve", "layers", "spectra", "samples", "notes"]
    assert len(page.all("img")) > 0

    report = read_report(folder / "digits-tt.safetensors")
    assert 4 <= report.compression <= 4 * 1.02
    accuracy = report.accuracy or {}
    assert accuracy["n"] == 360
    assert accuracy["dense"] > 90
    assert accuracy["compressed"] > 85
    shown = re.search(r"top-1 accuracy +([\d.]+) % -> ([\d.]+) %", output)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(accuracy["dense"], abs=0.005)
    assert float(shown[2]) == pytest.approx(accuracy["compressed"], abs=0.005)


def test_the_commands_that_the_demo_shows_do_what_it_did(
    output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (tmp_path / "ttcompress-demo" / "digits-tt.safetensors").read_bytes()
    for line in output.splitlines():
        if line.startswith("$ "):
            cli.main(shlex.split(line)[2:])
            assert capsys.readouterr().out.strip() in output
    assert (tmp_path / "ttcompress-demo" / "digits-tt.safetensors").read_bytes() == first


def test_demo_twice(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["demo"])
    assert capsys.readouterr().out == output


def test_demo_where_a_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ttcompress-demo").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo"])
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert (tmp_path / "ttcompress-demo").read_text() == "mine"


def test_training_is_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = train_digits().state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = train_digits().state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
