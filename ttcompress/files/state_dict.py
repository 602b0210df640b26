"""Reading state dicts that torch.save wrote: tensors and plain containers, never a Python object."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema")


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; nothing that it holds is ever run.

    Args:
        path: a bare state dict, or a dict that holds one.
        key: which entry holds it; needed only where there are several.

    Raises:
        CheckpointError: damaged or unsafe file, no state dict in it or several, a tensor of an unsupported
            kind.
    """
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")

    state = _unwrapped(path, content, key)
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        what = f"entries that are no tensors: {shortlist(others)}"
        raise CheckpointError(f"{path}: no state dict found; it holds {what}")
    if not state:
        raise CheckpointError(f"{path}: no state dict found; it holds nothing")

    if unsupported := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise CheckpointError(f"{path}: sparse, quantized and meta tensors are not supported: {shortlist(unsupported)}")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _unwrapped(path: Path, content: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    """The dict under the key, or under the one usual name there is, else the whole."""
    names = [key] if key else WRAPPERS
    found = [name for name in names if isinstance(content.get(name), Mapping)]
    if key and not found:
        raise CheckpointError(f"{path}: holds no dict {key!r}; it has {shortlist(content)}")
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds several state dicts: {', '.join(found)}; choose one with --key")
    return content[found[0]] if found else content


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta


def _load_pickle(path: Path) -> Any:
    """torch.load, tensors and plain containers only: weights_only is never given up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            text = str(error)

    # Torch says in its message alone that a pickle names an object, and which.
    unsafe = re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|function) ([\w.]+)", text)
    if unsafe:
        raise CheckpointError(
            f"{path}: holds Python objects ({unsafe[1]}), which could run code and are never loaded; "
            "save only the tensors: torch.save(model.state_dict(), ...)"
        )
    reason = text.splitlines()[0][:100] if text else "unreadable"
    raise CheckpointError(f"{path}: truncated, damaged, or not a checkpoint ({reason})")
