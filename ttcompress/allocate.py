"""Formats and TT-ranks under an accuracy or a budget, from the singular spectra of the weights.

The squared singular values of the unfoldings bound the error of every choice of TT-ranks, err^2 <= sum_k tail_k(r_k).
For a price lambda of one parameter the best ranks of a layer follow exactly by dynamic programming over its cuts; the
price is bisected until the budget is met, and what is left over is spent greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf, prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor

from ttcompress.errors import PlanError
from ttcompress.tt.shapes import Tensorization, feasible_ranks

T = TypeVar("T")
EVERY_RANK_UP_TO = 64
GRID_STEP = 1.06
NUMERICALLY_ZERO = 1e-15
LISTABLE = 4096


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to store a weight: a tensorization at TT-ranks, or dense where there is none. `error` is squared."""

    params: int
    error: float
    candidate: Candidate | None = None
    tt_ranks: tuple[int, ...] = ()

    @property
    def relative_error(self) -> float:
        """Bound of the relative Frobenius error."""
        norm = self.candidate.squared_norm if self.candidate else 0.0
        return sqrt(self.error / norm) if norm else 0.0


class Candidate:
    """A tensorization of one weight with the tails of its spectra: what each choice of TT-ranks costs and loses."""

    def __init__(self, tensorization: Tensorization, spectra: Sequence[Tensor], squared_norm: float = 1.0) -> None:
        """`spectra`: squared singular values of the d - 1 unfoldings over ||A||^2, descending.

        `squared_norm` is ||A||^2 in whatever unit all layers that are weighed against each other share.
        """
        self.tensorization = tensorization
        self.squared_norm = squared_norm
        self.tails = [squared_norm * _tails(spectrum) for spectrum in spectra]
        self.grids = [_grid(tail) for tail in self.tails]
        self._tails_on_grid = [tail[grid] for tail, grid in zip(self.tails, self.grids, strict=True)]
        self._volumes = [
            _volumes(size, left, right)
            for size, left, right in zip(tensorization.sizes, [_ONE, *self.grids], [*self.grids, _ONE], strict=True)
        ]

    def choice(self, tt_ranks: Sequence[int]) -> Choice:
        """What these TT-ranks cost and lose."""
        error = sum(float(tail[rank]) for tail, rank in zip(self.tails, tt_ranks[1:-1], strict=True))
        return Choice(self.tensorization.num_params(tt_ranks), error, self, tuple(tt_ranks))

    def best_at(self, price: float) -> Choice:
        """TT-ranks (on the grids) of least error + price * parameters, by dynamic programming over the cuts."""
        value = price * self._volumes[0][0]
        came_from: list[Tensor] = []
        for tail, volumes in zip(self._tails_on_grid, self._volumes[1:], strict=True):
            value, best = ((value + tail)[:, None] + price * volumes).min(dim=0)
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


def _volumes(size: int, left: Tensor, right: Tensor) -> Tensor:
    """Parameters r_{k-1} s_k r_k of a core for every pair of neighbouring ranks, infinite where one is infeasible."""
    pairs = (left[:, None] * size * right[None, :]).double()
    infeasible = (right[None, :] > left[:, None] * size) | (left[:, None] > size * right[None, :])
    return pairs.masked_fill_(infeasible, inf)


@dataclass(frozen=True)
class LayerOptions:
    """All that is worth considering for one weight of `dense_params` entries."""

    dense_params: int
    candidates: tuple[Candidate, ...]

    @property
    def dense(self) -> Choice:
        """The weight as it is."""
        return Choice(self.dense_params, 0.0)

    def best_at(self, price: float) -> Choice:
        """The choice of least error + price * parameters; a choice that does not save parameters is never made."""
        choices = [candidate.best_at(price) for candidate in self.candidates]
        paying = [choice for choice in choices if choice.params < self.dense_params]
        return min([self.dense, *paying], key=lambda choice: (choice.error + price * choice.params, choice.params))

    def smallest(self) -> Choice:
        """All TT-ranks 1 in the format where that is least."""
        choices = [candidate.choice((1,) * (len(candidate.tails) + 2)) for candidate in self.candidates]
        return min([*choices, self.dense], key=lambda choice: choice.params)


def fewest_params(options: LayerOptions, eps: float) -> Choice:
    """A small choice whose bound is at most `eps`, dense where none is smaller.

    The least over the formats of what the price finds, with single ranks lowered while the bound allows it.
    """
    choices = [_fewest_params(candidate, eps**2 * candidate.squared_norm) for candidate in options.candidates]
    return min([options.dense, *choices], key=lambda choice: choice.params)


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
        best = max(lower, key=lambda step: (at.params - step.params) / max(step.error - at.error, 1e-300))


def within_budget(layers: Sequence[LayerOptions], budget: int) -> list[Choice]:
    """One choice a layer: least total squared error with at most `budget` parameters for all of them.

    A price finds choices on the lower convex hull only, and the budget may lie far from the next of them. From the one
    below, what is left over is spent rank by rank; from the one above, ranks are given up one by one; the better result
    counts. In between each layer tries every format at the size that it got.

    Raises:
        PlanError: even all TT-ranks 1 need more.
    """
    below, beyond = _bracket(layers, budget)
    results = []
    for start in (below, _trim(beyond, total_params(beyond) - budget)):
        if start is not None:
            spent = _spend(layers, start, budget - total_params(start))
            choices = [_best_format(*pair) for pair in zip(layers, spent, strict=True)]
            results.append(_spend(layers, choices, budget - total_params(choices)))
    return min(results, key=lambda choices: sum(choice.error for choice in choices))


