"""Reading checkpoints and compressed files. Nothing that a file holds is ever run."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import METADATA_KEY, read_header
from ttcompress.files.shards import checkpoint_files, read_index, resolve
from ttcompress.files.state_dict import read_state_dict
from ttcompress.files.tensors import is_finite
from ttcompress.records.common import Json

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the names of a network."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense checkpoint by key, prefixes removed, and base name and sha256 of its file."""

    tensors: dict[str, Tensor]
    source: Json

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its key."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def load_checkpoint(path: Path, key: str = "", exact: bool = False) -> Checkpoint:
    """Read a dense checkpoint, memory-mapped where its format allows.

    Args:
        path: `.pt`, `.pth`, `.th` or `.safetensors`, the index of several safetensors files, or the folder of
            either.
        key: which entry of a wrapping dict holds the state dict; needed only where there are several.
        exact: keep prefixes that all names share.

    Raises:
        CheckpointError: missing, empty, damaged or unsafe file, no state dict in it, NaN or Inf in a tensor.
    """
    index = read_index(path)
    path = resolve(path)
    _check_readable(path)
    as_safetensors = index is not None or is_safetensors(path)
    tensors = _read_tensors(path) if as_safetensors else read_state_dict(path, key)
    if not exact:
        tensors = _strip_prefixes(tensors)

    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CheckpointError(f"{path}: NaN or Inf in {shortlist(bad)}")
    file = index.name if index else path.name
    return Checkpoint(tensors, {"file": file, "sha256": file_digest(path)})


def file_digest(path: Path) -> str:
    """The sha256 of a file; of a sharded checkpoint, that of what `sha256sum` prints of its shards."""
    files = checkpoint_files(path)
    if files == [resolve(path)]:
        return _sha256(files[0])
    listing = "".join(f"{_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_safetensors(path: Path) -> bool:
    """Whether a file is a safetensors file, by its name or else by its content."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    # The length of the header, eight bytes, and the header.
    return start[8:] == b"{"


def is_compressed(path: Path) -> bool:
    """Whether this tool wrote a file, or the shards of a folder.

    Raises:
        CheckpointError: missing or empty, or a damaged safetensors file.
    """
    first = checkpoint_files(path)[0]
    _check_readable(first)
    return is_safetensors(first) and METADATA_KEY in read_header(first)[1]


def load_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed file or folder, memory-mapped; its metadata are read by `shards`."""
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
        # Ours says more precisely what is wrong with a file.
        read_header(file)
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {_first_line(error)}") from error
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Twice, for they may be nested in either order.
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
