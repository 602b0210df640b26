"""Learning rates, groups of parameters, weight decay of products and averages, against NumPy and dense weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.records.layers import ConvSpec, LinearSpec
from ttcompress.train.optimize import Average, make_optimizer, rate_at, shrink_products, tt_layers, update
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")

Case = tuple[str, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]
UNPADDED: list[Case] = [
    ("matrix", (8, 12), (2, 4), (3, 4)),
    ("matrix", (12, 8), (2, 2, 3), (2, 2, 2)),
    ("matrix", (2, 3), None, None),
    ("lowrank", (6, 9), None, None),
    ("matrix", (4, 4, 3, 2), (2, 2), (2, 2)),
    ("chain", (4, 3, 3, 2), None, None),
    ("naive", (4, 3, 2, 3), None, None),
    ("lowrank", (5, 3, 2, 2), None, None),
]
PADDED: list[Case] = [("matrix", (7, 11), (2, 4), (3, 4)), ("matrix", (5, 7, 1, 3), (2, 3), (2, 4))]
SEEDS = st.integers(0, 2**31)


def tt_layer(case: Case, rank: int = 3, seed: int = 0) -> TTLinear | TTConv2d:
    torch.manual_seed(seed)
    (out, inp, *kernel), tensorization = case[1], tensorize_shape(*case)
    if not kernel:
        return TTLinear(LinearSpec(inp, out, True), tensorization, rank, dtype=torch.float64)
    spec = ConvSpec(inp, out, (kernel[0], kernel[1]), (1, 1), (0, 0), (1, 1), "zeros", True)
    return TTConv2d(spec, tensorization, rank, dtype=torch.float64)


def product(cores: Sequence[Tensor]) -> NDArray[np.float64]:
    """The oracle: all cores in one einsum, padding included."""
    operands: list[object] = []
    for k, core in enumerate(cores):
        operands += [core.detach().numpy(), [k, 10 + k, 20 + k, 30 + k, k + 1]]
    order = [base + k for base in (10, 20, 30) for k in range(len(cores))]
    return np.asarray(np.einsum(*operands, [0, *order, len(cores)], optimize=True))  # type: ignore[call-overload]


# ----------------------------------------------------------------------------------------------------- learning rates

LENGTHS = st.tuples(st.integers(1, 3000), st.integers(0, 3000)).map(lambda pair: (pair[0] + pair[1], pair[1]))
SCHEDULES = st.sampled_from(["cosine", "step"])


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, schedule=SCHEDULES)
def test_rates_rise_on_a_line_to_one_and_never_rise_again(lengths: tuple[int, int], schedule: str) -> None:
    total, warm_up = lengths
    rates = np.array([rate_at(step, total, warm_up, schedule) for step in range(total)])
    assert rates.min() > 0
    assert rates.max() == rates[warm_up] == 1
    np.testing.assert_allclose(rates[: warm_up + 1], np.linspace(0, 1, warm_up + 2)[1:], rtol=1e-12)
    assert (np.diff(rates[warm_up:]) <= 0).all()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_the_cosine_ends_at_almost_nothing(lengths: tuple[int, int]) -> None:
    total, warm_up = lengths
    done = np.arange(total - warm_up + 1) / (total - warm_up)
    rates = np.array([rate_at(step, total, warm_up, "cosine") for step in range(warm_up, total + 1)])
    np.testing.assert_allclose(rates, 1 - np.sin(np.pi / 2 * done) ** 2, atol=1e-12)
    assert abs(rates[-1]) < 1e-15
    assert rates[-2] <= (np.pi / 2 / (total - warm_up)) ** 2


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_the_steps_are_tenths_at_three_six_and_nine_tenths(lengths: tuple[int, int]) -> None:
    """Of what comes after the warm-up; in whole numbers."""
    total, warm_up = lengths
    done, rest = np.arange(total - warm_up), total - warm_up
    drops = sum((10 * done >= tenths * rest).astype(int) for tenths in (3, 6, 9))
    rates = [rate_at(step, total, warm_up, "step") for step in range(warm_up, total)]
    np.testing.assert_allclose(rates, np.array([1, 0.1, 0.01, 0.001])[drops], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_warm_up_longer_than_the_training_is_cut_off(schedule: str) -> None:
    assert [rate_at(step, 3, 9, schedule) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


# -------------------------------------------------------------------------------------------------------------- groups


class Mixed(nn.Module):
    """A bit of everything; `again` is `dense`, and the weight of `frozen` is not trained, nor are cores of `fixed`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dense, self.frozen = nn.Conv2d(3, 4, 3), nn.Linear(8, 8), nn.Linear(4, 4)
        self.batch, self.group, self.layer = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(8)
        self.again, self.attend, self.embed = self.dense, nn.MultiheadAttention(8, 2), nn.Embedding(5, 8)
        self.tt, self.inner = tt_layer(UNPADDED[1]), nn.Sequential(tt_layer(UNPADDED[5]))
        self.fixed = tt_layer(UNPADDED[3])
        self.frozen.weight.requires_grad_(False)
        self.fixed.requires_grad_(False)


