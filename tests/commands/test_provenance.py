"""Which of several networks in one checkpoint a file came from: it is that one which teaches and is compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done, run_command, succeeded
from torch import Tensor

from ttcompress.commands.demo import train_digits
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_safetensors
from ttcompress.networks.zoo import Mlp

pytestmark = pytest.mark.usefixtures("one_thread")
Refused = Callable[..., str]
WIDTHS = {"width0": 64, "width1": 512, "width2": 512, "width3": 10}


@cache
def good() -> dict[str, Tensor]:
    return dict(train_digits().state_dict())


def early() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return dict(Mlp(**WIDTHS).state_dict())


LAYOUTS: dict[str, tuple[Callable[[], Any], str]] = {
    "average": (lambda: {"model": early(), "model_ema": good()}, "model_ema"),
    "first of two": (lambda: {"state_dict": good(), "best_state_dict": early()}, "state_dict"),
    "nested": (lambda: {"a": {"b": good()}, "model": early()}, "a.b"),
}


@pytest.fixture(params=LAYOUTS)
def compressed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """run-tt.safetensors, made from one of two networks in run.pt, and the key of that one."""
    holds, key = LAYOUTS[request.param]
    torch.save(holds(), tmp_path / "run.pt")
    output = tmp_path / "run-tt.safetensors"
    options = ("--key", key, "--ratio", 8, "--data", "digits", "-o", output)
    succeeded("compress", tmp_path / "run.pt", *options, cwd=tmp_path)
    return output, key


def finetuned(output: Path, *options: object) -> dict[str, Any]:
    common = (
        "--train",
        "digits",
        "--epochs",
        1,
        "--data",
        "digits",
        "-o",
        output.with_name("ft.safetensors"),
    )
    done = run_command("finetune", output, *common, *options, cwd=output.parent)
    assert done.code == 0, done.err
    return dict(read_metadata(output.with_name("ft.safetensors")))


def test_training_learns_from_and_is_compared_with_that_network(compressed: tuple[Path, str]) -> None:
    output, key = compressed
    before, after = read_metadata(output), finetuned(output)
    assert before["source"]["key"] == key
    assert before["accuracy"]["dense"] > 85
    assert after["accuracy"]["dense"] == before["accuracy"]["dense"]
    assert after["finetuning"]["teacher"] == "the dense network"


def test_another_key_is_refused(
    compressed: tuple[Path, str], run: Callable[..., Done], tmp_path: Path
) -> None:
    output, key = compressed
    other = {"model_ema": "model", "state_dict": "best_state_dict", "a.b": "model"}[key]
    done = run(
        "finetune", output, "--key", other, "--train", "digits", "--epochs", "1", "-o", "ft.safetensors"
    )
    assert done.code == 2
    assert f"--key {other} of run.pt is not what" in done.err
    assert repr(key) in done.err
    assert not (tmp_path / "ft.safetensors").exists()


def test_a_checkpoint_that_was_written_anew_is_not_taken_for_it(
    compressed: tuple[Path, str], tmp_path: Path
) -> None:
    output, _ = compressed
    torch.save({"state_dict": early()}, tmp_path / "run.pt")
    after = finetuned(output)
    assert after["finetuning"]["teacher"] is None
    # What was measured on the same images before is still known.
    assert after["accuracy"]["dense"] == read_metadata(output)["accuracy"]["dense"]
    assert all(layer.get("relative_error") is None for layer in after["layers"])


def test_a_file_that_does_not_say_which_is_not_guessed_at(
    compressed: tuple[Path, str], tmp_path: Path
) -> None:
    from ttcompress.files.checkpoint import load_compressed

    output, key = compressed
    metadata = json.loads(json.dumps(read_metadata(output)))
    del metadata["source"]["key"], metadata["source"]["state_sha256"]
    write_safetensors(tmp_path / "older.safetensors", load_compressed(output), metadata)
    assert finetuned(tmp_path / "older.safetensors")["finetuning"]["teacher"] is None
    (tmp_path / "ft.safetensors").unlink()
    (tmp_path / "ft.safetensors.training").unlink()
    assert (
        finetuned(tmp_path / "older.safetensors", "--key", key)["finetuning"]["teacher"]
        == "the dense network"
    )
