"""Joint refinement: what it trains on, the metric of its steps against autograd, and what a run leaves as it was."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from itertools import repeat
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttcompress.calibrate import natural_gradient
from ttcompress.calibrate import refine as refinement
from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.calibrate.held_out_errors import network_error
from ttcompress.calibrate.layer_statistics import LayerStatistics, Statistics
from ttcompress.calibrate.natural_gradient import NaturalGradient
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.refine import Schedule, augment, moved, refine
from ttcompress.calibrate.statistics import measure
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.answers import plain_answer
from ttcompress.networks.surgery import apply_plan
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.tt.contract import dense_weight, merge_all
from ttcompress.tt.shapes import tensorize_shape
from ttcompress.tt.whiten import ModeMetric, Moments

SEEDS = st.integers(0, 2**31)


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- augment


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(6, 3, 16, 9), (5, 2, 8, 8), (4, 1, 7, 5), (7, 12), (3, 4, 5), (2, 3, 4, 5, 6)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    seed=SEEDS,
)
def test_mixtures_keep_shape_and_type_and_repeat_with_the_seed(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    batch = torch.randn(shape, generator=seeded(seed)).to(dtype)
    before = batch.clone()
    found = augment(batch, seeded(seed))
    assert (found.shape, found.dtype) == (batch.shape, dtype)
    assert torch.equal(found, augment(batch, seeded(seed)))
    assert torch.equal(batch, before)
    low, high = batch.amin(0), batch.amax(0)
    if len(shape) == 4:
        low, high = batch.amin((0, 2, 3)), batch.amax((0, 2, 3))
        low, high = (bound[:, None, None] for bound in (low.clamp(max=0), high.clamp(min=0)))
    slack = 4 * torch.finfo(dtype).eps * batch.abs().max()
    assert bool(((found >= low - slack) & (found <= high + slack)).all())


def test_whole_numbers_come_back_as_they_were() -> None:
    for dtype in (torch.int64, torch.uint8, torch.bool):
        batch = torch.randint(0, 2, (4, 3, 8, 8)).to(dtype)
        assert torch.equal(augment(batch, seeded(0)), batch)


@pytest.mark.parametrize("shape", [(5,), (3, 4)])
def test_what_is_no_image_is_mixed_in_pairs_only(shape: tuple[int, ...]) -> None:
    """One-hot inputs show the shares: two of them a mixture, or one, that add up to 1."""
    size = 64
    batch = torch.eye(size).reshape(size, size, *[1] * len(shape)).expand(-1, -1, *shape)
    found = augment(batch.flatten(1), seeded(0)).reshape(batch.shape)
    assert not torch.equal(found, augment(batch.flatten(1), seeded(1)).reshape(batch.shape))
    assert bool((found == found.flatten(2)[:, :, :1].reshape(size, size, *[1] * len(shape))).all())
    shares = found.flatten(2)[:, :, 0]
    torch.testing.assert_close(shares.sum(1), torch.ones(size))
    assert set((shares > 0).sum(1).tolist()) <= {1, 2}
    own = shares.diagonal()
    assert float(own.min()) < 0.2 < 0.8 < float(own.max())
    assert bool((shares.sum(0) - own > 0).sum() > size / 2)


def test_images_are_flipped_and_moved_by_whole_pixels_before_they_are_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one image all mixtures of it show at most two of its variants."""
    image = torch.rand(1, 1, 16, 9) + 1
    variants = {}
    for flip in (False, True):
        wide = nn.functional.pad(image.flip(-1) if flip else image, (1, 1, 2, 2))
        for down in range(5):
            for right in range(3):
                variants[flip, down, right] = wide[0, :, down : down + 16, right : right + 9]
    monkeypatch.setattr(torch, "randperm", lambda size, generator: torch.arange(size))
    found = augment(image.expand(300, -1, -1, -1), seeded(0))
    seen = [key for each in found for key, variant in variants.items() if torch.allclose(each, variant)]
    assert len(seen) == 300
    assert {*seen} == {*variants}
    assert all(seen.count(key) < 30 for key in variants)


def test_small_images_do_not_move() -> None:
    images = torch.rand(8, 2, 7, 5)
    assert torch.equal(moved(images, seeded(0)), images)


# ---------------------------------------------------------------------------------------------- natural gradient

