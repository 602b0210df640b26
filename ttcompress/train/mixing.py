"""Mixup and CutMix: images of a batch mixed with each other, from the seed, the epoch and the step alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ttcompress.train.setup import Options


def mix_images(
    images: Tensor, labels: Tensor | None, options: Options, epoch: int, step: int
) -> tuple[Tensor, Tensor | None, float]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), by turns where both are on.

    Returns the images, the labels of what was mixed in, and the share of the images' own labels.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(options, name)]
    if not kinds:
        return images, None, 1.0
    generator = np.random.default_rng([options.seed, epoch, step])
    kind = kinds[step % len(kinds)]
    alpha = getattr(options, kind)
    share, order = float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(len(images)))
    order = order.to(images.device)
    others = None if labels is None else labels[order]
    if kind == "mixup":
        return share * images + (1 - share) * images[order], others, share
    height, width = images.shape[2:]
    tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
    top, left = (int(generator.integers(0, most + 1)) for most in (height - tall, width - wide))
    mixed, window = images.clone(), (..., slice(top, top + tall), slice(left, left + wide))
    mixed[window] = images[order][window]
    return mixed, others, 1 - tall * wide / (height * width)
