"""Tensors of every kind into files and back, byte for byte the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ttcompress.errors import CheckpointError
from ttcompress.files.checkpoint import load_checkpoint
from ttcompress.files.tensors import tensor_bytes
from ttcompress.files.writing import write_dense, write_safetensors

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "bn.num_batches_tracked": torch.tensor(7)}


TENSORS = {
    "float16": torch.tensor([1.5, -0.25, 65504.0], dtype=torch.float16),
    "bfloat16": torch.tensor([[1.5], [-3e38]], dtype=torch.bfloat16),
    "float64": torch.tensor([1e-300, 1 / 3], dtype=torch.float64),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8": torch.tensor([0, 255], dtype=torch.uint8),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "bool": torch.tensor([True, False, True]),
    "0-dim": torch.tensor(3.25),
    "0-dim bool": torch.tensor(True),
    "empty": torch.empty(0),
    "empty 2-d": torch.empty(3, 0, dtype=torch.float16),
    "denormal": torch.tensor([1e-45, -0.0]),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("name", TENSORS)
def test_every_kind_of_tensor_round_trips(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"net{suffix}"
    write_dense(path, {name: TENSORS[name]})
    read = load_checkpoint(path).tensors
    assert [*read] == [name]
    assert (read[name].dtype, read[name].shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    assert torch.equal(read[name], TENSORS[name])
    # The sign of zero too, which equality does not see.
    assert torch.equal(read[name].double().signbit(), TENSORS[name].double().signbit())


def test_a_tensor_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_text("old")
    with pytest.raises(CheckpointError, match=r"bad: safetensors has no type for torch\.complex128"):
        write_safetensors(path, {"good": torch.ones(2), "bad": torch.ones(2, dtype=torch.complex128)})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["dense", "dense.th", "dense.bin", "dense.safetensor"])
def test_write_dense_refuses_a_suffix_that_says_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"\.pt, \.pth or \.safetensors"):
        write_dense(tmp_path / name, STATE)
    assert not list(tmp_path.iterdir())


def test_the_longest_name_that_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 243 + ".safetensors")
    write_dense(path, STATE)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_write_dense_writes_the_same_bytes_twice(tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    write_dense(first, STATE)
    write_dense(second, STATE)
    assert first.read_bytes() == second.read_bytes()


def test_tensor_bytes() -> None:
    # 2 + 4 bytes of int8 and float16, 8 of one float64, nothing of an empty tensor.
    tensors = [
        torch.zeros(2, dtype=torch.int8),
        torch.zeros(2, dtype=torch.float16),
        torch.zeros((), dtype=torch.float64),
    ]
    assert tensor_bytes({str(k): tensor for k, tensor in enumerate([*tensors, torch.empty(0)])}) == 14


def test_an_empty_tensor_beside_one_of_another_type_is_saved(tmp_path: Path) -> None:
    """Both begin at one address, as in a file that is mapped into memory."""
    numbers = torch.arange(4, dtype=torch.int32)
    write_dense(tmp_path / "x.pt", {"a": numbers, "b": numbers.view(torch.float32)[:0], "c": torch.empty(0)})
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["a"], numbers)
    assert (found["b"].shape, found["b"].dtype, found["c"].shape) == ((0,), torch.float32, (0,))
