"""State dicts out of pickled checkpoints: tensors and plain containers, never a Python object."""

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
        CheckpointError: damaged or unsafe file, no state dict in it or several, a tensor of an unsupported kind.
    """
    loaded = _load_pickle(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    found = [name for name in ([key] if key else WRAPPERS) if isinstance(loaded.get(name), Mapping)]
    if key and not found:
        raise CheckpointError(f"{path}: holds no dict {key!r}; it has {shortlist(loaded)}")
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds several state dicts: {', '.join(found)}; choose one with --key")
    state = loaded[found[0]] if found else loaded
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        what = f"entries that are no tensors: {shortlist(others)}" if others else "nothing"
        raise CheckpointError(f"{path}: no state dict found; it holds {what}")
    if odd := [name for name, tensor in state.items() if _is_odd(tensor)]:
        raise CheckpointError(f"{path}: sparse, quantized and meta tensors are not supported: {shortlist(odd)}")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _is_odd(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta


def _load_pickle(path: Path) -> Any:
    """torch.load, tensors and plain containers only: weights_only is never given up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            text = str(error)
    if unsafe := re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|function) ([\w.]+)", text):
        raise CheckpointError(
            f"{path}: holds Python objects ({unsafe[1]}), which could run code and are never loaded; "
            "save only the tensors: torch.save(model.state_dict(), ...)"
        )
    raise CheckpointError(
        f"{path}: truncated, damaged, or not a checkpoint ({text.splitlines()[0][:100] if text else 'unreadable'})"
    )
