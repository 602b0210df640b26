"""Sets of images that are held in memory."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.data.sets import Images, Pixels, SampledBatch
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing

SAMPLED_IMAGES = 4096
"""So many images tell by their pixels whether a set is the same."""
Labels = NDArray[np.int64]
Arrays = tuple[Pixels, Labels | None]


class ArrayImages(Images):
    """Images held in memory as uint8 (N, H, W, C); `train` loads the training split where this is another."""

    def __init__(self, name: str, arrays: Arrays, train: Callable[[], Arrays] | None = None) -> None:
        self._images, self._labels = arrays
        num_classes = None if self._labels is None else int(self._labels.max()) + 1
        height, width, channels = self._images.shape[1:]
        super().__init__(name, num_classes, (channels, height, width))
        self._train = train

    def __len__(self) -> int:
        return len(self._images)

    def chosen(self, indices: Sequence[int]) -> Images:
        """The images at these places, in this order; the statistics stay those of the whole."""
        at = np.asarray(indices, dtype=np.int64)
        part = copy.copy(self)
        part._images = self._images[at]
        part._labels = None if self._labels is None else self._labels[at]
        part._train = self._train or (lambda: (self._images, self._labels))
        return part

    def digest(self) -> str:
        """Of all labels, and of the pixels of some images."""
        content = hashlib.sha256(str(self._images.shape).encode())
        if self._labels is not None:
            content.update(np.ascontiguousarray(self._labels).data)
        content.update(np.ascontiguousarray(self._images[:: max(1, len(self) // SAMPLED_IMAGES)]).data)
        return content.hexdigest()

    def statistics(self) -> Preprocessing:
        """Mean and standard deviation of each channel over the training split.

        Raises:
            DataError: a channel is constant.
        """
        images = self._train()[0] if self._train else self._images
        values = np.arange(256) / 255
        means = []
        deviations = []
        for channel in np.moveaxis(images, -1, 0):
            # A histogram gives the exact sums without a float64 copy of the images.
            shares = np.bincount(channel.ravel(), minlength=256) / channel.size
            mean = float(shares @ values)
            variance = shares @ (values - mean) ** 2
            means.append(mean)
            deviations.append(float(np.sqrt(variance)))

        if min(deviations) == 0:
            raise DataError(
                f"{self.name}: a channel is the same everywhere and cannot be normalised: give --mean, --std"
            )
        return Preprocessing(tuple(means), tuple(deviations), self.image_size)

    def _check_channels(self, channels: int) -> None:
        have = self._images.shape[-1]
        if have != channels:
            raise DataError(
                f"{self.name} has images (N, H, W, C) of shape {self._images.shape} with {have} channels, "
                f"the normalisation is for {channels}: "
                "use data that fits the network, or give --mean and --std"
            )

    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            yield self._images[part], self._labels_of(part)

    crops_randomly = False

    def _raw_training_batches(
        self, preprocessing: Preprocessing, sampled: Sequence[SampledBatch], workers: int, random_crop: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        for indices, _ in sampled:
            yield self._images[indices], self._labels_of(indices)

    def _held(self) -> tuple[Tensor, Tensor | None]:
        return torch.from_numpy(self._images), self._labels_of(slice(None))

    def _labels_of(self, indices: slice | NDArray[np.int64]) -> Tensor | None:
        return None if self._labels is None else torch.from_numpy(self._labels[indices])
