"""What every set of images can do: batches of normalised images, labelled or not, in a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing

Pixels = NDArray[np.uint8]
Batch = tuple[Tensor, Tensor | None]
SampledBatch = tuple[NDArray[np.int64], Tensor]
"""Indices (N,) of the images of a training batch, and random numbers (N, NUMBERS_PER_IMAGE) of augment.py."""


class Images(ABC):
    """A set of images in fixed order, labelled or not.

    `name` is the reference without directories, `image_size` (C, H, W) where all images share it, and labels
    lie in 0 ... `num_classes` - 1; `class_names` are what they mean, where that is known.
    """

    def __init__(self, name: str, num_classes: int | None, image_size: tuple[int, int, int] | None) -> None:
        self.name = name
        self.num_classes = num_classes
        self.image_size = image_size
        self.class_names: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether batches carry labels."""
        return self.num_classes is not None

    def require_labels(self) -> None:
        """Refuse a set without labels where accuracy is to be measured or trained for.

        Raises:
            DataError: there are no labels.
        """
        if not self.labelled:
            raise DataError(
                f"{self.name} has no labels, which are needed here: only --calib takes unlabelled images"
            )

    def batches(
        self, preprocessing: Preprocessing, batch_size: int, limit: int | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield (float32 images (N, C, H, W), int64 labels (N,) or None) on the CPU, of the first `limit`.

        Images are scaled to [0, 1] and normalised. Those of folders are also resized (shorter side) and
        centre cropped by `workers` processes; others keep their size.

        Raises:
            DataError: `preprocessing` is for another number of channels, or an image cannot be read.
        """
        self._check_normalisation(preprocessing)
        count = len(self) if limit is None else min(limit, len(self))
        mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
        std = torch.tensor(preprocessing.std).view(1, -1, 1, 1)
        # A generator expression, not a generator: what is checked above is refused at once.
        raw = self._raw_batches(preprocessing, batch_size, count, workers)
        return (((_scaled(pixels) - mean) / std, labels) for pixels, labels in raw)

    def training_batches(
        self,
        preprocessing: Preprocessing,
        sampled: Sequence[SampledBatch],
        workers: int = 0,
        random_crop: bool = True,
    ) -> Iterator[Batch]:
        """Yield (uint8 images (N, C, H, W), int64 labels (N,) or None) on the CPU, for each sampled batch.

        By the random numbers, images of folders are cropped and resized to the network's input size; without
        `random_crop` they are resized and cropped as for evaluation. Those of other sets are as they are.
        Those of folders are read by `workers` processes.

        Raises:
            DataError: `preprocessing` is for another number of channels, or an image cannot be read.
        """
        self._check_normalisation(preprocessing)
        raw = self._raw_training_batches(preprocessing, sampled, workers, random_crop)
        return ((torch.from_numpy(pixels).permute(0, 3, 1, 2), labels) for pixels, labels in raw)

    def held(self, preprocessing: Preprocessing) -> tuple[Tensor, Tensor | None] | None:
        """All images uint8 (N, H, W, C) and labels int64 (N,) or None, where they are held in memory.

        Raises:
            DataError: `preprocessing` is for another number of channels.
        """
        self._check_normalisation(preprocessing)
        return self._held()

    def _held(self) -> tuple[Tensor, Tensor | None] | None:
        return None

    def _check_normalisation(self, preprocessing: Preprocessing) -> None:
        if len(preprocessing.mean) != len(preprocessing.std):
            raise DataError(
                f"mean {preprocessing.mean} and std {preprocessing.std} need one value a channel each"
            )
        self._check_channels(len(preprocessing.mean))

    @property
    @abstractmethod
    def crops_randomly(self) -> bool:
        """Whether `training_batches` can crop images at random."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def chosen(self, indices: Sequence[int]) -> Images:
        """The images at these places, in this order."""

    @abstractmethod
    def digest(self) -> str:
        """A sha256 that tells these images from others of the same name and number, without reading all of them."""

    @abstractmethod
    def statistics(self) -> Preprocessing:
        """Normalisation by mean and standard deviation of each channel over the training split, if any.

        Raises:
            DataError: the set is a folder, which is not read as a whole, or a channel is constant.
        """

    @abstractmethod
    def _check_channels(self, channels: int) -> None: ...

    @abstractmethod
    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]: ...

    @abstractmethod
    def _raw_training_batches(
        self, preprocessing: Preprocessing, sampled: Sequence[SampledBatch], workers: int, random_crop: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]: ...


def _scaled(pixels: Pixels) -> Tensor:
    """Pixels (N, H, W, C) as (N, C, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255
