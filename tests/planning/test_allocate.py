"""Rank choices under a budget or an accuracy, against brute force over all of them on small tensors."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from math import prod, sqrt

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ttcompress.errors import PlanError
from ttcompress.planning.allocate import fewest_params, total_cost, within_budget
from ttcompress.planning.candidates import Candidate, Choice, LayerOptions
from ttcompress.planning.nearest import nearest_below
from ttcompress.tt.decompose import decompose_weight, squared_spectra
from ttcompress.tt.shapes import FORMATS, Tensorization, tensorize_shape

SHAPES: list[tuple[int, ...]] = [(6, 5, 3, 3), (8, 8, 1, 3), (16, 12), (9, 7, 2, 2)]
PRICES = [10.0**exponent for exponent in np.arange(-7.0, 0.0, 0.5)]

Weight = NDArray[np.float64]
Menu = list[tuple[int, float]]


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def weight_of(shape: tuple[int, ...], seed: int = 0) -> Weight:
    """Singular values that decay, so that ranks differ in worth."""
    rng = np.random.default_rng(seed + sum(shape))
    values = rng.standard_normal(shape)
    for axis, size in enumerate(shape):
        decay = 0.6 ** np.arange(size)
        values = values * decay.reshape([-1 if axis == k else 1 for k in range(len(shape))])
    return np.asarray(values)


def tensorizations(shape: tuple[int, ...]) -> list[Tensorization]:
    modes = {(16, 12): ((4, 4), (4, 3)), (8, 8, 1, 3): ((2, 4), (4, 2))}.get(shape)
    made = [tensorize_shape(name, shape) for name in FORMATS if name != "matrix"]
    return [*made, tensorize_shape("matrix", shape, *modes)] if modes else made


def options_of(shape: tuple[int, ...], seed: int = 0) -> LayerOptions:
    weight = torch.tensor(weight_of(shape, seed))
    candidates = [Candidate(each, squared_spectra(weight, each)) for each in tensorizations(shape)]
    return LayerOptions(
        weight.numel(), tuple({each.tensorization.modes: each for each in candidates}.values())
    )


@cache
def every_choice(shape: tuple[int, ...], modes: tuple[tuple[int, ...], ...], seed: int = 0) -> Menu:
    """The oracle: (parameters, squared error bound) of all feasible TT-ranks of one tensorization, by NumPy."""
    viewed = tensor_of(shape, modes, seed)
    sizes = viewed.shape
    tails, tops = [], []
    for k in range(1, len(sizes)):
        values = np.linalg.svd(viewed.reshape(prod(sizes[:k]), -1), compute_uv=False) ** 2
        tails.append([values[rank:].sum() / values.sum() for rank in range(len(values) + 1)])
        tops.append(len(values))
    found = []
    for inner in product(*(range(1, top + 1) for top in tops)):
        ranks = (1, *inner, 1)
        cores = list(zip(ranks[:-1], sizes, ranks[1:], strict=True))
        if all(right <= left * size and left <= size * right for left, size, right in cores):
            bound = sum(tail[rank] for tail, rank in zip(tails, inner, strict=True))
            found.append((sum(left * size * right for left, size, right in cores), float(bound)))
    return found


def tensor_of(shape: tuple[int, ...], modes: tuple[tuple[int, ...], ...], seed: int) -> Weight:
    outs, ins, windows = zip(*modes, strict=True)
    weight, count = weight_of(shape, seed).reshape(*shape[:2], -1), len(modes)
    padded = np.zeros((prod(outs), prod(ins), prod(windows)))
    padded[: shape[0], : shape[1]] = weight
    axes = [base + k for k in range(count) for base in (0, count, 2 * count)]
    return padded.reshape(*outs, *ins, *windows).transpose(axes).reshape([prod(mode) for mode in modes])


def menu_of(options: LayerOptions, shape: tuple[int, ...], seed: int = 0) -> Menu:
    """All that a layer can be: dense, or any feasible ranks of any candidate that save parameters."""
    modes = [tuple(map(tuple, each.tensorization.modes)) for each in options.candidates]
    choices = [choice for each in modes for choice in every_choice(shape, each, seed)]
    return [(options.dense_params, 0.0), *(choice for choice in choices if choice[0] < options.dense_params)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectra_bound_every_choice_as_numpy_says(shape: tuple[int, ...]) -> None:
    for candidate in options_of(shape).candidates:
        modes = tuple(map(tuple, candidate.tensorization.modes))
        tops = candidate.tensorization.max_ranks()
        oracle = dict(every_choice(shape, modes))
        assert candidate.choice(tops).error == 0
        ones = candidate.choice((1,) * len(tops))
        assert oracle[ones.cost] == pytest.approx(ones.error, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("price", PRICES, ids=lambda price: f"{price:.0e}")
def test_best_at_a_price_is_the_best_of_all_rank_choices(shape: tuple[int, ...], price: float) -> None:
    options = options_of(shape)
    for candidate in options.candidates:
        oracle = every_choice(shape, tuple(map(tuple, candidate.tensorization.modes)))
        best = candidate.best_at(price)
        assert best.cost == candidate.tensorization.num_params(best.tt_ranks)
        assert best.error + price * best.cost == pytest.approx(
            min(error + price * params for params, error in oracle), rel=1e-9, abs=1e-14
        )
    layer = options.best_at(price)
    assert layer.error + price * layer.cost <= price * options.dense_params
    assert layer.cost <= options.dense_params


def network(seed: int = 0) -> tuple[list[LayerOptions], list[Menu]]:
    options = [options_of(shape, seed) for shape in SHAPES]
    return options, [menu_of(*pair, seed) for pair in zip(options, SHAPES, strict=True)]


@pytest.mark.parametrize("seed", range(2))
def test_a_budget_is_never_exceeded_and_no_layer_grows(seed: int) -> None:
    options, menus = network(seed)
    least = sum(min(params for params, _ in menu) for menu in menus)
    dense = sum(each.dense_params for each in options)
    for budget in range(least, dense, 31):
        choices = within_budget(options, budget)
        assert total_cost(choices) <= budget
        assert sum(choice.cost for choice in choices) == total_cost(choices)
        assert all(choice.cost <= each.dense_params for choice, each in zip(choices, options, strict=True))


def test_a_budget_below_all_ranks_one_is_refused() -> None:
    options, menus = network()
    least = sum(min(params for params, _ in menu) for menu in menus)
    assert total_cost(within_budget(options, least)) == least
    with pytest.raises(PlanError, match=f"needs {least}"):
        within_budget(options, least - 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_layer_under_a_budget_is_close_to_the_best_of_all_rank_choices(shape: tuple[int, ...]) -> None:
    """Never better than brute force, and never worse than the best with three tenths of the budget less."""
    options = options_of(shape)
    menu = menu_of(options, shape)
    for budget in range(min(params for params, _ in menu), options.dense_params, 9):
        (choice,) = within_budget([options], budget)
        best = min(error for params, error in menu if params <= budget)
        below = min((error for params, error in menu if params <= 0.7 * budget), default=1.0)
        assert best - 1e-12 <= choice.error <= below + 1e-12


def test_more_budget_never_means_much_more_error() -> None:
    options, _ = network()
    budgets = range(200, sum(each.dense_params for each in options), 60)
    errors = [sum(choice.error for choice in within_budget(options, budget)) for budget in budgets]
    assert all(later <= 1.05 * earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < 0.01 * errors[0]


@pytest.mark.parametrize("seed", range(2))
def test_nearest_below_reaches_the_total_nearest_to_the_budget(seed: int) -> None:
    options, menus = network(seed)
    options, menus = options[:3], menus[:3]
    least = sum(min(params for params, _ in menu) for menu in menus)
    totals = np.zeros(1, dtype=int)
    for menu in menus:
        totals = np.unique(totals[:, None] + np.array(sorted({params for params, _ in menu}))[None, :])
    for budget in range(least, int(totals[-1]), 43):
        found = nearest_below(options, within_budget(options, budget), budget)
        assert total_cost(found) == totals[totals <= budget].max()
        for choice, menu in zip(found, menus, strict=True):
            best = min(error for params, error in menu if params == choice.cost)
            assert choice.error == pytest.approx(best, rel=1e-9, abs=1e-14)


EPS = [0.9, 0.5, 0.3, 0.1, 0.05, 0.01, 1e-3]


def measured(choice: Choice, shape: tuple[int, ...]) -> float:
    if choice.candidate is None:
        return 0.0
    weight = torch.tensor(weight_of(shape))
    return decompose_weight(weight, choice.candidate.tensorization, choice.tt_ranks).relative_error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", EPS)
def test_fewest_params_keeps_eps_by_the_measured_error(shape: tuple[int, ...], eps: float) -> None:
    choice = fewest_params(options_of(shape), eps)
    assert measured(choice, shape) <= choice.relative_error + 1e-12
    assert choice.relative_error <= eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", EPS)
def test_fewest_params_is_no_larger_than_the_same_share_of_eps_for_every_cut(
    shape: tuple[int, ...], eps: float
) -> None:
    """Plain TT-SVD takes delta = eps ||A|| / sqrt(d - 1) at every unfolding, and then the ranks that are feasible."""
    options = options_of(shape)
    choice = fewest_params(options, eps)
    for candidate in options.candidates:
        modes = tuple(map(tuple, candidate.tensorization.modes))
        viewed, share = tensor_of(shape, modes, 0), eps**2 / max(1, len(modes) - 1)
        ranks = [1]
        for k in range(1, viewed.ndim):
            values = np.linalg.svd(viewed.reshape(prod(viewed.shape[:k]), -1), compute_uv=False) ** 2
            tails = [values[rank:].sum() / values.sum() for rank in range(len(values) + 1)]
            ranks.append(next(rank for rank in range(1, len(tails)) if tails[rank] <= share))
        plain = sum(
            left * size * right
            for left, size, right in zip(ranks, viewed.shape, [*ranks[1:], 1], strict=True)
        )
        assert choice.cost <= min(plain, options.dense_params)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", EPS)
def test_fewest_params_against_brute_force(shape: tuple[int, ...], eps: float) -> None:
    options = options_of(shape)
    best = min(params for params, error in menu_of(options, shape) if sqrt(error) <= eps)
    assert best <= fewest_params(options, eps).cost <= 1.1 * best
