"""Unlabelled images to calibrate on: drawn by the seed, some of them held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ttcompress.calibrate.room import Room
from ttcompress.errors import DataError
from ttcompress.networks.answers import Answer, plain_answer

DEFAULT_IMAGES = 1024
LEAST_IMAGES = 16
SEEDS = 2**64
"""How many seeds torch takes."""
HELD_OUT = 8
"""One image in so many decides instead of being learned from."""


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images as batches of network input, on the CPU; any inputs count as images here.

    `fitting(number)` gives the `num_images` to learn from, in another order for every number; `held_out()`
    those that decide. `answer` is what of the network's output is to stay as it is, `room` how many pass through
    the network at a time, where that is less than a batch, `unit` what reports call what is counted.
    """

    name: str
    num_images: int
    num_held_out: int
    fitting: Callable[[int], Iterable[Any]]
    held_out: Callable[[], Iterable[Any]]
    answer: Answer = plain_answer
    unit: str = "images"
    room: Room | None = None

    def mapped(self, change: Callable[[Any], Any]) -> Calibration:
        """The same images with every batch changed when it is read."""
        return replace(
            self,
            fitting=lambda number: map(change, self.fitting(number)),
            held_out=lambda: map(change, self.held_out()),
        )

    def pieces(self, batch: Any, gradients: bool = True) -> list[Any]:
        """A batch in the pieces in which it passes through the network, with gradients or without."""
        return [batch] if self.room is None else self.room.pieces(batch, gradients)


def draw_calibration(
    name: str,
    available: int,
    asked: int | None,
    seed: int,
    batches: Callable[[Sequence[int]], Iterable[Any]],
) -> Calibration:
    """Calibration on `asked` of the available images, drawn by the seed.

    `batches(indices)` reads the images at those indices.

    Raises:
        DataError: too few images.
    """
    wanted = min(available, DEFAULT_IMAGES) if asked is None else asked
    if wanted > available:
        raise DataError(f"{name} has {available:,} images, --calib-images asks for {wanted:,}")
    if wanted < LEAST_IMAGES:
        raise DataError(f"{name}: calibration needs at least {LEAST_IMAGES} images, not {wanted}")

    drawn = _permutation(available, seed)[:wanted]
    num_held_out = wanted // HELD_OUT
    held_out, fitting = drawn[:num_held_out], drawn[num_held_out:]

    def shuffled(number: int) -> Iterable[Any]:
        # A factor so large that other seeds never meet the same numbers.
        order = _permutation(len(fitting), (seed * 1_000_003 + number) % SEEDS)
        return batches(fitting[order].tolist())

    return Calibration(name, len(fitting), len(held_out), shuffled, lambda: batches(held_out.tolist()))


def _permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