Case = tuple[str, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]
CASES: list[Case] = [
    ("matrix", (8, 12), (2, 4), (3, 4)),
    ("matrix", (12, 8), (2, 2, 3), (2, 2, 2)),
    ("matrix", (4, 6, 3, 2), (2, 2), (2, 3)),
    ("chain", (5, 4, 3, 2), None, None),
    ("naive", (5, 4, 3, 2), None, None),
    ("lowrank", (5, 4, 3, 2), None, None),
    ("lowrank", (6, 9), None, None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def moments(size: int, seed: int) -> Moments:
    made = Moments(size)
    generator = seeded(seed)
    spread = torch.randn(size, size, generator=generator).double()
    made.add(spread @ torch.randn(size, 3 * size, generator=generator).double())
    return made


def tt_layer(case: Case, seed: int = 0, rank: int = 3) -> tuple[TTLinear | TTConv2d, Statistics]:
    torch.manual_seed(seed)
    shape = case[1]
    dense = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])  # type: ignore[arg-type]
    kind = TTLinear if len(shape) == 2 else TTConv2d
    layer = kind.from_dense(dense.double(), tensorize_shape(*case), rank)
    size = dense.weight[0].numel()
    inputs, outputs = moments(size, seed), moments(shape[0], seed + 1)
    return layer, {"layer": LayerStatistics(inputs, inputs, outputs, unfelt=0.2)}


def natural_step(layer: TTLinear | TTConv2d, statistics: Statistics) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of some loss of the weight and the natural ones."""
    target = torch.randn(layer.weight.shape, generator=seeded(9)).double()
    layer.zero_grad()
    (layer.weight * target).sum().backward()  # type: ignore[no-untyped-call]
    plain = [core.grad.clone() for core in layer.cores]
    NaturalGradient({"layer": layer}, statistics).apply()
    return plain, [core.grad for core in layer.cores]


def squared_norm(cores: Sequence[Tensor], metrics: Sequence[ModeMetric]) -> Tensor:
    """Half of ||B||^2 in the metric, padding and all."""
    weighted = [metric.apply(core).flatten(1, -2) for core, metric in zip(cores, metrics, strict=True)]
    return merge_all([core[:, :, None, None] for core in weighted]).square().sum() / 2


@cases
def test_natural_gradients_are_newton_steps_in_the_metric(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every core alone: its Hessian of the squared norm times the natural gradient is the plain gradient."""
    monkeypatch.setattr(natural_gradient, "DAMPING", 0.0)
    layer, statistics = tt_layer(case)
    plain, natural = natural_step(layer, statistics)
    metrics = statistics["layer"].metrics(layer.tensorization)
    for k, (gradient, step) in enumerate(zip(plain, natural, strict=True)):
        cores = [core.detach() for core in layer.cores]
        cores[k] = step.clone().requires_grad_()
        (image,) = torch.autograd.grad(squared_norm(cores, metrics), cores[k])
        torch.testing.assert_close(image, gradient, rtol=1e-7, atol=1e-8 * float(gradient.abs().max()))


@cases
def test_natural_gradients_point_downhill(case: Case) -> None:
    for seed in range(5):
        layer, statistics = tt_layer(case, seed)
        plain, natural = natural_step(layer, statistics)
        assert all(float((g * d).sum()) > 0 for g, d in zip(plain, natural, strict=True))


