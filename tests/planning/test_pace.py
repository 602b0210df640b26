"""Forms that cost time: found by the cost model, left out where a plan loses little by it, and named where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
import torch
from torch import nn

from ttcompress.layers.spec import layer_spec
from ttcompress.planning.candidates import Candidate, Limit
from ttcompress.planning.pace import FASTER, WORTH_TIME, Pace, fewest_slow
from ttcompress.planning.planner import Planner, make_plan
from ttcompress.planning.selection import Layer
from ttcompress.recipe import Recipe
from ttcompress.records.plan import CompressionPlan
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.cost import Calls, LayerCosts
from ttcompress.tt.decompose import squared_spectra
from ttcompress.tt.shapes import Tensorization, feasible_ranks, tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def listed(fqn: str, module: nn.Linear | nn.Conv2d) -> Layer:
    return Layer(fqn, module, layer_spec(module))


CONV = listed("conv", nn.Conv2d(64, 48, 3, padding=1))
WIDE = listed("wide", nn.Linear(1024, 256))


def pace_of(layer: Layer, pixels: int, training: bool = False) -> Pace:
    return Pace(training, {layer.fqn: Calls(pixels, pixels)})


def shape_of(layer: Layer) -> tuple[int, ...]:
    return tuple(layer.module.weight.shape)


def limited(layer: Layer, name: str, pace: Pace) -> tuple[Tensorization, Limit]:
    tensorization = tensorize_shape(name, shape_of(layer))
    limit = pace.limit(layer, tensorization)
    assert limit is not None
    return tensorization, limit


def random_net(*sides: int) -> nn.Sequential:
    torch.manual_seed(0)
    pairs = zip(sides[:-1], sides[1:], strict=True)  # noqa: RUF007
    return nn.Sequential(*(nn.Linear(inp, out) for inp, out in pairs))


def structured(rank: int) -> nn.Sequential:
    """One layer whose weight is a TT-matrix, and of full rank as a matrix."""
    net = random_net(512, 512)
    view = tensorize_shape("matrix", (512, 512))
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(shape, generator=generator) for shape in view.core_shapes((1, 16, rank, 16, 1))]
    with torch.no_grad():
        net[0].weight.copy_(dense_weight(cores, (512, 512)))
    return net


def planned(net: nn.Module, any_time: bool | None = None, **target: float) -> CompressionPlan:
    recipe = Recipe(include=("*",), any_time=any_time, **target)  # type: ignore[arg-type]
    return make_plan(net, recipe)


def formats(plan: CompressionPlan) -> Mapping[str, str]:
    return {layer.fqn: layer.tensorization.format for layer in plan.layers}


# ------------------------------------------------------------------------------------------------------------ the limit


@pytest.mark.parametrize("name", ["chain", "lowrank", "naive"])
@pytest.mark.parametrize("pixels", [256, 1024])
def test_the_best_within_the_limit_is_the_best_of_all_faster_forms(name: str, pixels: int) -> None:
    tensorization, limit = limited(CONV, name, pace_of(CONV, pixels))
    weight = torch.randn(48, 64, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    candidate = Candidate(tensorization, squared_spectra(weight, tensorization), rank_multiple=4, limit=limit)
    costs = LayerCosts((48, 64, 3, 3), Calls(pixels, pixels))

    free = Candidate(tensorization, squared_spectra(weight, tensorization), rank_multiple=4)
    possible = [(1, *inner, 1) for inner in product(*free.ranks)]
    feasible = [ranks for ranks in possible if feasible_ranks(tensorization.sizes, ranks) == ranks]
    faster = [ranks for ranks in feasible if costs.step_ratio(tensorization, ranks, training=False) <= FASTER]
    assert 0 < len(faster) < len(feasible)

    for price in (1e-7, 1e-6, 1e-5, 1e-4):
        best = candidate.best_at(price)
        least = min(choice.error + price * choice.cost for choice in map(candidate.choice, faster))
        assert best.tt_ranks in faster
        assert best.error + price * best.cost == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("by", [1, -1])
def test_no_step_leaves_the_limit(by: int) -> None:
    tensorization, limit = limited(CONV, "chain", pace_of(CONV, 1024))
    weight = torch.randn(48, 64, 3, 3, generator=torch.Generator().manual_seed(1))
    candidate = Candidate(tensorization, squared_spectra(weight, tensorization), limit=limit)
    for left, right in product((1, 7, 16, 20, 30), (1, 8, 16, 22, 31)):
        assert all(limit(step.tt_ranks) for step in candidate.steps((1, left, right, 1), by))


def test_one_rank_bounds_a_contraction_of_many_cores() -> None:
    pace = pace_of(WIDE, 1)
    tensorization, limit = limited(WIDE, "matrix", pace)
    most = max(rank for rank in range(1, 257) if limit(tensorization.expand_ranks(rank)))
    capped = [
        feasible_ranks(tensorization.sizes, tensorization.expand_ranks(rank)) for rank in (most, most + 1)
    ]
    candidates = [
        Candidate(tensorization, [torch.ones(top) / top for top in tensorization.max_ranks()[1:-1]])
        for _ in range(2)
    ]
    within, beyond = (
        pace.is_faster(WIDE, candidate.choice(ranks))
        for candidate, ranks in zip(candidates, capped, strict=True)
    )
    assert within
    assert not beyond


def test_training_only_takes_forms_away() -> None:
    for layer, name, pixels in [
        (WIDE, "lowrank", 1),
        (WIDE, "matrix", 1),
        (CONV, "chain", 256),
        (CONV, "lowrank", 256),
    ]:
        tensorization, limit = limited(layer, name, pace_of(layer, pixels))
        stricter = pace_of(layer, pixels, training=True).limit(layer, tensorization)
        for rank in range(1, max(tensorization.max_ranks())):
            ranks = feasible_ranks(tensorization.sizes, tensorization.expand_ranks(rank))
            assert limit(ranks) or stricter is None or not stricter(ranks)


def test_a_form_that_is_never_faster_has_no_limit() -> None:
    small = listed("small", nn.Conv2d(8, 8, 3))
    assert pace_of(small, 64).limit(small, tensorize_shape("chain", (8, 8, 3, 3))) is None


# ------------------------------------------------------------------------------------------------------------ the plans


@pytest.mark.parametrize("ratio", [2.0, 3.0, 5.0])
def test_a_slow_form_is_left_out_where_that_costs_little(ratio: float) -> None:
    """Flat spectra: the TT-matrix is better by a percent, and its contraction is slower than the dense layer."""
    net = random_net(1024, 256)
    at_any_time, plan = planned(net, any_time=True, ratio=ratio), planned(net, ratio=ratio)
    assert formats(at_any_time) == {"0": "matrix"}
    assert formats(plan) == {"0": "lowrank"}
    assert plan.notes == ()
    assert ratio <= plan.compression <= 1.02 * ratio

    (before,), (after,) = at_any_time.layers, plan.layers
    assert before.predicted_error is not None
    assert after.predicted_error is not None
    assert after.predicted_error <= WORTH_TIME * before.predicted_error


@pytest.mark.parametrize("target", [{"ratio": 4.0}, {"eps": 0.01}], ids=str)
def test_a_slow_form_is_kept_and_named_where_it_is_far_better(target: dict[str, float]) -> None:
    net = structured(rank=48)
    plan = planned(net, **target)
    assert plan.layers == planned(net, any_time=True, **target).layers
    assert formats(plan) == {"0": "matrix"}
    assert "0 runs no faster than dense in inference; without such forms" in plan.notes[0]
    assert "times" in plan.notes[0]


def test_a_fast_form_needs_no_note() -> None:
    plan = planned(structured(rank=2), ratio=100)
    assert formats(plan) == {"0": "matrix"}
    assert plan.notes == ()


def test_under_eps_a_slow_form_goes_where_parameters_rise_little() -> None:
    net = random_net(1024, 256)
    at_any_time, plan = planned(net, any_time=True, eps=0.6), planned(net, eps=0.6)
    assert formats(at_any_time) == {"0": "matrix"}
    assert formats(plan) == {"0": "lowrank"}
    assert plan.params_after <= WORTH_TIME * at_any_time.params_after


def test_a_format_that_is_named_is_asked_for() -> None:
    recipe = Recipe(include=("*",), ratio=3, format="matrix")
    plan = make_plan(random_net(1024, 256), recipe)
    assert formats(plan) == {"0": "matrix"}
    assert plan.notes == ()


def test_what_a_layer_does_decides() -> None:
    """With few pixels a convolution of 128 channels is slower as a chain, with many it is faster."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    recipe = Recipe(include=("*",), ratio=3)
    notes = []
    for pixels in (4, 4096):
        planner = Planner(net, recipe)
        planner.pace = Pace(calls={"0": Calls(pixels, pixels)})
        notes.append(planner.plan(recipe).notes)
    assert "0 runs no faster than dense" in notes[0][0]
    assert notes[1] == ()