DENSE = {"conv.weight", "dense.weight", "attend.in_proj_weight", "attend.out_proj.weight", "embed.weight"}
optimizers = pytest.mark.parametrize("name", ["sgd", "adamw"])


def decayed_by(model: nn.Module, name: str) -> set[str]:
    """Names of what a step without gradients, but with decay, shrinks; nothing else may change."""
    model.double()
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    optimizer = make_optimizer(model, name, 0.1, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    # Nesterov's first step is 1 + momentum of a plain one.
    factor = {"sgd": 1 - 1.9 * 0.1 * 0.5, "adamw": 1 - 0.1 * 0.5}[name]
    moved = {key for key, each in model.named_parameters() if not torch.equal(each, before[key])}
    for key in moved:
        torch.testing.assert_close(model.get_parameter(key), factor * before[key])
    return moved


@optimizers
def test_every_trained_parameter_is_in_one_group(name: str) -> None:
    model = Mixed()
    optimizer = make_optimizer(model, name, 0.3, 0.01)
    found = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    names = {key for key, each in model.named_parameters() if each.requires_grad}
    assert {id(layer) for layer in tt_layers(model)} == {id(model.tt), id(model.inner[0]), id(model.fixed)}
    assert sorted(found) == sorted(id(model.get_parameter(key)) for key in names)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    assert type(optimizer) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]


@optimizers
def test_dense_weights_alone_decay(name: str) -> None:
    model = Mixed()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert decayed_by(model, name) == DENSE


@optimizers
def test_a_group_may_be_empty(name: str) -> None:
    assert decayed_by(tt_layer(UNPADDED[0]), name) == set()
    assert decayed_by(nn.Linear(3, 3, bias=False), name) == {"weight"}


@optimizers
@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm((4, 5)), lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True)],
    ids=["norm", "bias"],
)
def test_norms_and_biases_of_more_axes_do_not_decay(name: str, make: Any) -> None:
    assert decayed_by(make(), name) <= {"in_proj_weight", "out_proj.weight"}


# ------------------------------------------------------------------------------------------------------------ products


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from([*UNPADDED, *PADDED]), rank=st.integers(1, 4), share=st.floats(0, 1), seed=SEEDS)
def test_the_product_shrinks_by_the_share(case: Case, rank: int, share: float, seed: int) -> None:
    """Whatever the number of cores."""
    layer = tt_layer(case, rank, seed)
    expected = (1 - share) * product([*layer.cores])
    shrink_products([layer], share)
    np.testing.assert_allclose(product([*layer.cores]), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 2), (0, 1, 2)], ids=str)
def test_the_trained_cores_bear_it_alike(frozen: tuple[int, ...]) -> None:
    layer = tt_layer(UNPADDED[1])
    for k in frozen:
        layer.cores[k].requires_grad_(False)
    before = [core.detach().clone() for core in layer.cores]
    shrink_products([layer], 0.3)
    shares = [float(core.detach().norm() / was.norm()) for core, was in zip(layer.cores, before, strict=True)]
    assert [shares[k] for k in frozen] == [1.0] * len(frozen)
    moved = [share for k, share in enumerate(shares) if k not in frozen]
    assert moved == [pytest.approx(0.7 ** (1 / len(moved))) for _ in moved]


