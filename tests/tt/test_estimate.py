"""Bounds of singular spectra against the spectra: never below them, and near them where they are flat."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ttcompress.tt.contract import dense_weight
from ttcompress.tt.decompose import squared_spectra
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def decaying(*shape: int) -> Tensor:
    return random(*shape) * (0.9 ** torch.arange(shape[1])).reshape(1, -1, *[1] * (len(shape) - 2))


def spiked(*shape: int) -> Tensor:
    """Nearly all in one singular value, which few random vectors know least of."""
    return 0.01 * random(*shape) + torch.ones(shape)


def structured(*shape: int) -> Tensor:
    view = tensorize_shape("matrix", shape)
    ones = [1] * (len(view.modes) - 2)
    cores = [random(*core) for core in view.core_shapes((1, *(4 * one for one in ones), 3, 1))]
    return dense_weight(cores, shape)


CASES = [
    (make, shape) for make in (random, decaying, spiked) for shape in [(64, 96), (48, 40, 3, 3), (60, 100)]
]
CASES += [(structured, (64, 96)), (structured, (128, 256))]


@pytest.mark.parametrize(("make", "shape"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("name", ["matrix", "chain", "lowrank"])
def test_leading_sums_are_not_below_the_true_ones(make, shape, name) -> None:  # type: ignore[no-untyped-def]
    weight, view = make(*shape), tensorize_shape(name, shape)
    exact = squared_spectra(weight, view)
    bounds = squared_spectra(weight, view, bounded_above=0)
    for true, bound in zip(exact, bounds, strict=True):
        assert bound.shape == true.shape
        assert bound.dtype == torch.float64
        # With so few rows, random vectors may have two percent of bad luck.
        assert bool((bound.cumsum(0) >= 0.98 * true.cumsum(0)).all())
        assert float(bound.sum()) == pytest.approx(1.0)
        assert bool((bound.diff() <= 1e-12).all())


def test_of_a_flat_spectrum_little_is_given_away() -> None:
    view = tensorize_shape("lowrank", (512, 1024))
    (true,), (bound,) = (squared_spectra(random(512, 1024), view, above) for above in (None, 0))
    gap = (bound.cumsum(0) - true.cumsum(0)).max()
    assert 0 < float(gap) < 0.12
    assert float((bound.cumsum(0) - true.cumsum(0))[:64].max()) < 0.03


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e15, 1e30])
def test_the_scale_of_a_weight_does_not_matter(scale: float) -> None:
    view = tensorize_shape("matrix", (64, 96))
    bounds = squared_spectra(decaying(64, 96), view, bounded_above=0)
    scaled = squared_spectra(decaying(64, 96) * scale, view, bounded_above=0)
    for one, other in zip(bounds, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_only_large_unfoldings_have_bounds_and_they_are_the_same_each_time() -> None:
    weight, view = random(64, 96), tensorize_shape("matrix", (64, 96))
    exact, mixed, again = (squared_spectra(weight, view, above) for above in (None, 20, 20))
    sides = [len(each) for each in exact]
    assert min(sides) <= 20 < max(sides)
    for true, bound, repeated in zip(exact, mixed, again, strict=True):
        assert torch.equal(bound, repeated)
        assert torch.equal(bound, true) == (len(true) <= 20)


def test_nothing_has_a_spectrum_of_nothing() -> None:
    view = tensorize_shape("matrix", (64, 96))
    for each in squared_spectra(torch.zeros(64, 96), view, bounded_above=0):
        assert float(each.sum()) == 0