# ------------------------------------------------------------------------------------------------------------ the search


def test_those_that_lose_least_go_first() -> None:
    losses = {3: 0.5, 5: 0.1, 7: 0.3, 8: 0.2}
    for affordable in (0.0, 0.05, 0.15, 0.35, 0.65):

        def is_good(may_be_slow: frozenset[int], affordable: float = affordable) -> bool:
            return sum(loss for index, loss in losses.items() if index not in may_be_slow) <= affordable

        found = fewest_slow([*losses], [*losses.values()], is_good)
        assert is_good(found)
        order = sorted(losses, key=lambda index: losses[index])
        assert [*found] == [] or sorted(found) == sorted(order[len(losses) - len(found) :])
        fewer = frozenset(order[len(losses) - len(found) + 1 :])
        assert not fewer or not is_good(fewer)


# ------------------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("target", [{"ratio": 3.0}, {"ratio": 10.0}, {"eps": 0.6}, {"eps": 0.05}], ids=str)
@pytest.mark.parametrize("any_time", [None, True])
@pytest.mark.parametrize(
    "net", [random_net(1024, 256, 512), structured(48), structured(3)], ids=["flat", "48", "3"]
)
def test_bounds_of_spectra_change_no_plan(
    net: nn.Module, any_time: bool | None, target: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = planned(net, any_time=any_time, **target)
    monkeypatch.setattr("ttcompress.planning.spectra.BOUNDED_ABOVE", 20)
    assert planned(net, any_time=any_time, **target) == exact


def test_spectra_that_no_choice_rests_on_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttcompress.planning.spectra.BOUNDED_ABOVE", 20)
    recipe = Recipe(include=("*",), ratio=10)
    bounded = []
    for net in (random_net(1024, 256), structured(48)):
        planner = Planner(net, recipe)
        planner.plan(recipe)
        bounded += [each.is_bound for each in planner._spectra[0].tensorizations]
    assert bounded == [True, False, False, False]
