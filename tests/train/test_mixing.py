"""Mixup and CutMix against what their pixels show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ttcompress.train.mixing import mix_images
from ttcompress.train.options import TrainingOptions

PLAIN = TrainingOptions(epochs=2, lr=0.05)


def mixtures(kind: str, alpha: float, count: int) -> Iterator[tuple[Tensor, Tensor, float, Tensor]]:
    """Mixed images, places of what was mixed in, label shares, and the shares that pixels show; image i shows i."""
    size = 10
    images = torch.arange(size).float()[:, None, None, None].expand(-1, 2, 8, 6)
    options = replace(PLAIN, **{kind: alpha})
    for step in range(count):
        mixed, others, share = mix_images(images.clone(), torch.arange(size), options, 1, step)
        assert others is not None
        assert sorted(others.tolist()) == [*range(size)]
        moved = others != torch.arange(size)
        own, other = images[moved], images[others][moved]
        yield mixed, others, share, (mixed[moved] - other) / (own - other)


def test_mixup_is_in_the_labels_as_in_the_pixels() -> None:
    shares = []
    for _, _, share, shown in mixtures("mixup", 0.4, 400):
        torch.testing.assert_close(shown, torch.full_like(shown, share), rtol=1e-4, atol=1e-5)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.1)


def test_cutmix_cuts_one_window_of_the_share_anywhere() -> None:
    shares, covered = [], torch.zeros(8, 6)
    for _, _, share, shown in mixtures("cutmix", 1.0, 400):
        window = shown[0, 0] == 0
        assert bool((shown == (~window).float()).all())
        assert share == pytest.approx(1 - float(window.float().mean()))
        assert torch.equal(window, window.any(1)[:, None] & window.any(0))
        assert float(window.any(0).sum() / 6) == pytest.approx(float(window.any(1).sum() / 8), abs=0.17)
        shares.append(share)
        covered += window
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert 40 < float(covered.min()) < float(covered.max()) < 360


def test_mixtures_go_by_turns_and_depend_on_seed_epoch_and_step_alone() -> None:
    images, both = torch.rand(6, 1, 8, 8), replace(PLAIN, mixup=0.5, cutmix=0.5)
    shares = set()
    for seed, epoch, step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 1)]:
        options = replace(both, seed=seed)
        mixed, _, share = mix_images(images, torch.arange(6), options, epoch, step)
        torch.manual_seed(seed), np.random.seed(seed)
        again = mix_images(images, None, options, epoch, step)
        assert torch.equal(mixed, again[0])
        assert again[1:] == (None, share)
        assert bool(torch.isin(mixed, images).all()) == bool(step % 2)
        shares.add(share)
    assert len(shares) == 7
