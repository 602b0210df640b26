"""Augmentation of image batches on their device, by random numbers that anyone can repeat.

They depend on seed, epoch and index alone. Whoever asks for image i in epoch e gets the same numbers, in
whatever order, batch or process: training resumes bit-equal, and a set in memory is augmented as the same set
on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ttcompress.data.sending import sent

CROP = 8
"""Small images move by up to one pixel in this many."""
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
"""Share of the area, and aspect, of the crop of a large image."""
NUMBERS_PER_IMAGE = 5
"""Random numbers an image: one for the mirror, four for a crop, of which a shift takes two."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_numbers(seed: int, epoch: int, indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """Uniform numbers in [0, 1), float64 (N, NUMBERS_PER_IMAGE), by splitmix64 of seed, epoch and index."""
    # Sums of hashes wrap around on purpose.
    with np.errstate(over="ignore"):
        by_seed = _hashed(np.array([seed], dtype=np.uint64))
        by_epoch = _hashed(by_seed + np.uint64(epoch))
        by_image = _hashed(by_epoch + np.asarray(indices).astype(np.uint64))
        steps = np.arange(1, NUMBERS_PER_IMAGE + 1, dtype=np.uint64) * _GOLDEN
        hashes = _hashed(by_image[:, None] + steps)

    # As many bits as a float64 has.
    bits = hashes >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.float64) / 2**53)


def _hashed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def flipped(batch: Tensor, which: Tensor) -> Tensor:
    """Images (N, C, H, W), those of `which` (N,) mirrored left to right."""
    is_flipped = sent(which, batch.device)[:, None, None, None]
    return torch.where(is_flipped, batch.flip(-1), batch)


def shifted(batch: Tensor, down: Tensor, right: Tensor, reach: int | None = None) -> Tensor:
    """Images (N, C, H, W) moved by whole pixels (N,), positive or negative, zeros moving in.

    None moves by more than `reach`; where it is not given it is looked for, which waits for pixels on a GPU.
    """
    size, _, height, width = batch.shape
    if reach is None:
        reach = int(torch.stack([down, right]).abs().max()) if size else 0
    padded = functional.pad(batch, (reach,) * 4)

    device = batch.device
    image = torch.arange(size, device=device)
    rows = sent(reach - down, device)[:, None] + torch.arange(height, device=device)
    columns = sent(reach - right, device)[:, None] + torch.arange(width, device=device)

    channels_last = padded.permute(0, 2, 3, 1)
    moved = channels_last[image[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def shifts(numbers: Tensor, size: int) -> Tensor:
    """Whole pixels from uniform numbers: -size/CROP ... size/CROP, all alike."""
    reach = size // CROP
    return (numbers * (2 * reach + 1)).long() - reach


def random_crop_box(numbers: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image of random area and aspect (Szegedy et al. 2015)."""
    least_share, most_share = SCALE
    share = least_share + numbers[0] * (most_share - least_share)
    area = height * width * share

    # The logarithm of the aspect is uniform: as often 4:3 as 3:4.
    least_aspect, most_aspect = RATIO
    aspect = least_aspect * (most_aspect / least_aspect) ** numbers[1]

    tall = max(1, min(height, round((area / aspect) ** 0.5)))
    wide = max(1, min(width, round((area * aspect) ** 0.5)))
    top = int(numbers[2] * (height - tall + 1))
    left = int(numbers[3] * (width - wide + 1))
    return top, left, tall, wide
