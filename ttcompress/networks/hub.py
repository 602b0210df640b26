"""Folders of the transformers library and of timm as networks, with what they say of texts and images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttcompress.errors import shortlist
from ttcompress.files.checkpoint import Checkpoint, load_checkpoint
from ttcompress.files.header import blaming
from ttcompress.files.model_folder import ModelFolder, read_json
from ttcompress.files.tensors import aligned
from ttcompress.networks import timm_models, transformers_models
from ttcompress.networks.reader import Reader
from ttcompress.networks.text_reading import reader_of
from ttcompress.records.report import Architecture, Preprocessing


@dataclass(frozen=True)
class Opened:
    """A network of a folder, with its weights as the library names and ties them."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    checkpoint: Checkpoint


def open_folder(folder: ModelFolder, key: str = "") -> Opened:
    """The network of a folder, filled by the library with tensors that were read by us.

    Raises:
        ArchitectureError: the library does not have it, or it needs code of its own.
        CheckpointError: weights that cannot be read or do not fit.
    """
    named = transformers_models.architecture(folder.name, folder.config, folder.generation)
    checkpoint = load_checkpoint(folder.weights, key, exact=True)
    with blaming(folder.weights):
        tensors = {name: aligned(tensor) for name, tensor in checkpoint.tensors.items()}
        model, typed, unused = transformers_models.load(named, tensors)
    if unused:
        _say(f"{folder.path}: leaves out {shortlist(unused)}, which {folder.name} does not have")
    checkpoint = replace(checkpoint, source={**checkpoint.source, "file": folder.title})
    return Opened(model, model.state_dict(), typed, checkpoint)


@cache
def _say(note: str) -> None:
    logging.getLogger("ttcompress").warning("ttcompress: %s", note)


def known_reader(model: nn.Module, architecture: Architecture | None, path: Path) -> Reader | None:
    """How a network reads text, by the files beside it; None where it is of no such library, or reads none."""
    if architecture is None or architecture.kind != "transformers":
        return None
    return reader_of(model, architecture, path if path.is_dir() else path.parent)


def known_architecture(model: nn.Module) -> Architecture | None:
    """How a network in memory is built, where it is of a class of the transformers library itself."""
    if not type(model).__module__.startswith("transformers.models."):
        return None
    return transformers_models.architecture_of(model)


def save(model: nn.Module, architecture: Architecture, folder: Path) -> None:
    """Write a dense network into a folder that its library loads.

    Raises:
        CheckpointError: the library does not save it.
    """
    if architecture.kind == "timm":
        timm_models.save(model, architecture, folder)
    else:
        transformers_models.save(model, folder)


def timm_architecture(folder: ModelFolder) -> Architecture:
    """The network of timm that a folder names.

    Raises:
        ArchitectureError: timm is not installed, does not have it, or would have to load something for it.
    """
    return timm_models.architecture(folder.name, folder.config)


def image_preprocessing(folder: Path) -> Preprocessing | None:
    """How a folder of the transformers library says that images are prepared, where it is a resize, a crop and a scale.

    Raises:
        CheckpointError: preprocessor_config.json cannot be read.
    """
    config = read_json(folder / "preprocessor_config.json")
    if not config or not config.get("do_normalize", True) or not config.get("do_rescale", True):
        return None
    mean, std = (_numbers(config.get(key)) for key in ("image_mean", "image_std"))
    sides, crop = _sides(config.get("size")), _sides(config.get("crop_size"))
    if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0 or not sides:
        return None
    if config.get("do_center_crop") and crop:
        return Preprocessing(mean, std, (len(mean), *crop), min(sides))
    return Preprocessing(mean, std, (len(mean), *sides), min(sides))


def _numbers(value: Any) -> tuple[float, ...]:
    known = value if isinstance(value, list) else []
    return tuple(float(each) for each in known if isinstance(each, int | float))


def _sides(value: Any) -> tuple[int, int] | None:
    """Height and width, both the same where a number or the shorter edge is all that is said."""
    if isinstance(value, dict):
        value = value.get("shortest_edge") or [value.get("height"), value.get("width")]
    pair = value if isinstance(value, list) else [value, value]
    is_known = len(pair) == 2 and all(isinstance(side, int) and 0 < side <= 2**13 for side in pair)
    return (pair[0], pair[1]) if is_known else None
