"""Calibration, search and gate on the command line: what is written, printed and refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_command
from sklearn.datasets import load_digits

from ttcompress.commands.demo import train_digits
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.networks.zoo import CifarResNet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits.pt (64-512-512-10), resnet.pt, and the digits as npz with and without labels; read only."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_dense(folder / "digits.pt", train_digits().state_dict())
    torch.manual_seed(0)
    write_dense(folder / "resnet.pt", CifarResNet(3).state_dict())
    pixels = (load_digits().images[:160] * 15).astype(np.uint8)
    labels = np.zeros(160, dtype=np.int64)
    np.savez(folder / "plain.npz", images=pixels)
    (folder / "labelled").mkdir()
    np.savez(folder / "labelled" / "plain.npz", images=pixels, labels=labels)
    np.savez(folder / "few.npz", images=pixels[:15])
    np.savez(folder / "large.npz", images=pixels[:, [*range(8), 0]])
    return folder


def ttcompress(*arguments: object, cwd: Path, code: int = 0) -> str:
    """What a command prints, on stderr where it fails."""
    done = run_command(*arguments, cwd=cwd)
    assert done.code == code, done
    assert (done.err == "") == (code == 0)
    return done.err if code else done.out


def calibration(folder: Path, name: str, *more: object, calib: str = "plain.npz") -> list[object]:
    given = ("--ratio", 6, "--calib", f"npz:{folder / calib}", "--effort", "fast", *more)
    return ["compress", folder / "digits.pt", *given, "-o", name]


def calibrate(folder: Path, tmp_path: Path, name: str, *more: object, calib: str = "plain.npz") -> Path:
    ttcompress(*calibration(folder, name, *more, calib=calib), cwd=tmp_path)
    return tmp_path / name


@pytest.mark.slow
def test_same_seed_same_bytes_and_labels_do_not_matter(folder: Path, tmp_path: Path) -> None:
    one = calibrate(folder, tmp_path, "one.safetensors", "--calib-images", 64)
    again = tmp_path / "again.safetensors"
    command = [sys.executable, "-m", "ttcompress", *calibration(folder, again.name, "--calib-images", 64)]
    subprocess.run([*map(str, command)], cwd=tmp_path, check=True, capture_output=True)
    other = calibrate(folder, tmp_path, "other.safetensors", "--calib-images", 64, "--seed", 1)
    assert one.read_bytes() == again.read_bytes()
    assert one.read_bytes() != other.read_bytes()
    labelled = calibrate(
        folder, tmp_path, "labelled.safetensors", "--calib-images", 64, calib="labelled/plain.npz"
    )
    assert one.read_bytes() == labelled.read_bytes()


def test_the_report_says_what_counted_and_what_each_stage_was_worth(folder: Path, tmp_path: Path) -> None:
    file = calibrate(folder, tmp_path, "small.safetensors", "--data", "digits", "--max-drop", 5)
    data = json.loads(ttcompress("report", file, "--json", cwd=tmp_path))
    calibration = data["calibration"]
    assert (calibration["images"], calibration["held_out"], calibration["effort"]) == (140, 20, "fast")
    assert str(folder) not in json.dumps(data)
    assert [each["stage"] for each in calibration["stages"]] == ["weights", "whitened", "sweeps"]
    kept = [each["stage"] for each in calibration["stages"] if each["kept"]]
    replaced = [layer for layer in data["layers"] if "tt_ranks" in layer]
    assert replaced
    for layer in replaced:
        assert [*layer["output_error"]] == kept
        assert 0 < layer["output_error"][kept[-1]] < 1
        assert layer["relative_error"] > 0
    text = ttcompress("report", file, cwd=tmp_path)
    assert "output error on 140 images of npz:plain.npz" in text
    assert "n = 20" in text
    assert "output error" in text.splitlines()[0] + text.splitlines()[1]
    assert "weight error (--calib" not in text


def test_a_calibrated_plan_can_be_written_and_compressed(folder: Path, tmp_path: Path) -> None:
    calib = ("--calib", f"npz:{folder / 'plain.npz'}")
    text = ttcompress("plan", folder / "digits.pt", "--ratio", 6, *calib, "-o", "plan.json", cwd=tmp_path)
    assert "output error on 140 images" in text
    direct = calibrate(folder, tmp_path, "direct.safetensors")
    given = ("--plan", "plan.json", *calib, "--effort", "fast", "-o", "planned.safetensors")
    ttcompress("compress", folder / "digits.pt", *given, cwd=tmp_path)
    one, other = (read_metadata(file) for file in (direct, tmp_path / "planned.safetensors"))
    assert one["calibration"] == other["calibration"]
    forgotten = [
        {key: value for key, value in layer.items() if key != "predicted_error"} for layer in one["layers"]
    ]
    assert forgotten == [
        {key: value for key, value in layer.items() if key != "predicted_error"} for layer in other["layers"]
    ]


def test_the_search_is_in_the_file_and_in_print(folder: Path, tmp_path: Path) -> None:
    given = ("--max-drop", 2, "--val", "digits@train", "--data", "digits", "-o", "found.safetensors")
    text = ttcompress("compress", folder / "digits.pt", *given, cwd=tmp_path)
    data = read_metadata(tmp_path / "found.safetensors")
    assert len(data["search"]) > 3
    assert text.count("searched  ") == len(data["search"])
    fitting = [point for point in data["search"] if point["drop"] <= 2]
    assert data["compression"] == max(point["compression"] for point in fitting)
    assert data["accuracy"]["data"] == "digits@test"


def test_beside_another_target_max_drop_is_a_gate(folder: Path, tmp_path: Path) -> None:
    given = ("--ratio", 40, "--max-drop", 0.5, "--data", "digits", "-o", "small.safetensors")
    message = ttcompress("compress", folder / "digits.pt", *given, cwd=tmp_path, code=1)
    warning, verdict = message.splitlines()
    assert warning.startswith("ttcompress: warning: fc1 keeps under a fifth of the norm")
    assert verdict.startswith("ttcompress: accuracy falls by ")
    assert "--max-drop allows 0.5" in verdict
    assert read_metadata(tmp_path / "small.safetensors")["accuracy"]["n"] == 360


REFUSED = {
    "too few": (("--ratio", 2, "--calib", "npz:few.npz"), "needs at least 16 images, not 15"),
    "fewer than asked": (("--ratio", 2, "--calib", "npz:plain.npz", "--calib-images", 161), "has 160 images"),
    "wrong size": (("--ratio", 2, "--calib", "npz:large.npz"), "does not take images of shape (1, 9, 8)"),
    "no file": (("--ratio", 2, "--calib", "npz:none.npz"), "no file none.npz"),
    "effort alone": (("--ratio", 2, "--effort", "max"), "--effort needs --calib"),
    "number alone": (("--ratio", 2, "--calib-images", 20), "--calib-images needs --calib"),
    "val without a search": (("--ratio", 2, "--val", "digits"), "--val is what --max-drop"),
    "search without val": (("--max-drop", 1), "--val"),
    "unlabelled val": (("--max-drop", 1, "--val", "npz:plain.npz"), "has no labels"),
    "negative drop": (("--max-drop", -1, "--val", "digits"), "--max-drop"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("command", ["compress", "plan"])
def test_what_does_not_fit_ends_in_one_line(command: str, given: Any, message: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    text = ttcompress(command, "digits.pt", *given, cwd=folder, code=2)
    assert message in text
    assert text.startswith("ttcompress: ")
    assert text.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == before


def test_a_gate_needs_labelled_images(folder: Path) -> None:
    text = ttcompress("compress", "digits.pt", "--ratio", 2, "--max-drop", 1, cwd=folder, code=2)
    assert "--data" in text
    assert text.count("\n") == 1


def test_grey_images_for_a_network_of_colours(folder: Path) -> None:
    given = ("--ratio", 2, "--calib", "npz:plain.npz")
    text = ttcompress("compress", "resnet.pt", *given, cwd=folder, code=2)
    assert "channel" in text
    assert text.count("\n") == 1
