"""Training batches: shuffled, sharded over processes, augmented and normalised on their device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.data.augment import flipped, random_numbers, shifted, shifts
from ttcompress.data.sets import Batch, Images, SampledBatch
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing


@dataclass(frozen=True)
class Stream:
    """A training set as epochs of `steps` global batches, of which process `rank` of `size` gets its share.

    What a batch holds depends on the seed, the epoch and its number, never on the number of processes or on
    where in an epoch one begins. `augmentation` is `none`, `shift`, or `flip`, which also shifts; images of
    folders, where any is on, are cropped at random instead of shifted.
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
        """Batches an epoch; the last images of its order that fill no batch wait for another epoch."""
        return max(1, len(self.images) // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield (float32 images (N, C, H, W), labels (N,) or None) on the device, from batch `start` on."""
        sampled = [self._sampled(number, indices) for indices in self._shares(number, start)]
        random_crop = self.augmentation != "none"
        batches = self.images.training_batches(self.preprocessing, sampled, self.workers, random_crop)
        for (_, numbers), (pixels, labels) in zip(sampled, batches, strict=True):
            augmented = self._augmented(pixels.to(self.device), numbers)
            yield self._normalised(augmented), None if labels is None else labels.to(self.device)

    def _shares(self, epoch: int, start: int) -> Iterator[NDArray[np.int64]]:
        """Indices of this process's images in each batch of an epoch, from batch `start` on."""
        key = np.array([self.seed, epoch], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        order = generator.permutation(len(self.images))
        for step in range(start, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[self.rank :: self.size]

    def _sampled(self, epoch: int, indices: NDArray[np.int64]) -> SampledBatch:
        return indices, random_numbers(self.seed, epoch, indices)

    def _augmented(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        if self.augmentation == "flip":
            pixels = flipped(pixels, numbers[:, 0] < 0.5)
        if self.augmentation != "none" and not self.images.crops_randomly:
            height, width = pixels.shape[2:]
            down = shifts(numbers[:, 1], height)
            right = shifts(numbers[:, 2], width)
            pixels = shifted(pixels, down, right)
        return pixels

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean = torch.tensor(self.preprocessing.mean, device=self.device).view(1, -1, 1, 1)
        std = torch.tensor(self.preprocessing.std, device=self.device).view(1, -1, 1, 1)
        return (pixels.float() / 255 - mean) / std
