"""Formats and TT-ranks under an accuracy or a budget, from the singular spectra of the weights.

The squared singular values of the unfoldings bound the error of every choice of TT-ranks, err^2 <= sum_k tail_k(r_k).
A budget counts parameters, or what running the network costs. For a price lambda of one unit the best ranks of a layer
follow by dynamic programming over its cuts, as far as its cost is a sum over its cores; the price is bisected until
the budget is met, and what is left over is spent greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from math import gcd, inf, prod, sqrt
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ttcompress.errors import PlanError
from ttcompress.tt.cost import LayerCosts
from ttcompress.tt.shapes import Tensorization, feasible_ranks

T = TypeVar("T")
EVERY_RANK_UP_TO = 64
GRID_STEP = 1.06
NUMERICALLY_ZERO = 1e-15
LISTABLE = 4096
MOST_SUMS = 2**22


class Costs(Protocol):
    """What a tensorization of one weight costs at given TT-ranks, and what each core adds to it."""

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """Of the core between these TT-ranks, for pairs of them."""


@dataclass(frozen=True)
class Parameters:
    """A tensorization costs the entries of its cores."""

    tensorization: Tensorization

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""
        return self.tensorization.num_params(tt_ranks)

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """r_{k-1} s_k r_k."""
        return left * self.tensorization.sizes[index] * right


@dataclass(frozen=True)
class Running:
    """A tensorization costs what its layer takes to run by the cores."""

    tensorization: Tensorization
    layer: LayerCosts

    def of(self, tt_ranks: Sequence[int]) -> int:
        """Exactly, for all TT-ranks."""
        return int(self.layer.unit.total(self.layer.factored(self.tensorization, tt_ranks)))

    def of_core(self, index: int, left: Tensor, right: Tensor) -> Tensor:
        """Exactly for chains of convolutions; where cores are merged before they meet the input, more than that."""
        cost: Tensor = self.layer.unit.total(self.layer.core(self.tensorization, index, left, right))
        return cost


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to store a weight: a tensorization at TT-ranks, or dense where there is none. `error` is squared."""

    cost: int
    error: float
    candidate: Candidate | None = None
    tt_ranks: tuple[int, ...] = ()

    @property
    def relative_error(self) -> float:
        """Bound of the relative Frobenius error."""
        norm = self.candidate.squared_norm if self.candidate else 0.0
        return sqrt(self.error / norm) if norm else 0.0

    @property
    def params(self) -> int | None:
        """Entries of the cores."""
        return self.candidate.tensorization.num_params(self.tt_ranks) if self.candidate else None


class Candidate:
    """A tensorization of one weight with the tails of its spectra: what each choice of TT-ranks costs and loses."""

    def __init__(
        self,
        tensorization: Tensorization,
        spectra: Sequence[Tensor],
        squared_norm: float = 1.0,
        costs: Costs | None = None,
    ) -> None:
        """`spectra`: squared singular values of the d - 1 unfoldings over ||A||^2, descending.

        `squared_norm` is ||A||^2 in whatever unit all layers that are weighed against each other share; by default
        `costs` are parameters.
        """
        self.tensorization = tensorization
        self._costs = costs or Parameters(tensorization)
        self.squared_norm = squared_norm
        self.tails = [squared_norm * _tails(spectrum) for spectrum in spectra]
        self.grids = [_grid(tail) for tail in self.tails]
        self._tails_on_grid = [tail[grid] for tail, grid in zip(self.tails, self.grids, strict=True)]
        self._core_costs = [
            _on_pairs(partial(self._costs.of_core, k), tensorization.sizes[k], *pair)
            for k, pair in enumerate(pairwise([_ONE, *self.grids, _ONE]))
        ]

    def choice(self, tt_ranks: Sequence[int]) -> Choice:
        """What these TT-ranks cost and lose."""
        error = sum(float(tail[rank]) for tail, rank in zip(self.tails, tt_ranks[1:-1], strict=True))
        return Choice(self._costs.of(tt_ranks), error, self, tuple(tt_ranks))

    def best_at(self, price: float) -> Choice:
        """TT-ranks (on the grids) of least error + price * cost, by dynamic programming over the cuts."""
        value = price * self._core_costs[0][0]
        came_from: list[Tensor] = []
        for tail, costs in zip(self._tails_on_grid, self._core_costs[1:], strict=True):
            value, best = ((value + tail)[:, None] + price * costs).min(dim=0)
            came_from.append(best)
        ranks, at = [1], 0
        for grid, best in zip(reversed(self.grids), reversed(came_from), strict=True):
            at = int(best[at])
            ranks.append(int(grid[at]))
        return self.choice((1, *reversed(ranks)))

    def steps(self, tt_ranks: Sequence[int], by: int) -> Iterator[Choice]:
        """The feasible choices one rank up (by=1) or down (by=-1) at a single cut."""
        for cut in range(1, len(tt_ranks) - 1):
            ranks = (*tt_ranks[:cut], tt_ranks[cut] + by, *tt_ranks[cut + 1 :])
            inside = 1 <= ranks[cut] < len(self.tails[cut - 1])
            if inside and feasible_ranks(self.tensorization.sizes, ranks) == ranks:
                yield self.choice(ranks)


