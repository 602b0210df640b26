"""How much of a moment is spread evenly: by NumPy in float64, and by what comes of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.calibrate.test_calibration import calibrated, specs
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.measured import EVEN
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.shrinkage import SHARES, likeliest_share, sampling_share
from ttcompress.calibrate.statistics import measure
from ttcompress.calibrate.sweeps import sweep_layers
from ttcompress.networks.surgery import apply_plan
from ttcompress.networks.weights import weight_of
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.tt.whiten import Moments

pytestmark = pytest.mark.usefixtures("one_thread")
Array = np.ndarray[Any, np.dtype[np.float64]]


def drawn(roots: Array, count: int, seed: int) -> Array:
    return roots @ np.random.default_rng(seed).standard_normal((len(roots), count))


def moments(columns: Array) -> Moments:
    made = Moments(len(columns))
    made.add(torch.tensor(columns), weight=columns.shape[1])
    return made


def uneven(size: int, seed: int, decay: float = 2.0) -> Array:
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(turned * np.exp(-decay * np.arange(size) / size * 2), dtype=np.float64)


def blended(second: Array, share: float) -> Array:
    return np.asarray((1 - share) * second + share * np.trace(second) / len(second) * np.eye(len(second)))


# --------------------------------------------------------------------------------------------------- the likeliest


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 12), count=st.integers(1, 40), held=st.integers(1, 9), seed=st.integers(0, 999))
def test_the_likeliest_share_has_the_largest_likelihood(size: int, count: int, held: int, seed: int) -> None:
    roots = uneven(size, seed)
    fitted, other = drawn(roots, count, seed + 1), drawn(roots, held, seed + 2)
    second = fitted @ fitted.T / count

    def surprise(share: float) -> float:
        spread = blended(second, share)
        _, volume = np.linalg.slogdet(spread)
        return float(volume + np.einsum("in,in->", other, np.linalg.solve(spread, other)) / held)

    found = likeliest_share(moments(fitted), moments(other))
    assert surprise(found) <= min(map(surprise, SHARES.tolist())) + 1e-6 * size


def test_few_vectors_are_spread_and_many_are_not() -> None:
    roots, other = uneven(40, 0), drawn(uneven(40, 0), 64, 1)
    found = [likeliest_share(moments(drawn(roots, count, 2)), moments(other)) for count in (10, 40, 20_000)]
    assert found[0] > found[1] > 2 * found[2]
    assert found[2] <= 0.02


def test_inputs_that_never_vary_are_left_as_they_are() -> None:
    nothing = moments(np.zeros((4, 9)))
    assert likeliest_share(nothing, nothing) == 0


def test_inputs_that_are_always_zero() -> None:
    """They are as unlikely under every share but the least, and do not hide the others."""
    columns = drawn(uneven(12, 0), 4000, 1)
    columns[:4] = 0
    assert 0 < likeliest_share(moments(columns[:, :2000]), moments(columns[:, 2000:])) <= 0.02


# ------------------------------------------------------------------------------------------- of the least error


def share_of(samples: Array) -> float:
    """Of samples (count, size, positions)."""
    count, _, positions = samples.shape
    each = samples @ samples.swapaxes(1, 2) / positions
    flat = samples.swapaxes(0, 1).reshape(samples.shape[1], -1)
    return sampling_share(moments(flat), float(np.square(each).sum((1, 2)).mean()), count)


@pytest.mark.parametrize(("count", "positions"), [(12, 1), (60, 1), (20, 3), (400, 1)])
def test_its_error_is_near_the_least_that_any_share_has(count: int, positions: int) -> None:
    """Over draws of a moment that is known; positions of a sample are alike, and no samples of their own."""
    roots = uneven(16, 0, decay=0.5)
    truth, shares = roots @ roots.T, np.arange(0, 1.01, 0.02)
    errors, found = np.zeros(len(shares)), 0.0
    for seed in range(100):
        samples = np.repeat(drawn(roots, count, seed).T[:, :, None], positions, 2)
        second = np.einsum("nip,njp->ij", samples, samples) / count / positions
        errors += [np.square(blended(second, share) - truth).sum() for share in shares]
        found += np.square(blended(second, share_of(samples)) - truth).sum()
    # A share is estimated too, from as few samples.
    assert found <= 1.15 * errors.min()
    assert found < (0.9 if count < 400 else 1.01) * errors[0]


def test_directions_that_all_count_alike_are_spread_evenly() -> None:
    samples = np.random.default_rng(0).standard_normal((50, 80, 1))
    assert share_of(samples) > 0.9
    assert share_of(np.ones((5, 1, 1))) == 1


# ------------------------------------------------------------------------------------------------------ in place


def classifier(inputs: int, classes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, inputs), nn.Tanh(), nn.Linear(inputs, classes)).requires_grad_(False)


def found_of(model: nn.Module, images: Tensor, name: str) -> LayerStatistics:
    return measure(model, specs(model, [name]), calibrated(images), 0)[name]


def test_a_wide_classifier_of_few_images_has_both_metrics_spread() -> None:
    """The true metric of its outputs is even; of 64 features, 14 images show less than a quarter."""
    model = classifier(64, 50)
    few, many = (found_of(model, torch.randn(count, 20), "2") for count in (16, 3000))
    assert few.unfelt > 0.8
    assert few.unseen > 0.1 > many.unseen
    mean, seen = few.inputs.means[0].numpy(), few.inputs.own.numpy()
    expected = blended(seen - np.outer(mean, mean), few.unseen)
    np.testing.assert_allclose(few.input_metric.own.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("positions", ["tokens", "images"])
def test_images_are_the_samples_and_not_their_positions(positions: str) -> None:
    """Gradients that all positions of an image share are as few as images, however many positions there are."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 30) if positions == "tokens" else nn.Conv2d(6, 30, 1)

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = layer, nn.Linear(30, 30)

        def forward(self, x: Tensor) -> Tensor:
            made = self.layer(x)
            pooled = made.mean(1) if positions == "tokens" else made.mean((2, 3))
            return self.last(pooled)  # type: ignore[no-any-return]

    model = Pooled().requires_grad_(False)
    nn.init.orthogonal_(model.last.weight)
    shape = (25, 6) if positions == "tokens" else (6, 5, 5)
    found = found_of(model, torch.randn(40, *shape), "layer")
    assert found.unfelt > 0.8
    # What an image meets more than once has sums over positions for its inputs.
    assert found.unseen == 0


