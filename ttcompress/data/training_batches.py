"""Training batches: shuffled, sharded over processes, augmented and normalised on their device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ttcompress.data.augment import draws, flipped, shifted, shifts
from ttcompress.data.sets import Images
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing


class TrainingBatches(Protocol):
    """What a training runs on: epochs of batches (images, labels or None) on the device."""

    @property
    def batch_size(self) -> int:
        """Images of a full batch."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""

    def mean_count(self, images: Tensor) -> float:
        """How many images the batches of one process have on average, for a batch like this one."""

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The batches of an epoch, from batch `start` on."""


@dataclass(frozen=True)
class LoaderBatches:
    """The user's own batches, such as a DataLoader: (inputs, labels) or inputs alone, in the order that they come."""

    loader: Iterable[Any]
    device: torch.device

    @property
    def batch_size(self) -> int:
        """As the loader says, for the speed that is shown."""
        return int(getattr(self.loader, "batch_size", None) or 1)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        if not isinstance(self.loader, Sized) or not len(self.loader):
            raise DataError("train_loader must have a length above 0, as lists and DataLoaders have")
        return len(self.loader)

    def mean_count(self, images: Tensor) -> float:
        """Of this very batch: the last one may be smaller."""
        return float(len(images))

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield floating-point inputs in float32 and labels (N,) or None, on the device."""
        for batch in islice(self.loader, start, None):
            inputs, labels = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
            inputs = inputs.to(self.device)
            yield (
                inputs.float() if inputs.is_floating_point() else inputs,
                None if labels is None else labels.to(self.device),
            )


@dataclass(frozen=True)
class Stream:
    """A training set as epochs of `steps` global batches, of which process `rank` of `size` gets its share.

    What a batch holds depends on the seed, the epoch and its number, never on the number of processes or on where in
    an epoch one begins. `augmentation` is `none`, `shift`, or `flip`, which also shifts; images of folders, where any
    is on, are cut out instead of shifted.
    """

    images: Images
    preprocessing: Preprocessing
    batch_size: int
    seed: int
    device: torch.device
    augmentation: str = "flip"
    workers: int = 0
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        """See that every process has images in every batch.

        Raises:
            DataError: more processes than images in a batch.
        """
        if self.size > min(self.batch_size, len(self.images)):
            raise DataError(f"{self.images.name}: {self.size} processes cannot share {len(self.images)} images")

    @property
    def steps(self) -> int:
        """Batches an epoch; the last images of the epoch's order that fill no batch wait for another epoch."""
        return max(1, len(self.images) // self.batch_size)

    def mean_count(self, images: Tensor) -> float:
        """How many images a batch of one process has on average.

        Gradients are averaged over processes, whose shares of a small set may differ by an image.
        """
        return min(self.batch_size, len(self.images)) / self.size

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (float32 images (N, C, H, W), labels (N,) or None) on the device, from batch `start` on."""
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, number], dtype=np.uint64)))
        order = generator.permutation(len(self.images))
        shares = [
            order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.size]
            for step in range(start, self.steps)
        ]
        parts = [(share, draws(self.seed, number, share)) for share in shares]
        cuts = self.augmentation != "none"
        batches = self.images.training_batches(self.preprocessing, parts, self.workers, cuts)
        for (_, numbers), (pixels, labels) in zip(parts, batches, strict=True):
            batch = self._augmented(pixels.to(self.device), numbers)
            yield self._normalised(batch), None if labels is None else labels.to(self.device)

    def _augmented(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        if self.augmentation == "flip":
            pixels = flipped(pixels, numbers[:, 0] < 0.5)
        if self.augmentation != "none" and not self.images.cuts:
            down, right = (shifts(numbers[:, 1 + axis], pixels.shape[2 + axis]) for axis in range(2))
            pixels = shifted(pixels, down, right)
        return pixels

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (pixels.float() / 255 - mean) / std
