"""Training batches: shuffled, sharded over processes, augmented and normalised on their device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.data.augment import CROP, flipped, random_numbers, shifted, shifts
from ttcompress.data.resident import Normalisation, Resident, resident
from ttcompress.data.sending import sent
from ttcompress.data.sets import Batch, Images, SampledBatch
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing


class TrainingBatches(Protocol):
    """What a training runs on: epochs of batches (inputs, labels or None) on the device."""

    @property
    def batch_size(self) -> int:
        """Images of a full batch."""

    @property
    def steps(self) -> int:
        """Batches an epoch."""

    @property
    def sample(self) -> tuple[Any, Tensor | None]:
        """A batch to try things on, which takes none from the training."""

    def mean_count(self, images: Any) -> float:
        """How many inputs the batches of one process have on average, for a batch like this one."""

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Any, Tensor | None]]:
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
        if not isinstance(self.loader, Sized):
            raise DataError("train_loader must have a length, as lists and DataLoaders have")
        return len(self.loader)

    @cached_property
    def sample(self) -> tuple[Tensor, Tensor | None]:
        """The first batch that the loader gives, asked for once: to ask may draw random numbers of the user's."""
        return next(self.epoch(0))

    def mean_count(self, images: Tensor) -> float:
        """Of this very batch: the last one may be smaller."""
        return float(len(images))

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield floating-point inputs in float32 and labels (N,) or None, on the device."""
        for batch in islice(self.loader, start, None):
            inputs, labels = self._parts(batch)
            inputs = sent(inputs, self.device)
            if inputs.is_floating_point():
                inputs = inputs.float()
            yield inputs, None if labels is None else sent(labels, self.device)

    @staticmethod
    def _parts(batch: Any) -> tuple[Tensor, Tensor | None]:
        parts = batch if isinstance(batch, list | tuple) else [batch]
        if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise DataError(f"train_loader must give batches of inputs and labels as tensors, not ({kinds})")
        return parts[0], parts[1] if len(parts) == 2 else None


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
            raise DataError(
                f"{self.images.name}: {self.size} processes cannot share {len(self.images)} images"
            )

    @property
    def steps(self) -> int:
        """Batches an epoch; the last images of its order that fill no batch wait for another epoch."""
        return max(1, len(self.images) // self.batch_size)

    @property
    def sample(self) -> Batch:
        """The first batch of all, read by this process alone."""
        here = replace(self, workers=0) if self.workers else self
        return next(here.epoch(0))

    def mean_count(self, images: Tensor) -> float:
        """How many images a batch of one process has on average.

        Gradients are averaged over processes, whose shares of a small set may differ by an image.
        """
        return min(self.batch_size, len(self.images)) / self.size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield (float32 images (N, C, H, W), labels (N,) or None) on the device, from batch `start` on."""
        if self._resident is not None:
            yield from self._epoch_of(self._resident, number, start)
            return

        sampled = [self._sampled(number, indices) for indices in self._shares(number, start)]
        random_crop = self.augmentation != "none"
        batches = self.images.training_batches(self.preprocessing, sampled, self.workers, random_crop)
        for (_, numbers), (pixels, labels) in zip(sampled, batches, strict=True):
            augmented = self._augmented(sent(pixels, self.device), numbers)
            yield self._normalised(augmented), None if labels is None else sent(labels, self.device)

    def _epoch_of(self, there: Resident, number: int, start: int) -> Iterator[Batch]:
        """The same of a set that is on the device, to which one transfer tells what an epoch takes."""
        shares = [*self._shares(number, start)]
        if not shares:
            return
        indices = np.concatenate(shares)
        places = sent(torch.from_numpy(indices), self.device)
        numbers = sent(random_numbers(self.seed, number, indices), self.device)

        sizes = [len(share) for share in shares]
        parts = (torch.split(each, sizes) for each in (places, numbers))
        for own_places, own_numbers in zip(*parts, strict=True):
            pixels, labels = there.batch(own_places)
            yield self._normalised(self._augmented(pixels, own_numbers)), labels

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
            pixels = shifted(pixels, down, right, max(height, width) // CROP)
        return pixels

    @cached_property
    def _resident(self) -> Resident | None:
        """The images where they are on the device, sent there once."""
        return resident(self.images, self.preprocessing, self.device)

    @cached_property
    def _normalised(self) -> Normalisation:
        return Normalisation.of(self.preprocessing, self.device)