_ONE = torch.ones(1, dtype=torch.long)


def _tails(spectrum: Tensor) -> Tensor:
    """tail[r] = sum of the squared singular values beyond the r-th, exactly 0 at the end."""
    tail = torch.zeros(len(spectrum) + 1, dtype=torch.float64)
    tail[:-1] = spectrum.flip(0).cumsum(0).flip(0)
    return tail


def _grid(tail: Tensor) -> Tensor:
    """All small ranks, then a geometric ladder, up to the numerical rank."""
    top = max(1, int((tail > NUMERICALLY_ZERO * tail[0]).sum()))
    ranks = list(range(1, min(top, EVERY_RANK_UP_TO) + 1))
    while ranks[-1] < top:
        ranks.append(min(top, int(ranks[-1] * GRID_STEP) + 1))
    return torch.tensor(ranks)


def _on_pairs(of: Callable[[Tensor, Tensor], Tensor], size: int, left: Tensor, right: Tensor) -> Tensor:
    """The costs of a core of this size for every pair of neighbouring ranks, infinite where one is infeasible."""
    shape = len(left), len(right)
    pairs = of(left[:, None].expand(shape), right[None, :].expand(shape)).double()
    infeasible = (right[None, :] > left[:, None] * size) | (left[:, None] > size * right[None, :])
    return pairs.masked_fill_(infeasible, inf)


@dataclass(frozen=True)
class LayerOptions:
    """All that is worth considering for one weight of `dense_params` entries, which costs `dense_cost` as it is.

    By default cost is parameters.
    """

    dense_params: int
    candidates: tuple[Candidate, ...]
    dense_cost: int | None = None

    @property
    def dense(self) -> Choice:
        """The weight as it is."""
        return Choice(self.dense_params if self.dense_cost is None else self.dense_cost, 0.0)

    def pays(self, choice: Choice) -> bool:
        """Whether a choice costs less and has fewer parameters than the weight as it is; no other is ever made."""
        return choice.cost < self.dense.cost and (choice.params or 0) < self.dense_params

    def best_at(self, price: float) -> Choice:
        """The choice of least error + price * cost."""
        choices = [candidate.best_at(price) for candidate in self.candidates]
        return min(
            [self.dense, *filter(self.pays, choices)], key=lambda each: (each.error + price * each.cost, each.cost)
        )

    def smallest(self) -> Choice:
        """All TT-ranks 1 in the format where that is least."""
        choices = [candidate.choice((1,) * (len(candidate.tails) + 2)) for candidate in self.candidates]
        return min([self.dense, *filter(self.pays, choices)], key=lambda choice: choice.cost)


