"""Augmentation of image batches on their device, from random numbers that depend on seed, epoch and index alone.

Whoever asks for image i in epoch e gets the same numbers, in whatever order, batch or process: training resumes
bit-equal, and a set in memory is augmented as the same set on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

CROP = 8
"""Small images move by up to one pixel in this many."""
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
"""Share of the area, and aspect, of the part that is cut out of a large image."""
DRAWS = 5
"""Random numbers an image."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draws(seed: int, epoch: int, indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Uniform numbers in [0, 1) of shape (images, DRAWS), float64, a hash of seed, epoch and index (splitmix64)."""
    with np.errstate(over="ignore"):
        stream = _hashed(_hashed(np.array([seed], dtype=np.uint64)) + np.uint64(epoch))
        images = _hashed(stream + np.asarray(indices).astype(np.uint64))
        numbers = _hashed(images[:, None] + np.arange(1, DRAWS + 1, dtype=np.uint64) * _GOLDEN)
    return torch.from_numpy((numbers >> np.uint64(11)).astype(np.float64) / 2**53)


def _hashed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def flipped(batch: Tensor, which: Tensor) -> Tensor:
    """Images (N, C, H, W), those of `which` (N,) mirrored left to right."""
    return torch.where(which.to(batch.device)[:, None, None, None], batch.flip(-1), batch)


def shifted(batch: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Images (N, C, H, W) moved by whole pixels (N,), positive or negative, zeros moving in."""
    size, _, height, width = batch.shape
    reach = int(torch.stack([down, right]).abs().max()) if size else 0
    padded = functional.pad(batch, (reach,) * 4)
    rows = (reach - down)[:, None] + torch.arange(height)
    columns = (reach - right)[:, None] + torch.arange(width)
    at = torch.arange(size)[:, None, None].to(batch.device)
    rows, columns = rows.to(batch.device)[:, :, None], columns.to(batch.device)[:, None, :]
    return padded.permute(0, 2, 3, 1)[at, rows, columns].permute(0, 3, 1, 2).contiguous()


def shifts(numbers: Tensor, size: int) -> Tensor:
    """Whole pixels from uniform numbers: -size/CROP ... size/CROP, all alike."""
    reach = size // CROP
    return (numbers * (2 * reach + 1)).long() - reach


def cut_out(numbers: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image of random area and aspect (Szegedy et al. 2015)."""
    area = height * width * (SCALE[0] + numbers[0] * (SCALE[1] - SCALE[0]))
    aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** numbers[1]
    tall = max(1, min(height, round((area / aspect) ** 0.5)))
    wide = max(1, min(width, round((area * aspect) ** 0.5)))
    return int(numbers[2] * (height - tall + 1)), int(numbers[3] * (width - wide + 1)), tall, wide