@pytest.mark.parametrize("case", [*CASES[:2], CASES[3]], ids=str)
def test_a_change_of_gauge_does_not_change_what_a_step_does(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invertible matrix and its inverse between two cores: the weight changes as before, to first order."""
    monkeypatch.setattr(natural_gradient, "DAMPING", 1e-12)
    layer, statistics = tt_layer(case)
    other = deepcopy(layer)
    matrix = torch.randn(3, 3, generator=seeded(5)).double() + 2 * torch.eye(3).double()
    other.cores[0].data = torch.einsum("amnwb,bc->amnwc", layer.cores[0].detach(), matrix)
    other.cores[1].data = torch.einsum("ab,bmnwc->amnwc", matrix.inverse(), layer.cores[1].detach())
    torch.testing.assert_close(other.weight, layer.weight)
    changes = []
    for each in (layer, other):
        _, natural = natural_step(each, statistics)
        _, change = torch.autograd.functional.jvp(
            lambda *cores: dense_weight(cores, case[1]),
            tuple(core.detach() for core in each.cores),
            tuple(natural),
        )
        changes.append(change)
    plain = [core.grad.norm() for core in layer.cores]
    assert not torch.allclose(
        torch.stack(plain), torch.stack([core.grad.norm() for core in other.cores]), rtol=0.05
    )
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-6, atol=1e-6 * float(changes[0].abs().max()))


def test_what_the_cores_stand_between_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natural_gradient, "RENEWED_EVERY", 3)
    layer, statistics = tt_layer(CASES[0])
    natural = NaturalGradient({"layer": layer}, statistics)
    lengths = []
    for step in range(4):
        for core in layer.cores:
            core.grad = torch.ones_like(core)
        natural.apply()
        lengths.append(float(layer.cores[0].grad.norm()))
        if step == 0:
            layer.cores[1].data *= 2
    assert lengths[0] == lengths[1] == lengths[2]
    assert lengths[3] == pytest.approx(lengths[0] / 4)


def test_a_step_along_one_core_goes_to_the_least_loss() -> None:
    """The output is linear in one core, so that a line search finds no better step."""
    for case, images in (
        (CASES[1], torch.randn(20, 8).double()),
        (CASES[3], torch.randn(6, 4, 5, 5).double()),
    ):
        for trained in range(3):
            layer, statistics = tt_layer(case)
            for k, core in enumerate(layer.cores):
                core.requires_grad_(k == trained)
            target = torch.randn(layer(images).shape, generator=seeded(1)).double()
            start = [core.detach().clone() for core in layer.cores]
            best = NaturalGradient({"layer": layer}, statistics).best_step(
                layer, plain_answer, [(images, target)]
            )
            for core, before in zip(layer.cores, start, strict=True):
                torch.testing.assert_close(core.detach(), before, rtol=1e-12, atol=1e-12)
            core, direction = layer.cores[trained], layer.cores[trained].grad
            losses = []
            for factor in (0, 0.98, 1, 1.02):
                core.data = start[trained] - factor * best * direction
                missed = layer(images) - target
                missed = missed - missed.mean(1, keepdim=True) if missed.dim() == 2 else missed
                losses.append(float(missed.detach().square().sum()))
            assert min(losses) == losses[2] < losses[0]


@cases
def test_the_best_step_is_that_of_the_linearised_network(case: Case) -> None:
    """t = <r, J d> / ||J d||^2 for what is missed r and the change J d of the output along the direction."""
    layer, statistics = tt_layer(case)
    images = torch.randn(10, *((case[1][1],) if len(case[1]) == 2 else (case[1][1], 6, 5))).double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Softplus())
    target = torch.randn(model(images).shape).double()
    best = NaturalGradient({"layer": layer}, statistics).best_step(model, plain_answer, [(images, target)])
    direction = {f"0.cores.{k}": core.grad for k, core in enumerate(layer.cores)}
    values = {name: value.detach() for name, value in model.named_parameters()}
    run = partial(torch.func.functional_call, model, args=images)
    still = {name: torch.zeros_like(value) for name, value in values.items()}
    output, change = torch.func.jvp(run, (values,), (still | direction,))
    change = change - change.mean(1, keepdim=True)
    assert best == pytest.approx(float(((output - target) * change).sum() / change.square().sum()), rel=0.02)


# -------------------------------------------------------------------------------------------------------- refine


class Tokens(nn.Module):
    """Whole numbers in, which take no mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(self.embed(tokens))).mean(1))  # type: ignore[no-any-return]


LAYERS = {"images": ("3",), "tokens": ("up",), "vectors": ("0", "2")}


def toy(name: str) -> tuple[nn.Module, Calibration]:
    torch.manual_seed(0)
    if name == "images":
        body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, bias=False)]
        model: nn.Module = nn.Sequential(
            *body, nn.BatchNorm2d(12), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(5)
        )
        inputs = torch.randn(128, 3, 8, 8).cumsum(2).cumsum(3) / 4
    elif name == "tokens":
        model, inputs = Tokens(), torch.randint(0, 11, (128, 5))
    else:
        model = nn.Sequential(
            nn.Linear(12, 20, bias=False), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)
        )
        inputs = torch.randn(128, 12)
    model(inputs)
    [*model.parameters()][-2].data *= 5
    calibration = draw_calibration(
        "toy", 128, None, 0, lambda indices: inputs[torch.tensor(indices)].split(64)
    )
    return model.eval().requires_grad_(False), calibration


def perturbed(name: str) -> tuple[nn.Module, nn.Module, Statistics, Calibration]:
    dense, calibration = toy(name)
    model = deepcopy(dense)
    plan = apply_plan(
        model, make_plan(dense, Recipe(ranks=3, conv_ranks=3, format="lowrank", include=LAYERS[name]))
    )
    assert [layer.fqn for layer in plan.layers] == [*LAYERS[name]]
    with torch.no_grad():
        for layer in plan.layers:
            for core in model.get_submodule(layer.fqn).cores:
                core *= 1 + 0.1 * torch.randn(core.shape, generator=seeded(1))
    return (
        dense,
        model,
        measure(dense, {layer.fqn: layer.spec for layer in plan.layers}, calibration, 0),
        calibration,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_refinement_brings_the_network_nearer_and_repeats_with_the_seed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "STEP", 0.1)
    dense, start, statistics, calibration = perturbed(name)
    before, states = (
        network_error(dense, start, calibration),
        [deepcopy(each.state_dict()) for each in (dense, start)],
    )
    models = [deepcopy(start) for _ in range(3)]
    calls: list[tuple[str, int, int]] = []
    for model, seed in zip(models, (3, 3, 4), strict=True):
        refine(Reference(dense, statistics, calibration), model, 40, seed, lambda *call: calls.append(call))
    assert {call[1] for call in calls} == {*range(1, 41)}
    assert max(network_error(dense, model, calibration) for model in models) < 0.9 * before
    one, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, same[key]) for key, value in one.items())
    assert all(torch.equal(value, other[key]) for key, value in one.items()) == (name == "tokens")
    trained = {key for key, _ in start.named_parameters()}
    assert all(torch.equal(value, states[1][key]) == (key not in trained) for key, value in one.items())
    assert not any(module.training for module in models[0].modules())
    assert all(torch.equal(value, states[0][key]) for key, value in dense.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in dense.parameters())


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-7)


