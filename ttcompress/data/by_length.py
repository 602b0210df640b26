"""Samples of different lengths: batches of one length, so that no padding is left, and what a mask says of lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASK = "attention_mask"
"""The input that says, by 1 and 0, which positions of a sample are no padding."""


def batches_of_one_length(
    indices: Iterable[int], lengths: Sequence[int], most: int | Callable[[int], int]
) -> Iterator[list[int]]:
    """Batches of indices of equal length, each in the order given; batches come in the order of their first index.

    Args:
        lengths: of the sample at every index.
        most: samples in a batch, or how many there may be at a length.

    >>> list(batches_of_one_length([3, 0, 1, 2], lengths=[5, 7, 5, 7], most=2))
    [[3, 1], [0, 2]]
    """
    batches: list[list[int]] = []
    filling: dict[int, list[int]] = {}

    for index in indices:
        length = lengths[index]
        size = most(length) if callable(most) else most
        batch = filling.get(length)
        if batch is None or len(batch) >= size:
            batch = filling[length] = []
            batches.append(batch)
        batch.append(index)
    return iter(batches)


def lengths_of(mask: Tensor) -> list[int] | None:
    """The length of each sample of a mask (N, L) of ones and zeros, where what is masked is padding on the right.

    None of any other mask: one with holes, padding on the left, a sample that is masked altogether.

    >>> lengths_of(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    [2, 3]
    >>> lengths_of(torch.tensor([[0, 1, 1]])) is None
    True
    """
    if mask.dim() != 2 or mask.numel() == 0:
        return None

    ones = mask != 0
    lengths = ones.sum(1)
    on_the_left = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    is_padding = bool((ones == on_the_left).all()) and bool((mask[ones] == 1).all())
    return lengths.tolist() if is_padding and int(lengths.min()) > 0 else None


def cut_to(inputs: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A batch of named inputs without the positions from `length` on: of every tensor as long as the mask is."""
    width = inputs[MASK].shape[1]

    def cut(value: Any) -> Any:
        is_sequence = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == width
        return value[:, :length] if is_sequence else value

    return {name: cut(value) for name, value in inputs.items()}
