"""Folders of the transformers library as networks, with what they say of texts and images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from ttcompress.errors import shortlist
from ttcompress.files.checkpoint import Checkpoint, load_checkpoint
from ttcompress.files.header import blaming
from ttcompress.files.model_folder import ModelFolder
from ttcompress.files.tensors import aligned
from ttcompress.networks import transformers_models
from ttcompress.networks.reader import Reader
from ttcompress.networks.text_reading import reader_of
from ttcompress.records.report import Architecture


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
    return Opened(model, model.state_dict(), typed, checkpoint)


@cache
def _say(note: str) -> None:
    logging.getLogger("ttcompress").warning("ttcompress: %s", note)


def known_reader(model: nn.Module, architecture: Architecture | None, path: Path) -> Reader | None:
    """How a network reads text, by the files beside it; None where it is of no such library, or reads none."""
    if architecture is None or architecture.kind != "transformers":
        return None
    return reader_of(model, architecture, path if path.is_dir() else path.parent)
