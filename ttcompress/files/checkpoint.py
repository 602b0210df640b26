"""Reading checkpoints and compressed files. Nothing that a file holds is ever run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import METADATA_KEY, PLAIN_KEY, check_readable, read_header
from ttcompress.files.shards import check_homes, checkpoint_files, pickled_index, read_index, resolve
from ttcompress.files.state_dict import StateDict, read_state_dict
from ttcompress.files.tensors import is_finite, state_sha256, tensor_infos
from ttcompress.records.common import Json
from ttcompress.torchrun import leads

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before the names of a network."""
AVERAGED = "n_averaged"
"""What AveragedModel counts in, beside the network under `module.`."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense checkpoint by key, prefixes removed, and where they are from.

    `source` has base name and sha256 of the file; `state_sha256` of the tensors, unless it was read with exact
    names; and `key`, the entry that they are from, where the file holds others or one was named. `notes` are for
    whoever uses the tensors.
    """

    tensors: dict[str, Tensor]
    source: Json
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by its key."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def without_prefix(self) -> Checkpoint | None:
        """The same without the first part of its names where all share one, as trainers that wrap a network write."""
        prefixes = {first + dot for first, dot, _ in (name.partition(".") for name in self.tensors)}
        prefix = prefixes.pop()
        if prefixes or not prefix.endswith("."):
            return None
        tensors = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items()}
        note = f"read without the prefix {prefix!r} that all names have"
        return Checkpoint(
            tensors, {**self.source, "state_sha256": state_sha256(tensors)}, (*self.notes, note)
        )

    def say_notes(self) -> None:
        """Log each note, once."""
        if leads():
            for note in self.notes:
                _say(f"{self.source['file']}: {note}")


@cache
def _say(note: str) -> None:
    logging.getLogger("ttcompress").warning("ttcompress: %s", note)


def load_checkpoint(path: Path, key: str = "", exact: bool = False) -> Checkpoint:
    """Read a dense checkpoint, memory-mapped where its format allows.

    Args:
        path: `.pt`, `.pth`, `.th`, `.bin` or `.safetensors`, the index of several safetensors or bin files, or the
            folder of any.
        key: which entry of a wrapping dict holds the state dict, with dots for entries in entries; needed only where
            there are several.
        exact: keep prefixes that all names share.

    Raises:
        CheckpointError: missing, empty, damaged or unsafe file, no state dict in it, NaN or Inf in a weight, a
            tensor that no safetensors file can hold.
    """
    index = read_index(path) or pickled_index(path)
    path = resolve(path)
    check_readable(path)
    state = _read_state(path, key)
    tensors = state.tensors if exact else _strip_prefixes(state.tensors)
    _check_storable(path, tensors)

    notes = _notes_on(state, key)
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        weights = [name for name in bad if _is_weight(name, tensors[name])]
        if weights:
            raise CheckpointError(f"{path}: NaN or Inf in {shortlist(weights)}")
        notes.append(f"NaN or Inf in {shortlist(bad)}, which stay as they are")

    source: Json = {"file": index.name if index else path.name, "sha256": file_digest(path)}
    if key or state.others:
        source["key"] = state.key
    if not exact:
        source["state_sha256"] = state_sha256(tensors)
    return Checkpoint(tensors, source, tuple(notes))


def _read_state(path: Path, key: str) -> StateDict:
    if shards := pickled_index(path):
        parts = [(file, read_state_dict(file, key)) for file in shards.files]
        check_homes(shards, {(name, file.name) for file, part in parts for name in part.tensors})
        return StateDict({name: tensor for _, part in parts for name, tensor in part.tensors.items()})
    if is_safetensors(path) or read_index(path):
        return StateDict(_read_tensors(path))
    return read_state_dict(path, key)


def _notes_on(state: StateDict, key: str) -> list[str]:
    notes = []
    if state.others and not key:
        taken = f"the state dict {state.key!r}" if state.key else "the tensors outside of its entries"
        notes.append(f"takes {taken}; it also holds {shortlist(state.others)}, to be chosen with --key")
    if state.dropped:
        notes.append(f"without {shortlist(state.dropped)}, which are no tensors")
    return notes


def _check_storable(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """See, before any work, that a safetensors file can hold all tensors under their names.

    Raises:
        CheckpointError: it cannot.
    """
    if bad := [name for name in tensors if not _is_storable_name(name)]:
        raise CheckpointError(
            f"{path}: holds tensors whose names no file can have: {shortlist(map(ascii, bad))}"
        )
    try:
        tensor_infos(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _is_storable_name(name: str) -> bool:
    # The header has its metadata in the place of a tensor, and a weight needs a layer that it is of.
    if name == "__metadata__" or not name or name.startswith("."):
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


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
    check_readable(first)
    return is_safetensors(first) and METADATA_KEY in read_header(first)[1]


def is_plain(path: Path) -> bool:
    """Whether a file holds a plain network, as `expand --factors` writes it.

    Raises:
        CheckpointError: missing or empty, or a damaged safetensors file.
    """
    first = checkpoint_files(path)[0]
    check_readable(first)
    return is_safetensors(first) and PLAIN_KEY in read_header(first)[1]


def load_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed file or folder, or of a plain one, memory-mapped, without their metadata."""
    return _read_tensors(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in checkpoint_files(path):
        check_readable(file)
        # Ours says more precisely what is wrong with a file.
        read_header(file)
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {_first_line(error)}") from error
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = tensors.keys() - {AVERAGED}
    if AVERAGED in tensors and names and all(name.startswith(PREFIXES[0]) for name in names):
        tensors = {name: tensor for name, tensor in tensors.items() if name != AVERAGED}
    # Twice, for they may be nested in either order.
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may be a layer's weight that is decomposed, not a bias, a statistic or a mask."""
    return tensor.dim() > 1 and name.rpartition(".")[2] == "weight"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
