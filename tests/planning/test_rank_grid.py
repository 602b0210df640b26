"""TT-ranks on a grid: only its ranks are chosen, the best of them, and budgets are met as without one."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from ttcompress.errors import PlanError
from ttcompress.planning.allocate import fewest_params, within_budget
from ttcompress.planning.candidates import Candidate, LayerOptions, ranks_on_grid
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.plan import CompressionPlan
from ttcompress.tt.decompose import squared_spectra
from ttcompress.tt.shapes import FORMATS, feasible_ranks, tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def decaying(*shape: int, decay: float = 0.9) -> torch.Tensor:
    """A weight whose singular values fall off along every axis."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    for axis, size in enumerate(shape):
        factors = decay ** torch.arange(size)
        values *= factors.reshape([-1 if axis == k else 1 for k in range(len(shape))])
    return values


def is_on_grid(rank: int, most: int, multiple: int) -> bool:
    """The definition, said otherwise than in the code."""
    is_power_of_two = rank & (rank - 1) == 0
    return rank == most or rank % multiple == 0 or (rank < multiple and is_power_of_two)


def network(*sides: int) -> nn.Sequential:
    """Fully-connected layers, of which the last stays dense by default."""
    layers = [nn.Linear(inp, out) for inp, out in pairwise(sides)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(decaying(*layer.weight.shape, decay=0.97))
    return nn.Sequential(*layers)


def inner_ranks(plan: CompressionPlan) -> list[tuple[int, int]]:
    """Every TT-rank of a plan with the most that its cut carries."""
    return [
        pair
        for layer in plan.layers
        for pair in zip(layer.tt_ranks[1:-1], layer.tensorization.max_ranks()[1:-1], strict=True)
    ]


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 12, 100])
@pytest.mark.parametrize("most", [1, 2, 7, 8, 9, 64, 100])
def test_the_grid_is_what_its_definition_says(most: int, multiple: int) -> None:
    expected = [rank for rank in range(1, most + 1) if is_on_grid(rank, most, multiple)]
    assert [*ranks_on_grid(most, multiple)] == expected


@pytest.mark.parametrize("multiple", [2, 3, 5])
@pytest.mark.parametrize("price", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(12, 10, 3, 3), (16, 12)], ids=str)
def test_the_best_at_a_price_is_the_best_of_all_ranks_on_the_grid(
    shape: tuple[int, ...], price: float, multiple: int
) -> None:
    weight = decaying(*shape, decay=0.7)
    for name in FORMATS:
        tensorization = tensorize_shape(name, shape)
        candidate = Candidate(tensorization, squared_spectra(weight, tensorization), rank_multiple=multiple)
        tops = tensorization.max_ranks()[1:-1]
        grids = [[rank for rank in range(1, top + 1) if is_on_grid(rank, top, multiple)] for top in tops]
        all_ranks = [(1, *inner, 1) for inner in product(*grids)]
        possible = [ranks for ranks in all_ranks if feasible_ranks(tensorization.sizes, ranks) == ranks]

        values = [choice.error + price * choice.cost for choice in map(candidate.choice, possible)]
        best = candidate.best_at(price)
        assert best.tt_ranks in possible
        assert best.error + price * best.cost == pytest.approx(min(values), rel=1e-9)


@pytest.mark.parametrize("by", [1, -1])
def test_steps_go_to_the_neighbours_on_the_grid(by: int) -> None:
    tensorization = tensorize_shape("chain", (24, 20, 3, 3))
    candidate = Candidate(
        tensorization, squared_spectra(decaying(24, 20, 3, 3), tensorization), rank_multiple=4
    )
    for now in [(1, 8, 12, 1), (1, 4, 4, 1), (1, 20, 24, 1), (1, 7, 9, 1)]:
        for step in candidate.steps(now, by):
            (cut,) = [cut for cut in range(4) if step.tt_ranks[cut] != now[cut]]
            grid, rank = candidate.ranks[cut - 1], step.tt_ranks[cut]
            between = grid[bisect_left(grid, min(rank, now[cut])) : bisect_left(grid, max(rank, now[cut]))]
            assert rank in grid
            assert (rank - now[cut]) * by > 0
            assert [each for each in between if each not in (rank, now[cut])] == []


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.8])
def test_budgets_and_eps_choose_from_the_grid_and_keep_their_word(multiple: int, share: float) -> None:
    weight = decaying(48, 40, 3, 3)
    made = [tensorize_shape(name, (48, 40, 3, 3)) for name in FORMATS]
    candidates = [Candidate(each, squared_spectra(weight, each), rank_multiple=multiple) for each in made]
    options = LayerOptions(weight.numel(), tuple(candidates))

    budget = int(share * weight.numel())
    (choice,) = within_budget([options], budget)
    small = fewest_params(options, share)
    assert choice.cost <= budget
    assert small.relative_error <= share
    for each in (choice, small):
        assert each.candidate is not None
        pairs = zip(each.tt_ranks[1:-1], each.candidate.ranks, strict=True)
        assert all(rank in grid for rank, grid in pairs)