def beside_dense(name: str, rate: float, decay: float, steps: int) -> tuple[float, float]:
    """What is left of the norms of a TT layer and of a dense weight after steps without gradients."""
    tt, dense = tt_layer(UNPADDED[1]), nn.Linear(3, 4, bias=False).double()
    both = nn.ModuleList([tt, dense])
    optimizer = make_optimizer(both, name, rate, decay)
    norms = [float(each.weight.detach().norm()) for each in (tt, dense)]
    for _ in range(steps):
        for each in both.parameters():
            each.grad = torch.zeros_like(each)
        update(both, optimizer, [tt], 1.0, decay, optimizer.step)
    ours, theirs = (
        float(each.weight.detach().norm()) / norm for each, norm in zip((tt, dense), norms, strict=True)
    )
    return ours, theirs


@settings(max_examples=20, deadline=None)
@given(rate=st.floats(1e-4, 1), decay=st.floats(1e-4, 0.5), steps=st.integers(1, 30))
def test_with_adamw_products_decay_as_dense_weights_do(rate: float, decay: float, steps: int) -> None:
    ours, theirs = beside_dense("adamw", rate, decay, steps)
    assert ours == pytest.approx(theirs, rel=1e-10)
    assert ours < 1


@pytest.mark.parametrize(("rate", "decay"), [(0.01, 0.01), (0.1, 0.001), (0.001, 0.1)])
def test_with_sgd_products_decay_as_dense_weights_do_in_the_long_run(rate: float, decay: float) -> None:
    steps = 1500
    ours, theirs = beside_dense("sgd", rate, decay, steps)
    assert 0.1 < ours < 0.95
    assert math.log(ours) == pytest.approx(math.log(theirs), rel=0.02)


def test_too_much_decay_ends_at_zero() -> None:
    layer = tt_layer(UNPADDED[0])
    shrink_products([layer], 7.0)
    assert not np.any(product([*layer.cores]))


# ------------------------------------------------------------------------------------------------------------ averages


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), tt_layer(("lowrank", (2, 4), None, None))
    ).double()


def scramble(model: nn.Module, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    """New values in place, as training gives them; whole numbers for counters."""
    with torch.no_grad():
        for value in model.state_dict().values():
            fresh = torch.tensor(random.standard_normal(tuple(value.shape)) * 100)
            value.copy_(fresh if value.is_floating_point() else fresh.abs().long())
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


@settings(max_examples=40, deadline=None)
@given(
    decay=st.one_of(st.sampled_from([0.0, 0.9999]), st.floats(0, 0.9999)),
    updates=st.integers(0, 30),
    seed=SEEDS,
)
def test_the_average_is_that_of_numpy(decay: float, updates: int, seed: int) -> None:
    """Exponential, with a decay of (1 + n) / (10 + n) at most at its n-th update; counters are the last."""
    random, model = np.random.default_rng(seed), network()
    expected = scramble(model, random)
    average = Average(model, decay)
    for n in range(1, updates + 1):
        values = scramble(model, random)
        average.update(model)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for name, value in values.items():
            whole = np.issubdtype(value.dtype, np.integer)
            expected[name] = value if whole else (1 - share) * expected[name] + share * value
        assert all(np.array_equal(value.numpy(), values[name]) for name, value in model.state_dict().items())
    scramble(model, random)
    assert [*average.values] == [*expected]
    assert average.values["1.num_batches_tracked"].dtype == torch.int64
    for name, value in average.values.items():
        assert not value.requires_grad
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-10, atol=1e-9)
    model.load_state_dict(average.values)


def test_early_averages_forget_their_start() -> None:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 1000)
    average = Average(model, 0.9999)
    nn.init.constant_(model.weight, 1)
    for _ in range(20):
        average.update(model)
    torch.testing.assert_close(average.values["weight"], torch.ones(2, 2), atol=1e-3, rtol=0)