def test_steps_that_are_too_long_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt begins at the same parameters with a fifth of the length; after the last nothing has changed."""
    dense, model, statistics, calibration = perturbed("images")
    before, rates = deepcopy(model.state_dict()), []
    descend = refinement._descend

    def watched(
        model: nn.Module, answer: Any, natural: Any, answered: Any, schedule: Schedule, *rest: Any
    ) -> bool:
        rates.append(schedule.core_rate)
        assert schedule.adam_rate / schedule.core_rate == pytest.approx(refinement.ADAM_RATE / rates[0])
        assert_same(model, before)
        assert all(parameter.grad is None for parameter in model.parameters())
        return descend(model, answer, natural, answered, schedule, *rest)

    monkeypatch.setattr(refinement, "_descend", watched)
    monkeypatch.setattr(refinement, "STEP", 1e4)
    refine(Reference(dense, statistics, calibration), model, 25, 0)
    assert rates == pytest.approx([rates[0], rates[0] / 5, rates[0] / 25])
    assert_same(model, before)


@pytest.mark.parametrize(("rate", "down"), [(0.0, False), (1e-3, True)])
def test_steps_that_do_not_bring_the_error_down_have_failed(rate: float, down: bool) -> None:
    """Also where they end at no more than DIVERGED times the error at which they began."""
    dense, model, statistics, calibration = perturbed("vectors")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TTLinear)}
    images = next(iter(calibration.fitting(0)))
    natural, answered = NaturalGradient(layers, statistics), repeat([(images, dense(images))])
    errors = [network_error(dense, model, calibration)]
    assert (
        refinement._descend(
            model.requires_grad_(), plain_answer, natural, answered, Schedule(30, rate, 0.0), None
        )
        == down
    )
    errors.append(network_error(dense, model, calibration))
    assert errors[1] < refinement.DIVERGED * errors[0]
    assert (errors[1] < errors[0]) == down


class Made(TorchDispatchMode):
    """The bytes of the largest tensor that an operator makes."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(each) for each in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor) and id(each) not in given]
        self.most = max([self.most, *(each.nbytes for each in made)])
        return result


def test_a_step_makes_no_copy_of_a_large_parameter() -> None:
    """After the first one, which makes the averages that Adam keeps."""
    model = nn.Sequential(nn.Embedding(1000, 16), nn.LayerNorm(16))
    adam = refinement._adam(list(model.parameters()), 0.01)
    for step in range(2):
        model(torch.arange(9)).square().sum().backward()
        with Made() as made:
            adam.step()
        assert (made.most < model[0].weight.nbytes) == (step > 0)


PLACED = {
    "contiguous": lambda: torch.randn(4, 6),
    "transposed": lambda: torch.randn(4, 6).T,
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "part of another": lambda: torch.randn(4, 6)[:, :3],
    "complex": lambda: torch.randn(4, 6, dtype=torch.complex64),
    "float64": lambda: torch.randn(4, 6).double(),
}


@pytest.mark.parametrize("name", PLACED)
def test_adam_comes_to_the_same_however_a_parameter_lies_in_memory(name: str) -> None:
    """Against torch's own, operator by operator."""
    ends = []
    for optimizer in (partial(refinement._adam, rate=0.1), partial(torch.optim.Adam, lr=0.1, fused=False)):
        torch.manual_seed(0)
        parameter = nn.Parameter(PLACED[name]())
        adam = optimizer([parameter])
        for _ in range(3):
            adam.zero_grad()
            (parameter - 2).abs().square().sum().backward()
            adam.step()
        ends.append(parameter.detach().clone())
    torch.testing.assert_close(*ends)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [Schedule(200, 0.1, 0.1).share(step) for step in range(201)]
    assert rates.index(max(rates)) == 19
    assert (max(rates), rates[200]) == (1.0, 0.0)
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