def test_auto_aligns_layers_with_long_sides_and_no_others() -> None:
    plan = make_plan(network(256, 192, 96, 160, 10), Recipe(ratio=2))
    by_name = {layer.fqn: layer for layer in plan.layers}
    assert plan.compression >= 2
    assert plan.params_after * 1.02 >= plan.params_before / 2
    assert all(is_on_grid(rank, 1 << 30, 8) for rank in by_name["0"].tt_ranks[1:-1])
    others = [rank for name in ("1", "2") if name in by_name for rank in by_name[name].tt_ranks[1:-1]]
    assert any(rank % 8 for rank in others)


@pytest.mark.parametrize("ratio", [1.5, 2, 3])
def test_auto_meets_a_budget_that_lies_between_the_ranks_of_the_grid(ratio: float) -> None:
    """One layer, whose multiples of 8 are 4,000 parameters apart: without the grid ranks are fine enough."""
    plan = make_plan(network(256, 256), Recipe(ratio=ratio, include=("*",), format="lowrank"))
    assert ratio <= plan.compression <= 1.02 * ratio
    assert plan.notes == ()


def test_a_multiple_that_is_asked_for_is_kept_and_a_missed_window_is_said() -> None:
    recipe = Recipe(ratio=3, include=("*",), format="lowrank", rank_multiple=32)
    plan = make_plan(network(256, 256), recipe)
    assert plan.layers[0].tt_ranks == (1, 32, 1)
    assert plan.compression > 3.06
    assert "no rank choice by multiples of 32 lies within 2 % of --ratio 3" in plan.notes[0]


@pytest.mark.parametrize("target", [{"ratio": 2.5}, {"eps": 0.3}, {"params": 40_000}], ids=str)
def test_every_target_keeps_to_the_grid(target: dict[str, float]) -> None:
    recipe = Recipe(rank_multiple=16, **target)  # type: ignore[arg-type]
    plan = make_plan(network(256, 192, 96, 160, 10), recipe)
    assert plan.layers
    assert all(is_on_grid(rank, most, 16) for rank, most in inner_ranks(plan))


def test_a_grid_reaches_as_far_as_none() -> None:
    net = network(256, 192, 96, 10)
    reached = [make_plan(net, Recipe(params=params, rank_multiple=8)).params_after for params in (2100, 2500)]
    assert all(after <= params for after, params in zip(reached, (2100, 2500), strict=True))
    with pytest.raises(PlanError, match="out of reach") as on_grid:
        make_plan(net, Recipe(params=100, rank_multiple=8))
    with pytest.raises(PlanError, match="out of reach") as off_grid:
        make_plan(net, Recipe(params=100, rank_multiple=1))
    assert str(on_grid.value) == str(off_grid.value)


def test_ranks_by_hand_know_no_grid() -> None:
    with pytest.raises(PlanError, match="--rank-multiple is for --eps and budgets"):
        make_plan(network(64, 64, 10), Recipe(ranks=4, rank_multiple=8))


@pytest.mark.parametrize("value", [0, -8, 1.5, "eight", True])
def test_a_multiple_is_a_whole_number_or_auto(value: object) -> None:
    with pytest.raises(PlanError, match="--rank-multiple must be a whole number above 0 or auto"):
        Recipe(ratio=2, rank_multiple=value)  # type: ignore[arg-type]
