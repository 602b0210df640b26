"""Reading state dicts that torch.save wrote: tensors and plain containers, never a Python object."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import check_readable
from ttcompress.files.pickled import check_tuples

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "model_state", "module")
"""Names under which trainers keep the state dict of a network, also one in the other."""
DEPTH = 3
"""How many names deep state dicts are looked for to be named in messages."""
EXTRA_STATE = "_extra_state"
"""What modules add to a state dict by `get_extra_state`: any object."""
FREE_BYTES, EXPANSION = 2**30, 100
"""What a file may stand for: a gibibyte, or where this is more so many times its own size."""


@dataclass(frozen=True)
class StateDict:
    """The state dict of a file, under which dotted `key`, and what else the file holds of the kind.

    `dropped` are entries of it that are no tensors, and belong to modules alone.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def read_state_dict(path: Path, key: str) -> StateDict:
    """The tensors of a file that torch.save wrote; nothing that it holds is ever run.

    Args:
        path: a bare state dict, or a dict that holds one.
        key: which entry holds it, with dots between the names of entries in entries; needed only where there are
            several.

    Raises:
        CheckpointError: damaged or unsafe file, no state dict in it or several, a tensor of an unsupported
            kind.
    """
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")

    found, state = _chosen(path, content, key)
    candidates = [name for name in _state_dicts(content) if name != found]
    dropped = [name for name, value in state.items() if _is_extra(name) and not isinstance(value, Tensor)]
    state = {name: value for name, value in state.items() if name not in dropped}
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        what = f"entries that are no tensors: {shortlist(others)}" if others else "nothing"
        hint = (
            f"; choose with {' or '.join(f'--key {name}' for name in candidates[:6])}" if candidates else ""
        )
        raise CheckpointError(f"{path}: no state dict found; it holds {what}{hint}")

    tensors = {str(name): tensor.detach() for name, tensor in state.items()}
    if len(tensors) < len(state):
        raise CheckpointError(f"{path}: some of its tensors are called alike, as 1 and '1' are")
    if unsupported := [name for name, tensor in tensors.items() if not _is_plain(tensor)]:
        raise CheckpointError(
            f"{path}: sparse, quantized and meta tensors are not supported: {shortlist(unsupported)}"
        )
    _check_expansion(path, tensors)
    return StateDict(tensors, found, tuple(candidates), tuple(map(str, dropped)))


def _chosen(path: Path, content: Mapping[Any, Any], key: str) -> tuple[str, Mapping[Any, Any]]:
    """The dict under the key, or under the one usual name there is, or else the whole; and its dotted name."""
    state = _at(content, key) if key else content
    if not isinstance(state, Mapping):
        names = [*_state_dicts(content)] or content
        raise CheckpointError(f"{path}: holds no dict {key!r}; it has {shortlist(names)}")

    while found := [name for name in WRAPPERS if isinstance(state.get(name), Mapping)]:
        if len(found) > 1:
            names = [_joined(key, name) for name in found]
            raise CheckpointError(
                f"{path}: holds several state dicts: {', '.join(names)}; choose one with --key"
            )
        key, state = _joined(key, found[0]), state[found[0]]
    return key, state


def _at(content: Any, key: str) -> Any:
    """What a dict holds under a dotted name, some of whose dots may be of the names themselves."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    dots = [at for at, letter in enumerate(key) if letter == "."]
    inside = (_at(content.get(key[:at]), key[at + 1 :]) for at in dots)
    return next((value for value in inside if value is not None), None)


def _state_dicts(content: Mapping[Any, Any], above: str = "", depth: int = DEPTH) -> Iterator[str]:
    """Dotted names of the dicts in a dict that hold tensors alone; what optimizers keep is left out."""
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping) or "optim" in name.lower():
            continue
        held = [each for own, each in value.items() if not _is_extra(own)]
        if held and all(isinstance(each, Tensor) for each in held):
            yield _joined(above, name)
        elif depth > 1:
            yield from _state_dicts(value, _joined(above, name), depth - 1)


def _joined(above: str, name: str) -> str:
    return f"{above}.{name}" if above else name


def _is_extra(name: object) -> bool:
    return str(name).rpartition(".")[2] == EXTRA_STATE


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _check_expansion(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """See that tensors do not stand for far more than the file holds: a view may repeat one number a billion times."""
    limit = _limit(path)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    if total > limit:
        largest = max(sizes, key=sizes.__getitem__)
        raise CheckpointError(
            f"{path}: stands for {total:,} bytes, {sizes[largest]:,} of them in {largest}, where at most {limit:,} are "
            f"read from a file of this size: views that repeat their numbers; save copies of them"
        )


def _limit(path: Path) -> int:
    return max(FREE_BYTES, EXPANSION * path.stat().st_size)


# ------------------------------------------------------------------------------------------------------------ the file


def _load_pickle(path: Path) -> Any:
    """torch.load, tensors and plain containers only: weights_only is never given up."""
    check_readable(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_archive(path)
    _check_magic(path)
    check_tuples(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip and _is_stored(path))
        except Exception as error:
            raise CheckpointError(f"{path}: {_problem_of(str(error))}") from error


def _problem_of(text: str) -> str:
    # Torch says in its message alone that a pickle names an object, and which.
    unsafe = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|function) ([\w.]+)", text)
    if unsafe:
        return (
            f"holds Python objects ({unsafe[1]}), which could run code and are never loaded; "
            "save only the tensors: torch.save(model.state_dict(), ...)"
        )
    # Before what it stumbled over, torch says at length how to load what is not safe.
    stumbled = re.search(r"WeightsUnpickler error:\s*(.+)", text)
    reason = stumbled[1] if stumbled else text.partition("\n")[0]
    return f"truncated, damaged, or not a checkpoint ({reason[:100] or 'unreadable'})"


def _check_archive(path: Path) -> None:
    """See that an archive is one of torch.save, and does not unpack to far more than it is.

    Raises:
        CheckpointError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: truncated, damaged, or not a checkpoint ({error})") from error

    names = [entry.filename.partition("/")[2] for entry in entries]
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(
            f"{path}: is a TorchScript file, which holds a program; "
            "save its tensors: torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    if "data.pkl" not in names and any(name.startswith(("archive_format", "models/")) for name in names):
        raise CheckpointError(
            f"{path}: is a file of torch.export, which holds a program; "
            "save its tensors: torch.save(torch.export.load(...).state_dict, ...)"
        )
    unpacked, limit = sum(entry.file_size for entry in entries), _limit(path)
    if unpacked > limit:
        raise CheckpointError(
            f"{path}: unpacks to {unpacked:,} bytes, at most {limit:,} are read from such a file"
        )


def _is_stored(path: Path) -> bool:
    """Whether the tensors of an archive are in it as they are, as torch.save puts them there, and can be mapped."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


MAGIC = {
    b"GGUF": "a GGUF file, whose weights are quantized; convert the checkpoint that it was made of",
    b"\x89HDF": "an HDF5 file, as Keras writes; only checkpoints of PyTorch are read",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with: git lfs pull",
    b"<!DOCTYPE": "a web page, not a checkpoint; download the file itself",
}
"""What files that are no checkpoints begin with, and what they are."""


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(32)
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise CheckpointError(f"{path}: is {what}")