def fewest_params(options: LayerOptions, eps: float) -> Choice:
    """A small choice whose bound is at most `eps`, dense where none is smaller.

    The least over the formats of what the price finds, with single ranks lowered while the bound allows it.
    """
    choices = [_fewest_params(candidate, eps**2 * candidate.squared_norm) for candidate in options.candidates]
    return min([options.dense, *choices], key=lambda choice: choice.cost)


def _fewest_params(candidate: Candidate, allowed: float) -> Choice:
    def fits(price: float) -> Choice | None:
        choice = candidate.best_at(price)
        return choice if choice.error <= allowed else None

    best = _bisect_price(fits, rising=False) or candidate.choice(candidate.tensorization.max_ranks())
    while True:
        lower = [step for step in candidate.steps(best.tt_ranks, -1) if step.error <= allowed]
        if not lower:
            return best
        at = best
        best = max(lower, key=lambda step: (at.cost - step.cost) / max(step.error - at.error, 1e-300))


def within_budget(layers: Sequence[LayerOptions], budget: int) -> list[Choice]:
    """One choice a layer: least total squared error with at most `budget` of cost for all of them.

    A price finds choices on the lower convex hull only, and the budget may lie far from the next of them. From the one
    below, what is left over is spent rank by rank; from the one above, ranks are given up one by one; the better result
    counts. In between each layer tries every format at the size that it got.

    Raises:
        PlanError: even all TT-ranks 1 need more.
    """
    below, beyond = _bracket(layers, budget)
    results = []
    for start in (below, _trim(beyond, total_cost(beyond) - budget)):
        if start is not None:
            spent = _spend(layers, start, budget - total_cost(start))
            choices = [_best_format(*pair) for pair in zip(layers, spent, strict=True)]
            results.append(_spend(layers, choices, budget - total_cost(choices)))
    return min(results, key=lambda choices: sum(choice.error for choice in choices))


def _best_format(layer: LayerOptions, now: Choice) -> Choice:
    singles = [replace(layer, candidates=(candidate,)) for candidate in layer.candidates]
    others = []
    for single in singles:
        if single.smallest().cost <= now.cost:
            below, _ = _bracket([single], now.cost)
            others += _spend([single], below, now.cost - total_cost(below))
    return min([now, *others], key=lambda choice: (choice.error, choice.cost))


def _bracket(layers: Sequence[LayerOptions], budget: int) -> tuple[list[Choice], list[Choice]]:
    """Choices at the nearest price that keeps the budget, and at the nearest that does not."""
    least = [layer.smallest() for layer in layers]
    if total_cost(least) > budget:
        raise PlanError(f"needs {total_cost(least):,} at TT-rank 1, {budget:,} are left")
    beyond = [layer.dense for layer in layers]

    def fits(price: float) -> list[Choice] | None:
        nonlocal beyond
        choices = [layer.best_at(price) for layer in layers]
        if total_cost(choices) <= budget:
            return choices
        beyond = choices
        return None

    return _bisect_price(fits, rising=True) or least, beyond


def total_cost(choices: Sequence[Choice]) -> int:
    """Of all choices together."""
    return sum(choice.cost for choice in choices)


def _bisect_price(fits: Callable[[float], T | None], rising: bool) -> T | None:
    """The fitting result nearest the border: of the lowest price that fits if `rising`, else of the highest."""
    low, high = -60.0, 10.0
    best: T | None = None
    for _ in range(36):
        middle = (low + high) / 2
        found = fits(2.0**middle)
        best = best if found is None else found
        if (found is not None) == rising:
            high = middle
        else:
            low = middle
    return best


