"""scripts.gpu: what it would run is there, and its processes keep the order, the number and the time."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ttcompress.tt.cost import GPU_TIME

ROOT = Path(__file__).parents[1]
WRITES = "import sys, json; open(sys.argv[1], 'a').write(json.dumps({'gpu_row': sys.argv[2]}) + chr(10))"
LASTS = "import time; time.sleep(86400)"
FAILS = "raise SystemExit('no such luck')"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """`python -m scripts.gpu` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("scripts.gpu.__main__")


@pytest.fixture
def session(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A session of rows that are no trainings: what each runs instead, and the order in which they are started."""
    monkeypatch.setattr(gpu, "LEFT_TO_SAVE", 0.3)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)

    def made(programs: dict[str, str], seconds: float = 30.0, at_a_time: int = 2) -> Any:
        asked = argparse.Namespace(
            minutes=seconds / 60,
            results=tmp_path / "rows.jsonl",
            work=tmp_path / "work",
            only=[*programs],
            at_a_time=at_a_time,
        )
        found = gpu.Session(asked)
        found.started = []

        def start(name: str, minutes: float = 0.0) -> None:
            assert len(found.running) < at_a_time
            found.started.append(name)
            command = [sys.executable, "-c", programs[name], str(asked.results), name]
            with found.log(name).open("ab") as log:
                found.running[name] = subprocess.Popen(command, stdout=log, stderr=log)

        found.start = start
        return found

    return made


def test_rows_are_in_order_of_worth_and_not_run_twice(session: Callable[..., Any], gpu: ModuleType) -> None:
    rows = ["resnet20 4x", "resnet32 2.8x", "conv baseline", "wide rank 10"]
    first = session(dict.fromkeys(rows, WRITES))
    assert first.run() == 0
    assert first.started == rows
    assert gpu.done(first.arguments.results) == set(rows)
    again = session(dict.fromkeys([*rows, "conv-fc baseline"], WRITES))
    assert again.run() == 0
    assert again.started == ["conv-fc baseline"]


def test_what_runs_at_the_end_is_stopped(
    session: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = session({"resnet20 4x": LASTS, "conv baseline": WRITES, "wide rank 10": LASTS}, seconds=2.0)
    assert found.run() == 1
    assert not found.running
    printed = capsys.readouterr().out
    assert "left: resnet20 4x, wide rank 10" in printed
    assert "the same command goes on with these" in printed


def test_a_row_that_fails_does_not_end_the_others(
    session: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    found = session({"resnet20 4x": FAILS, "conv baseline": WRITES, "speed": WRITES})
    assert found.run() == 1
    printed = capsys.readouterr().out
    assert "resnet20 4x: FAILED" in printed
    assert "no such luck" in printed
    # What needs the GPU for itself comes first.
    assert found.started == ["speed", "resnet20 4x", "conv baseline"]
    assert "times are left" in printed


def test_unknown_rows_are_named(session: Callable[..., Any]) -> None:
    with pytest.raises(SystemExit, match="no such rows: resnet21"):
        session({"resnet21": WRITES}).run()


def test_every_row_of_a_paper_is_one(gpu: ModuleType) -> None:
    trainings = importlib.import_module("scripts.gpu.trainings")
    where = importlib.import_module("scripts.papers.rows").Where()
    of_papers = [run for run in trainings.ROWS.values() if run.func is trainings.of_paper]
    assert len(of_papers) >= 7
    for run in of_papers:
        _, runs, name, epochs = run.args
        assert name in dict(runs(where))
        assert epochs in (90, 100)


def test_times_have_names_of_their_own(gpu: ModuleType) -> None:
    names = [name for name, _ in importlib.import_module("scripts.gpu.speed").all_rows()]
    assert len(names) == len(set(names)) > 50
    assert names[0] == "fc6 rank 4, batch 1, float32, eager"


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_a_time_is_measured(way: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, rows = (importlib.import_module(f"scripts.gpu.{name}") for name in ("speed", "rows"))
    monkeypatch.setattr(speed, "ROUNDS", 3)
    place = rows.Place(None, None, Path(), Path(), speed.torch.device("cpu"), is_tiny=True)
    for found in (
        speed.fc6(2, "float32", way, place),
        speed.chain(128, 28, 2, 4, "bfloat16", way, place),
        speed.decomposition(0, place),
        speed.calibration("fast", place),
    ):
        assert all(value > 0 for value in found.values() if isinstance(value, float))


def test_the_cost_model_is_what_was_measured(gpu: ModuleType) -> None:
    """`GPU_TIME` follows from the rows that are kept, and each of them is near what it says."""
    fitting = importlib.import_module("scripts.gpu.fit")
    found = [
        each for each in fitting.points(fitting.read(ROOT / "docs" / "gpu.jsonl")) if each.dtype == "float32"
    ]
    fitted = fitting.fit(found)
    madd, element, kernel = fitted
    assert len(found) >= 14
    assert element / madd == pytest.approx(GPU_TIME.element, rel=0.05)
    assert kernel / madd == pytest.approx(GPU_TIME.convolution, rel=0.05)
    assert GPU_TIME.product == GPU_TIME.convolution
    for each in found:
        assert 0.6 < fitting.work_seconds(each, fitted) / each.seconds < 1.7, each.name


def test_a_step_is_looked_into(gpu: ModuleType, tmp_path: Path) -> None:
    step, rows = (importlib.import_module(f"scripts.gpu.{name}") for name in ("step", "rows"))
    place = rows.Place(None, None, tmp_path, tmp_path, step.torch.device("cpu"), is_tiny=True)
    found = step.step(False, place)
    assert found["seconds"] > 0
    assert found["kernels"] == 0
    # The profile is of whole epochs: a step of two has 19 convolutions and their gradients.
    assert {name: count for name, _, count in found["by_operator"]}["aten::convolution_backward"] >= 19
