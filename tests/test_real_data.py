"""The published CIFAR-10 ResNets on real data, by the commands a user would type first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import succeeded

from ttcompress.measure.intervals import wilson_interval

pytestmark = pytest.mark.slow


def ttcompress(*arguments: object, cwd: Path) -> str:
    """What a process of its own prints: nothing of this one can help."""
    command = [sys.executable, "-m", "ttcompress", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.fullmatch(r"ttcompress: \w+, \d+ s", line) for line in done.stderr.splitlines()), (
        done.stderr
    )
    return done.stdout


# NUMBERS.md: accuracy of these files on the 10,000 test images, as published.
@pytest.mark.parametrize(
    ("file", "right"),
    [("resnet20-12fca82f.th", 9173), ("resnet32-d509ac18.th", 9263)],
    ids=["resnet20", "resnet32"],
)
def test_published_accuracy_with_data_alone(
    checkpoints: Path, cifar10_root: Path, tmp_path: Path, file: str, right: int
) -> None:
    text = ttcompress("evaluate", checkpoints / file, "--data", f"cifar10:{cifar10_root}", cwd=tmp_path)
    low, high = wilson_interval(right, 10_000)
    first = text.splitlines()[0]
    assert first.startswith(f"{right / 100:.2f} % top-1 ")
    assert f"{low:.2f} to {high:.2f}" in first
    assert "n = 10,000" in first
    assert "cifar10@test" in first
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def compressed(checkpoints: Path, cifar10_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published ResNet-20 at 1.5x, with its report measured."""
    folder = tmp_path_factory.mktemp("resnet20")
    data = f"cifar10:{cifar10_root}"
    arguments = ["compress", checkpoints / "resnet20-12fca82f.th", "--ratio", "1.5", "--data", data]
    ttcompress(*arguments, "-o", "small.safetensors", cwd=folder)
    return folder / "small.safetensors"


def test_compress_reports_accuracy_interval_and_agreement(compressed: Path) -> None:
    data: dict[str, Any] = json.loads(succeeded("report", compressed, "--json", cwd=compressed.parent))
    accuracy = data["accuracy"]
    assert 1.5 <= data["compression"] <= 1.53
    assert data["architecture"] == {"kind": "zoo", "name": "resnet20", "arguments": {}, "sha256": ""}
    assert accuracy["dense"] == pytest.approx(91.73, abs=0.011)
    assert accuracy["n"] == 10_000
    right = round(accuracy["compressed"] * 100)
    assert accuracy["interval"] == pytest.approx(list(wilson_interval(right, 10_000)))
    # Chance is 10 %; weights alone, without calibration, keep at least several times that at 1.5x.
    assert 30 < accuracy["compressed"] < accuracy["dense"]
    # Two networks that are right together on this share agree at least there, and at most where one alone errs.
    assert accuracy["compressed"] + accuracy["dense"] - 100 <= accuracy["agreement"]
    assert accuracy["agreement"] <= 100 - (accuracy["dense"] - accuracy["compressed"])
    assert accuracy["dense"] <= accuracy["dense_top5"] <= 100
    assert accuracy["compressed"] <= accuracy["compressed_top5"] <= 100


def test_the_file_alone_has_the_reported_accuracy(
    compressed: Path, cifar10_root: Path, tmp_path: Path
) -> None:
    reported = json.loads(succeeded("report", compressed, "--json", cwd=tmp_path))["accuracy"]
    measured = json.loads(
        ttcompress("evaluate", compressed, "--data", f"cifar10:{cifar10_root}", "--json", cwd=tmp_path)
    )
    assert measured["accuracy"] == reported["compressed"]
    assert measured["top5"] == reported["compressed_top5"]
    assert measured["interval"] == reported["interval"]
    assert measured["n"] == 10_000


def test_no_path_of_this_machine_is_in_the_file(
    compressed: Path, checkpoints: Path, cifar10_root: Path
) -> None:
    content = compressed.read_bytes()
    for folder in (checkpoints, cifar10_root, compressed.parent):
        assert str(folder).encode() not in content
