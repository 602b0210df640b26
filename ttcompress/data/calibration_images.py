"""Unlabelled images to calibrate on: drawn by the seed, some of them held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ttcompress.errors import DataError

DEFAULT_IMAGES = 1024


LEAST_IMAGES = 16


HELD_OUT = 8
"""One image in so many decides instead of being learned from."""


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images as batches of network input, on the CPU.

    `fitting(number)` gives the `num_images` to learn from, in another order for every number; `held_out()` those that
    decide.
    """

    name: str
    num_images: int
    num_held_out: int
    fitting: Callable[[int], Iterable[Tensor]]
    held_out: Callable[[], Iterable[Tensor]]

    def cast(self, dtype: torch.dtype) -> Calibration:
        """The same images in another type; whole numbers, such as tokens, stay as they are."""

        def each(batches: Iterable[Tensor]) -> Iterator[Tensor]:
            return (batch.to(dtype) if batch.is_floating_point() else batch for batch in batches)

        return replace(self, fitting=lambda number: each(self.fitting(number)), held_out=lambda: each(self.held_out()))


def draw(
    name: str, available: int, asked: int | None, seed: int, batches: Callable[[Sequence[int]], Iterable[Tensor]]
) -> Calibration:
    """Calibration on `asked` of the available images, drawn by the seed; `batches(indices)` reads those at `indices`.

    Raises:
        DataError: too few images.
    """
    wanted = min(available, DEFAULT_IMAGES) if asked is None else asked
    if wanted > available:
        raise DataError(f"{name} has {available:,} images, --calib-images asks for {wanted:,}")
    if wanted < LEAST_IMAGES:
        raise DataError(f"{name}: calibration needs at least {LEAST_IMAGES} images, not {wanted}")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    held_out, fitting = order[: wanted // HELD_OUT], order[wanted // HELD_OUT :]

    def shuffled(number: int) -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return batches(fitting[torch.randperm(len(fitting), generator=generator)].tolist())

    return Calibration(name, len(fitting), len(held_out), shuffled, lambda: batches(held_out.tolist()))