def test_where_little_is_sensitive_the_share_is_the_least() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3)).requires_grad_(False)
    assert found_of(model, torch.randn(3000, 20), "0").unfelt == EVEN


@pytest.mark.parametrize("is_alike", [True, False])
def test_held_out_images_decide_on_the_sweep_of_each_layer(is_alike: bool) -> None:
    """Where they are of another kind than those that a layer was fitted to, its cores stay what they were."""
    dense = classifier(96, 40)
    dense[2].weight.copy_(torch.randn(40, 8) @ torch.randn(8, 96))
    model = deepcopy(dense)
    plan = apply_plan(model, make_plan(dense, Recipe(ranks=12, format="lowrank", include=("2",))))
    calibration = calibrated(torch.cat([torch.randn(200, 2), torch.zeros(200, 18)], 1))
    statistics = measure(dense, specs(dense, ["2"]), calibration, 0)
    (layer,) = [layer for layer in plan.layers if layer.fqn == "2"]
    before = weight_of(model, layer)
    # What the layer is given is wrong, so that there is something to make good.
    model.get_parameter("0.weight")[:, :2] *= 3

    if not is_alike:
        calibration = replace(
            calibration, held_out=lambda: [torch.cat([torch.zeros(25, 2), torch.randn(25, 18)], 1)]
        )
    sweep_layers(Reference(dense, statistics, calibration), model, plan.with_layers([layer]), 1)
    changed = torch.dist(weight_of(model, layer), before) / before.norm()
    assert (changed > 1e-5) == is_alike
