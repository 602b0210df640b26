"""Sets of images that lie on a GPU: small ones are sent there once, instead of batch by batch in every epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ttcompress.data.sending import sent
from ttcompress.data.sets import Batch, Images
from ttcompress.records.report import Preprocessing

MOST_BYTES = 2**30
"""Larger sets stay where they are: the memory of a GPU is for training."""


@dataclass(frozen=True)
class Resident:
    """Images uint8 (N, H, W, C) and labels int64 (N,) or None, on a device."""

    pixels: Tensor
    labels: Tensor | None

    def batch(self, places: Tensor) -> Batch:
        """Images uint8 (n, C, H, W) and labels at these places (n,), which are on the device too."""
        chosen = self.pixels.index_select(0, places).permute(0, 3, 1, 2)
        return chosen, None if self.labels is None else self.labels.index_select(0, places)


def resident(images: Images, preprocessing: Preprocessing, device: torch.device) -> Resident | None:
    """The set on a GPU; None for another device, and for sets that are not held in memory or too large.

    Raises:
        DataError: `preprocessing` is for another number of channels.
    """
    held = images.held(preprocessing) if device.type == "cuda" else None
    if held is None or held[0].nbytes > MOST_BYTES:
        return None
    pixels, labels = held
    return Resident(sent(pixels, device), None if labels is None else sent(labels, device))


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of each channel, (1, C, 1, 1) on a device."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, preprocessing: Preprocessing, device: torch.device) -> Normalisation:
        """As images are normalised for a network."""
        both = preprocessing.mean, preprocessing.std
        return cls(*(torch.tensor(each, device=device).view(1, -1, 1, 1) for each in both))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Images uint8 (N, C, H, W) scaled to [0, 1] and normalised, in float32."""
        return (pixels.float() / 255 - self.mean) / self.std


@dataclass(frozen=True)
class Shown:
    """Images that a network on a device is shown again and again."""

    images: Images
    preprocessing: Preprocessing
    device: torch.device

    def batches(self, batch_size: int, workers: int = 0) -> Iterator[Batch]:
        """`images.batches` on the device: float32 images (N, C, H, W), labels (N,) or None."""
        there = self._resident
        if there is None:
            for images, labels in self.images.batches(self.preprocessing, batch_size, workers=workers):
                yield sent(images, self.device), None if labels is None else sent(labels, self.device)
            return

        normalised = Normalisation.of(self.preprocessing, self.device)
        for places in torch.split(torch.arange(len(self.images), device=self.device), batch_size):
            pixels, labels = there.batch(places)
            yield normalised(pixels), labels

    @cached_property
    def _resident(self) -> Resident | None:
        return resident(self.images, self.preprocessing, self.device)