def _best_format(layer: LayerOptions, now: Choice) -> Choice:
    singles = [LayerOptions(layer.dense_params, (candidate,)) for candidate in layer.candidates]
    others = []
    for single in singles:
        if single.smallest().params <= now.params:
            below, _ = _bracket([single], now.params)
            others += _spend([single], below, now.params - total_params(below))
    return min([now, *others], key=lambda choice: (choice.error, choice.params))


def _bracket(layers: Sequence[LayerOptions], budget: int) -> tuple[list[Choice], list[Choice]]:
    """Choices at the nearest price that keeps the budget, and at the nearest that does not."""
    least = [layer.smallest() for layer in layers]
    if total_params(least) > budget:
        raise PlanError(f"needs {total_params(least):,} parameters at TT-rank 1, {budget:,} are left")
    beyond = [layer.dense for layer in layers]

    def fits(price: float) -> list[Choice] | None:
        nonlocal beyond
        choices = [layer.best_at(price) for layer in layers]
        if total_params(choices) <= budget:
            return choices
        beyond = choices
        return None

    return _bisect_price(fits, rising=True) or least, beyond


def total_params(choices: Sequence[Choice]) -> int:
    """Parameters of all choices together."""
    return sum(choice.params for choice in choices)


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
    """Raise single ranks, or make layers dense again, as long as anything fits, the best gain a parameter first."""
    chosen = list(choices)
    moves: list[Choice | None] = [_best_move(*pair, spare) for pair in zip(layers, chosen, strict=True)]
    while True:
        for index, move in enumerate(moves):
            if move is not None and move.params - chosen[index].params > spare:
                moves[index] = _best_move(layers[index], chosen[index], spare)
        gains = [(_gain(chosen[index], move), index) for index, move in enumerate(moves) if move is not None]
        if not gains:
            return chosen
        index = max(gains)[1]
        move = moves[index]
        spare -= move.params - chosen[index].params if move else 0
        chosen[index] = move or chosen[index]
        moves[index] = _best_move(layers[index], chosen[index], spare)


def _trim(choices: Sequence[Choice], excess: int) -> list[Choice] | None:
    """Lower single ranks, the least loss a parameter first, until `excess` parameters are saved; None if never."""
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
        excess -= chosen[index].params - move.params if move else 0
        chosen[index] = move or chosen[index]
        moves[index] = _least_loss(chosen[index])
    return chosen


def _least_loss(now: Choice) -> Choice | None:
    if now.candidate is None:
        return None
    steps = [step for step in now.candidate.steps(now.tt_ranks, -1) if step.params < now.params]
    return min(steps, key=lambda step: _gain(step, now), default=None)


def _best_move(layer: LayerOptions, now: Choice, spare: int) -> Choice | None:
    if now.candidate is None:
        return None
    steps = [step for step in now.candidate.steps(now.tt_ranks, 1) if step.params < layer.dense_params]
    affordable = [step for step in (*steps, layer.dense) if 0 < step.params - now.params <= spare]
    return max(affordable, key=lambda step: _gain(now, step), default=None)


def _gain(now: Choice, step: Choice) -> float:
    return (now.error - step.error) / (step.params - now.params)


def nearest_below(layers: Sequence[LayerOptions], choices: Sequence[Choice], budget: int) -> list[Choice]:
    """The choices whose parameters come nearest to `budget` from below, over all rank choices of the small layers.

    For small networks, where single ranks are coarse against the budget; layers with too many rank choices to list
    keep the one in `choices`.
    """
    menus = [_menu(layer, now) for layer, now in zip(layers, choices, strict=True)]
    reachable = [1]
    for menu in menus:
        sums = 0
        for params in menu:
            sums |= reachable[-1] << params
        reachable.append(sums & ((1 << (budget + 1)) - 1))
    best = [*choices]
    left = reachable[-1].bit_length() - 1
    for index in range(len(menus) - 1, -1, -1):
        before = reachable[index]
        fitting = [params for params in menus[index] if params <= left and before >> (left - params) & 1]
        best[index] = min((menus[index][params] for params in fitting), key=lambda choice: choice.error)
        left -= best[index].params
    return best


def _menu(layer: LayerOptions, now: Choice) -> dict[int, Choice]:
    """The choice of least error for every parameter count the layer can have."""
    choices = [choice for candidate in layer.candidates for choice in _all_choices(candidate)]
    smaller = [choice for choice in choices if choice.params < layer.dense_params]
    ordered = sorted([now, *smaller, layer.dense], key=lambda choice: choice.error, reverse=True)
    return {choice.params: choice for choice in ordered}


def _all_choices(candidate: Candidate) -> Iterator[Choice]:
    tops = candidate.tensorization.max_ranks()[1:-1]
    if prod(tops) <= LISTABLE:
        for ranks in product(*(range(1, top + 1) for top in tops)):
            full = (1, *ranks, 1)
            if feasible_ranks(candidate.tensorization.sizes, full) == full:
                yield candidate.choice(full)
