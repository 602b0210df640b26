"""Samples of several inputs: arrays of an npz file by the names that the network gives its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.data.by_length import MASK, batches_of_one_length, cut_to, lengths_of
from ttcompress.data.opening import IMAGES, LABELS, npz_content, npz_file, npz_names
from ttcompress.errors import DataError, shortlist

KIND = "npz"


@dataclass(frozen=True)
class NamedArrays:
    """Samples in a fixed order: a row of every input each, and a class number where there are labels."""

    name: str
    inputs: Mapping[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def names_inputs(reference: str) -> bool:
    """Whether a data reference is an npz file whose arrays are inputs by name; one with `images` holds images.

    Raises:
        DataError: an npz file that cannot be read.
    """
    kind, _, path = reference.partition(":")
    return kind == KIND and bool(path) and IMAGES not in npz_names(npz_file(path))


def open_named_arrays(reference: str) -> NamedArrays:
    """Open `npz:FILE`: whole numbers as int64, others as float32; `labels`, if there are any, are no input.

    Raises:
        DataError: arrays of another kind or of different lengths, NaN or Inf, or none.
    """
    file = npz_file(reference.partition(":")[2])
    content = npz_content(file)
    labels = content.pop(LABELS, None)
    if not content:
        raise DataError(f"{file} holds no array that could be an input")

    lengths = {name: array.shape[0] if array.ndim else 0 for name, array in content.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = shortlist(f"{name} {array.shape}" for name, array in content.items())
        raise DataError(
            f"{file}: every input has as many rows as there are samples, at least one, not {listed}"
        )
    count = next(iter(lengths.values()))
    inputs = {name: _tensor(array, name, file) for name, array in content.items()}
    return NamedArrays(
        f"{KIND}:{file.name}", inputs, None if labels is None else _classes(labels, count, file)
    )


def _tensor(array: NDArray[Any], name: str, file: Path) -> Tensor:
    if array.dtype == np.bool_:
        return torch.from_numpy(array)
    if np.issubdtype(array.dtype, np.integer):
        return torch.from_numpy(array.astype(np.int64))
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{file}: {name} is {array.dtype}, not whole or floating-point numbers")
    if not np.isfinite(array).all():
        raise DataError(f"{file}: {name} holds NaN or Inf")
    with np.errstate(over="ignore"):
        found = torch.from_numpy(array.astype(np.float32))
    if not bool(found.isfinite().all()):
        raise DataError(f"{file}: {name} holds numbers that float32 does not")
    return found


def _classes(labels: NDArray[Any], count: int, file: Path) -> Tensor:
    if (
        labels.shape != (count,)
        or not np.issubdtype(labels.dtype, np.integer)
        or (count and labels.min() < 0)
    ):
        raise DataError(f"{file}: labels are one whole number, 0 or above, for each of the {count} samples")
    return torch.from_numpy(labels.astype(np.int64))


# ------------------------------------------------------------------------------------------------------------- batches


def batches_in_length(
    inputs: Any, rows: Callable[[Any, Tensor], Any], size: int
) -> Callable[[Sequence[int]], Iterator[tuple[list[int], Any]]]:
    """What gives batches of inputs for indices: those indices that are in a batch, and their rows.

    Where an input is a mask of padding on the right, batches are of samples of one length and cut to it, so that no
    padding is left. Other masks, with holes or with padding on the left, stay as they are, and all that is masked.

    Args:
        inputs: all samples: a tensor, or a mapping or a sequence of several.
        rows: what gives the rows of all inputs at these indices.
    """
    mask = inputs.get(MASK) if isinstance(inputs, Mapping) else None
    lengths = lengths_of(mask) if isinstance(mask, Tensor) else None

    def batches(indices: Sequence[int]) -> Iterator[tuple[list[int], Any]]:
        if lengths is None:
            for start in range(0, len(indices), size):
                chosen = list(indices[start : start + size])
                yield chosen, rows(inputs, torch.tensor(chosen))
            return
        for chosen in batches_of_one_length(indices, lengths, size):
            yield chosen, cut_to(rows(inputs, torch.tensor(chosen)), lengths[chosen[0]])

    return batches
