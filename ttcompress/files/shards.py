"""Checkpoints in several safetensors files with an index, as Hugging Face lays them out; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files import header
from ttcompress.records.reading import parse_json

INDEX_SUFFIX = ".index.json"
PICKLED_INDEX_SUFFIX = f".bin{INDEX_SUFFIX}"
"""That of shards which torch.save wrote; they are read as one checkpoint, not written as shards again."""
USUAL_NAMES = ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}")
PATTERNS = (f"*.safetensors{INDEX_SUFFIX}", "*.safetensors", f"*{PICKLED_INDEX_SUFFIX}", "*.bin")
"""What the files of a checkpoint in a folder are called; the first pattern that anything matches counts."""


@dataclass(frozen=True)
class Index:
    """Which shard, a file beside the index, holds which tensor."""

    path: Path
    homes: Mapping[str, str]

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of their names."""
        return [self.path.with_name(name) for name in sorted(set(self.homes.values()))]

    @property
    def name(self) -> str:
        """The name of the whole checkpoint: that of its folder."""
        return self.path.resolve().parent.name or "checkpoint"

    def moved(self, homes: Mapping[str, str]) -> Index:
        """An index of the same name over other tensors in the same shards."""
        return Index(self.path, homes)


def resolve(path: Path) -> Path:
    """The file that a path stands for: itself, or in a folder the index or else the only checkpoint, or the usual one.

    Raises:
        CheckpointError: a folder with neither, or with several, or a path that cannot be looked at.
    """
    try:
        if not path.is_dir():
            return path
        matches = (sorted(path.glob(pattern)) for pattern in PATTERNS)
        found = next(filter(None, matches), [])
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error
    # Beside weights under the name that libraries look for there may be the same in another form.
    usual = [file for file in found if file.name in USUAL_NAMES]
    if len(found) == 1 or usual:
        return usual[0] if usual else found[0]
    if not found:
        raise CheckpointError(
            f"{path}: is a folder without *.safetensors{INDEX_SUFFIX}, a safetensors file or *.bin"
        )
    names = shortlist(file.name for file in found)
    raise CheckpointError(f"{path}: is a folder with several checkpoints, name one: {names}")


def read_index(path: Path) -> Index | None:
    """The index that a path stands for, checked against its shards; None for a checkpoint in one file.

    Raises:
        CheckpointError: a damaged index, one that names other files than safetensors beside it, missing
            shards, or shards that hold other tensors than it says.
    """
    path = resolve(path)
    if not path.name.endswith(INDEX_SUFFIX) or path.name.endswith(PICKLED_INDEX_SUFFIX):
        return None
    index = _index(path, ".safetensors")
    held = {(name, file.name) for file in index.files for name in header.read_header(file)[0]}
    check_homes(index, held)
    return index


def pickled_index(path: Path) -> Index | None:
    """The index of shards that torch.save wrote, if a path stands for one; not checked against their tensors.

    Raises:
        CheckpointError: see `read_index`.
    """
    path = resolve(path)
    return _index(path, ".bin") if path.name.endswith(PICKLED_INDEX_SUFFIX) else None


def _index(path: Path, suffix: str) -> Index:
    index = Index(path, _weight_map(path))
    names = sorted(set(index.homes.values()))
    if elsewhere := [name for name in names if not _is_beside(name, suffix)]:
        kind = suffix.removeprefix(".")
        raise CheckpointError(
            f"{path}: shards must be {kind} files beside the index, not {shortlist(elsewhere)}"
        )
    if missing := [file.name for file in index.files if not file.is_file()]:
        raise CheckpointError(f"{path}: lacks {len(missing)} of {len(names)} shards: {shortlist(missing)}")
    return index


def check_homes(index: Index, held: set[tuple[str, str]]) -> None:
    """See that shards hold the tensors that an index says, given as pairs of tensor and file.

    Raises:
        CheckpointError: they do not, naming which.
    """
    named = set(index.homes.items())
    if held != named:
        wrong = [f"{name} is named but not in {file}" for name, file in sorted(named - held)]
        wrong += [f"{name} in {file} is not named" for name, file in sorted(held - named)]
        raise CheckpointError(f"{index.path}: does not fit its shards: {shortlist(wrong)}")


def _is_beside(name: str, suffix: str) -> bool:
    # A path in an index from elsewhere could name any file of this machine.
    return Path(name).name == name and name.endswith(suffix)


def _weight_map(path: Path) -> dict[str, str]:
    header.check_readable(path)
    try:
        homes = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        if not homes or not all(isinstance(name, str) for name in homes.values()):
            raise ValueError("weight_map must map tensors to files")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({header.brief(error)})") from error
    return dict(homes)


def checkpoint_files(path: Path) -> list[Path]:
    """The files with the tensors of a checkpoint: its shards, or itself."""
    index = read_index(path) or pickled_index(path)
    return index.files if index else [resolve(path)]


def stem(path: Path) -> str:
    """What outputs are named after: a file without its suffix, or the folder of a sharded checkpoint."""
    path = resolve(path)
    return Index(path, {}).name if path.name.endswith(INDEX_SUFFIX) else path.stem


def stored_bytes(path: Path) -> int:
    """Size on disk of a compressed file, or of all shards of a folder."""
    return sum(file.stat().st_size for file in checkpoint_files(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """The `ttcompress` metadata of a compressed file or of a sharded one, parsed.

    Raises:
        CheckpointError: not written by this tool, damaged, or shards of different runs.
    """
    first, *others = checkpoint_files(path)
    parsed = header.read_metadata(first)
    if not others:
        return parsed

    _, expected = header.read_header(first)
    if different := [file.name for file in others if header.read_header(file)[1] != expected]:
        raise CheckpointError(f"{path}: {first.name} and {shortlist(different)} are of different runs")
    return parsed


def encode_index(homes: Mapping[str, str], total_size: int) -> str:
    """The text of an index; `total_size` is the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(homes)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
