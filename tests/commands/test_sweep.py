"""`sweep`: points that `compress` would make, made once, told as they are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done
from pages import Page, at
from torch import nn

import ttcompress
from ttcompress.commands import sweep as module
from ttcompress.commands.demo import train_digits
from ttcompress.errors import DataError, PlanError, TTCompressError
from ttcompress.report.text import read_report

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Done]
POINTS = ("1.5", "2", "3")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.pt"
    torch.save(train_digits().state_dict(), path)
    return path


@pytest.fixture
def net(digits: Path, tmp_path: Path) -> Path:
    (tmp_path / "digits.pt").symlink_to(digits)
    return tmp_path / "digits.pt"


def sweep(run: Run, *more: object, ratios: str = "1.5,2,3") -> Done:
    done = run("sweep", "digits.pt", "--ratios", ratios, "-o", "sizes", *more)
    assert (done.code, done.err) == (0, ""), done
    return done


CALIBRATED = ("--calib", "digits@train", "--calib-images", 64, "--effort", "fast", "--data", "digits")


@pytest.mark.parametrize("options", [(), CALIBRATED], ids=["weights", "calibrated"])
def test_every_point_is_what_compress_writes(
    net: Path, run: Run, tmp_path: Path, options: tuple[object, ...]
) -> None:
    found = sweep(run, *options, "--json").json["points"]
    assert [point["ratio"] for point in found] == [1.5, 2, 3]
    for point, ratio in zip(found, POINTS, strict=True):
        single = run(
            "compress",
            "digits.pt",
            "--ratio",
            ratio,
            *options,
            "-o",
            "single.safetensors",
            "--force",
            "--json",
        )
        file = tmp_path / "sizes" / f"digits-{ratio}x.safetensors"
        assert file.read_bytes() == (tmp_path / "single.safetensors").read_bytes()
        report = single.json
        assert point["file"] == file.name
        for key in ("compression", "params_after", "bytes_after", "file_bytes"):
            assert point[key] == report[key], key
        if options:
            assert point["accuracy"] == report["accuracy"]["compressed"]
            assert point["drop"] == report["accuracy"]["dense"] - report["accuracy"]["compressed"]
            assert point["error"] == [s["error"] for s in report["calibration"]["stages"] if s["kept"]][-1]


def test_statistics_and_spectra_are_computed_once(
    net: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments, **options)

        return call

    from ttcompress.commands import compressor
    from ttcompress.planning import planner

    monkeypatch.setattr(compressor, "measure", counted("statistics", compressor.measure))
    monkeypatch.setattr(planner, "layer_spectra", counted("spectra", planner.layer_spectra))
    sweep(
        run, "--calib", "digits@train", "--calib-images", 64, "--effort", "fast", "--formats", "auto,lowrank"
    )
    assert counts == {"statistics": 1, "spectra": 2 * 2}


def test_a_killed_sweep_goes_on_with_the_missing_points(
    net: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = module.write_compressed, []

    def dying(output: Path, *arguments: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(output.name)
        write(output, *arguments)

    monkeypatch.setattr(module, "write_compressed", dying)
    command = ("sweep", "digits.pt", "--ratios", "1.5,2,3", "--data", "digits", "-o", "sizes")
    interrupted = run(*command)
    assert interrupted.code == 130
    left = {
        file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in (tmp_path / "sizes").iterdir()
    }
    assert sorted(left) == written == ["digits-1.5x.safetensors", "digits-2x.safetensors"]

    written.clear()
    assert "2 of 3 points are in sizes" in interrupted.err
    assert run(*command).code == 0
    assert written == ["digits-3x.safetensors"]
    for name, (changed, content) in left.items():
        file = tmp_path / "sizes" / name
        assert (file.stat().st_mtime_ns, file.read_bytes()) == (changed, content)

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "sizes").glob("*.safetensors")}
    assert run("sweep", "digits.pt", "--ratios", "1.5,2,3", "--data", "digits", "-o", "anew").code == 0
    assert whole == {file.name: file.read_bytes() for file in (tmp_path / "anew").glob("*.safetensors")}


def test_table_json_csv_and_page_say_the_same(net: Path, run: Run, tmp_path: Path) -> None:
    printed = sweep(run, "--data", "digits", "--max-drop", 2, "--json").json
    rows = list(csv.DictReader(io.StringIO(sweep(run, "--data", "digits", "--max-drop", 2, "--csv").out)))
    table = sweep(run, "--data", "digits", "--max-drop", 2).out
    points = printed["points"]

    for row, point in zip(rows, points, strict=True):
        for key, value in point.items():
            text = (
                " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            )
            assert row[key] == text, key
        assert f"{point['params_after']:,}" in table
        assert f"{point['accuracy']:.2f} %" in table
        low, high = point["drop_interval"]
        assert low <= point["drop"] <= high
        assert f"{point['drop']:+.2f} {low:+.2f} to {high:+.2f}" in " ".join(table.split())
        assert point["file"] in table

    assert table.splitlines()[-1].split() == ["page", "sizes/index.html"]
    page = Page((tmp_path / "sizes" / "index.html").read_text())
    reports = [read_report(tmp_path / "sizes" / point["file"]).to_json() for point in points]
    shown = [each for each in page.all("data") if "/page/" not in str(each.get("data-json"))]
    assert len(shown) > 60
    for each in shown:
        value = at(reports, str(each.get("data-json")))
        value -= at(reports, str(each.get("data-minus"))) if each.get("data-minus") else 0
        value /= at(reports, str(each.get("data-over"))) if each.get("data-over") else 1
        assert float(str(each.get("value"))) == value


def test_the_smallest_that_holds_is_marked(net: Path, run: Run) -> None:
    points = sweep(run, "--data", "digits", "--json", ratios="2,4,30").json["points"]
    drops = [point["drop"] for point in points]
    assert drops[2] > max(drops[:2])
    allowed = max(drops[:2])
    for limit, wanted in ((allowed, [False, True, False]), (1000, [False, False, True]), (0, None)):
        done = sweep(run, "--data", "digits", "--json", "--max-drop", limit, ratios="2,4,30").json
        marks = [point["smallest"] for point in done["points"]]
        kept = [point["params_after"] for point in points if point["drop"] <= limit]
        assert marks == [point["params_after"] == min(kept, default=-1) for point in points]
        assert wanted is None or marks == wanted


def test_formats_are_points_of_their_own(net: Path, run: Run, tmp_path: Path) -> None:
    points = sweep(run, "--formats", "lowrank,matrix", "--json", ratios="2,3").json["points"]
    assert [(point["format"], point["ratio"]) for point in points] == [
        ("lowrank", 2), ("lowrank", 3), ("matrix", 2), ("matrix", 3)
    ]  # fmt: skip
    for point in points:
        report = read_report(tmp_path / "sizes" / point["file"])
        assert {layer.tensorization.format for layer in report.layers} == {point["format"]}


REFUSED = [
    (("--ratios", "2,1"), "--ratios must be a list of numbers above 1"),
    (("--ratios", "2", "--formats", "tucker"), "--formats must be a list of"),
    (("--ratios", "2", "--max-drop", "1"), "name labelled images with --data"),
    (("--ratios", "2", "--arch", "none"), "needs a network"),
    (("--ratios", "2", "--html", "page.txt"), "end the name of a page in .html"),
    (("--ratios", "2", "--effort", "fast"), "--effort needs --calib"),
    (("--ratios", "2000000"), "out of reach"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_what_does_not_fit_is_one_line(
    net: Path, run: Run, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = run("sweep", "digits.pt", *options, "-o", "sizes")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
    assert [file.name for file in tmp_path.iterdir()] == ["digits.pt"]


def test_files_of_another_command_are_not_taken_for_points(net: Path, run: Run, tmp_path: Path) -> None:
    sweep(run, ratios="2")
    before = (tmp_path / "sizes" / "digits-2x.safetensors").read_bytes()
    for options in (("--seed", 1), ("--format", "lowrank"), ("--dtype", "float16"), ("--data", "digits")):
        done = run("sweep", "digits.pt", "--ratios", "2,3", *options, "-o", "sizes")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "--force" in done.err
    assert (tmp_path / "sizes" / "digits-2x.safetensors").read_bytes() == before
    assert sweep(run, "--seed", 1, "--force", ratios="2").code == 0
    assert read_report(tmp_path / "sizes" / "digits-2x.safetensors").seed == 1


def test_a_page_of_somebody_else_is_kept(net: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "index.html").write_text("mine")
    done = run("sweep", "digits.pt", "--ratios", "2", "-o", "sizes")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert (tmp_path / "sizes" / "index.html").read_text() == "mine"
    (tmp_path / "other.txt").write_text("")
    assert run("sweep", "digits.pt", "--ratios", "2", "-o", "other.txt").code == 2
    assert run("sweep", "digits.pt", "--ratios", "2", "-o", "no/such").code == 2


# -------------------------------------------------------------------------------------------------------------- Python


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def test_in_python_points_are_what_compress_returns() -> None:
    net, calib = small(), torch.randn(64, 32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loader = [(calib, net(calib).argmax(1))]
    points = ttcompress.sweep(net, ratios=[3, 1.5], calib=calib, effort="fast", data=loader, max_drop=100)
    assert [point.ratio for point in points] == [1.5, 3]
    assert [point.smallest for point in points] == [False, True]
    for point in points:
        module, report = ttcompress.compress(net, ratio=point.ratio, calib=calib, effort="fast", data=loader)
        assert report == point.report
        assert point.module is not None
        assert all(
            torch.equal(a, b) for a, b in zip(module.parameters(), point.module.parameters(), strict=True)
        )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_in_python_a_metric_will_do() -> None:
    points = ttcompress.sweep(
        small(), ratios=[2], metric=lambda net: sum(p.numel() for p in net.parameters()), max_drop=1e9
    )
    assert points[0].report.accuracy is not None
    assert points[0].smallest


def test_in_python_mistakes_are_said_in_its_own_words() -> None:
    with pytest.raises(PlanError, match="ratios must be a list"):
        ttcompress.sweep(small(), ratios=[0.5])
    with pytest.raises(DataError, match="max_drop marks by accuracy"):
        ttcompress.sweep(small(), ratios=[2], max_drop=1)
    with pytest.raises(TypeError, match="did you mean 'ratios'"):
        ttcompress.sweep(small(), ratios=[2], ratio=3)  # type: ignore[arg-type]
    with pytest.raises(TTCompressError, match="out of reach"):
        ttcompress.sweep(small(), ratios=[5000])


def test_points_are_json() -> None:
    (point,) = ttcompress.sweep(small(), ratios=[2])
    assert json.loads(json.dumps(point.to_json()))["accuracy"] is None