def _spend(layers: Sequence[LayerOptions], choices: Sequence[Choice], spare: int) -> list[Choice]:
    """Raise single ranks, or make layers dense again, as long as anything fits, the best gain for its cost first."""
    chosen = list(choices)
    moves: list[Choice | None] = [_best_move(*pair, spare) for pair in zip(layers, chosen, strict=True)]
    while True:
        for index, move in enumerate(moves):
            if move is not None and move.cost - chosen[index].cost > spare:
                moves[index] = _best_move(layers[index], chosen[index], spare)
        gains = [(_gain(chosen[index], move), index) for index, move in enumerate(moves) if move is not None]
        if not gains:
            return chosen
        index = max(gains)[1]
        move = moves[index]
        spare -= move.cost - chosen[index].cost if move else 0
        chosen[index] = move or chosen[index]
        moves[index] = _best_move(layers[index], chosen[index], spare)


def _trim(choices: Sequence[Choice], excess: int) -> list[Choice] | None:
    """Lower single ranks, the least loss for its cost first, until `excess` is saved; None if never."""
    chosen = list(choices)
    moves = [_least_loss(choice) for choice in chosen]
    while excess > 0:
        losses = [
            (-_gain(move, now), index) for index, (now, move) in enumerate(zip(chosen, moves, strict=True)) if move
        ]
        if not losses:
            return None
        index = max(losses)[1]
        move = moves[index]
        excess -= chosen[index].cost - move.cost if move else 0
        chosen[index] = move or chosen[index]
        moves[index] = _least_loss(chosen[index])
    return chosen


def _least_loss(now: Choice) -> Choice | None:
    if now.candidate is None:
        return None
    steps = [step for step in now.candidate.steps(now.tt_ranks, -1) if step.cost < now.cost]
    return min(steps, key=lambda step: _gain(step, now), default=None)


def _best_move(layer: LayerOptions, now: Choice, spare: int) -> Choice | None:
    if now.candidate is None:
        return None
    steps = filter(layer.pays, now.candidate.steps(now.tt_ranks, 1))
    affordable = [step for step in (*steps, layer.dense) if 0 < step.cost - now.cost <= spare]
    return max(affordable, key=lambda step: _gain(now, step), default=None)


def _gain(now: Choice, step: Choice) -> float:
    return (now.error - step.error) / (step.cost - now.cost)


def nearest_below(layers: Sequence[LayerOptions], choices: Sequence[Choice], budget: int) -> list[Choice]:
    """The choices whose cost comes nearest to `budget` from below, over all rank choices of the small layers.

    For small networks, where single ranks are coarse against the budget; layers with too many rank choices to list
    keep the one in `choices`.
    """
    listed = [_menu(layer, now) for layer, now in zip(layers, choices, strict=True)]
    # Multiply-adds are whole numbers of pixels.
    unit = gcd(*(cost for menu in listed for cost in menu))
    if budget // unit > MOST_SUMS:
        return [*choices]
    menus = [{cost // unit: choice for cost, choice in menu.items()} for menu in listed]
    reachable = [1]
    for menu in menus:
        sums = 0
        for cost in menu:
            sums |= reachable[-1] << cost
        reachable.append(sums & ((1 << (budget // unit + 1)) - 1))
    best = [*choices]
    left = reachable[-1].bit_length() - 1
    for index in range(len(menus) - 1, -1, -1):
        menu, before = menus[index], reachable[index]
        cost = min((c for c in menu if c <= left and before >> (left - c) & 1), key=lambda c: menu[c].error)
        best[index] = menu[cost]
        left -= cost
    return best


def _menu(layer: LayerOptions, now: Choice) -> dict[int, Choice]:
    """The choice of least error for every cost the layer can have."""
    choices = [choice for candidate in layer.candidates for choice in _all_choices(candidate)]
    ordered = sorted([now, *filter(layer.pays, choices), layer.dense], key=lambda choice: choice.error, reverse=True)
    return {choice.cost: choice for choice in ordered}


def _all_choices(candidate: Candidate) -> Iterator[Choice]:
    tops = candidate.tensorization.max_ranks()[1:-1]
    if prod(tops) <= LISTABLE:
        for ranks in product(*(range(1, top + 1) for top in tops)):
            full = (1, *ranks, 1)
            if feasible_ranks(candidate.tensorization.sizes, full) == full:
                yield candidate.choice(full)
