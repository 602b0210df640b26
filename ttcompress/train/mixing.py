"""Mixup and CutMix: images of a batch mixed with each other, from the seed, the epoch and the step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ttcompress.data.sending import sent
from ttcompress.networks.running import NetworkInput
from ttcompress.train.options import TrainingOptions


def mixed(
    inputs: NetworkInput, labels: Tensor | None, options: TrainingOptions, epoch: int, step: int
) -> tuple[NetworkInput, Tensor | None, float]:
    """A batch as the options say; only images are mixed, one tensor (N, C, H, W).

    Returns the inputs, the labels of what was mixed in, and the share of the inputs' own labels.
    """
    if not (options.mixup or options.cutmix) or not isinstance(inputs, Tensor):
        return inputs, None, 1.0
    return mix_images(inputs, labels, options, epoch, step)


def mix_images(
    images: Tensor, labels: Tensor | None, options: TrainingOptions, epoch: int, step: int
) -> tuple[Tensor, Tensor | None, float]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), by turns where both are on.

    Returns the images, the labels of what was mixed in, and the share of the images' own labels.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(options, name)]
    kind = kinds[step % len(kinds)]
    alpha = getattr(options, kind)
    generator = np.random.default_rng([options.seed, epoch, step])
    own_share = float(generator.beta(alpha, alpha))
    partners = sent(torch.from_numpy(generator.permutation(len(images))), images.device)
    partner_labels = None if labels is None else labels[partners]

    if kind == "mixup":
        mixed = own_share * images + (1 - own_share) * images[partners]
        return mixed, partner_labels, own_share
    mixed, own_share = _pasted(images, images[partners], own_share, generator)
    return mixed, partner_labels, own_share


def _pasted(
    images: Tensor,
    partners: Tensor,
    own_share: float,
    generator: np.random.Generator,
) -> tuple[Tensor, float]:
    """Images with one window of their partners in them, and the share of the area that is still their own."""
    height, width = images.shape[2:]
    side_share = (1 - own_share) ** 0.5
    tall, wide = round(height * side_share), round(width * side_share)
    top = int(generator.integers(0, height - tall + 1))
    left = int(generator.integers(0, width - wide + 1))

    mixed = images.clone()
    window = (..., slice(top, top + tall), slice(left, left + wide))
    mixed[window] = partners[window]
    return mixed, 1 - tall * wide / (height * width)
