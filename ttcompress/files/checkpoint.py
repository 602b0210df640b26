"""Checkpoints and compressed files, read. Nothing that a file holds is ever run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import METADATA_KEY, read_header
from ttcompress.files.shards import checkpoint_files, read_index, resolve
from ttcompress.files.state_dict import read_state_dict
from ttcompress.records.common import Json

PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense checkpoint by key, prefixes removed, and where they came from (base name and sha256)."""

    tensors: dict[str, Tensor]
    source: Json

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def load_checkpoint(path: Path, key: str = "", exact: bool = False) -> Checkpoint:
    """Read a dense checkpoint, memory-mapped where its format allows.

    Args:
        path: `.pt`, `.pth`, `.th` or `.safetensors`, the index of several safetensors files, or the folder of either.
        key: which entry of a wrapping dict holds the state dict; needed only where there are several.
        exact: keep prefixes that all names share.

    Raises:
        CheckpointError: missing, empty, damaged or unsafe file, no state dict in it, NaN or Inf in a tensor.
    """
    index, path = read_index(path), resolve(path)
    _check_readable(path)
    tensors = _read_tensors(path) if index or is_safetensors(path) else read_state_dict(path, key)
    tensors = tensors if exact else _strip_prefixes(tensors)
    if bad := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise CheckpointError(f"{path}: NaN or Inf in {shortlist(bad)}")
    return Checkpoint(tensors, {"file": index.name if index else path.name, "sha256": file_digest(path)})


def file_digest(path: Path) -> str:
    """The sha256 of a file's content; of a sharded checkpoint, that of what `sha256sum` prints of its shards."""
    files = checkpoint_files(path)
    digests = {}
    for each in files:
        with each.open("rb") as file:
            digests[each] = hashlib.file_digest(file, "sha256").hexdigest()
    if files == [resolve(path)]:
        return digests[files[0]]
    return hashlib.sha256("".join(f"{digest}  {each.name}\n" for each, digest in digests.items()).encode()).hexdigest()


def is_safetensors(path: Path) -> bool:
    """By name or by content."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_compressed(path: Path) -> bool:
    """Whether this tool wrote the file, or the shards of the folder.

    Raises:
        CheckpointError: missing or empty, or a damaged safetensors file.
    """
    first = checkpoint_files(path)[0]
    _check_readable(first)
    return is_safetensors(first) and METADATA_KEY in read_header(first)[1]


def load_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed file or folder, memory-mapped; its metadata is read by `shards.read_metadata`."""
    return _read_tensors(path)


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in checkpoint_files(path):
        _check_readable(file)
        read_header(file)
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {_first_line(error)}") from error
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype not in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64
    ):  # fmt: skip
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
