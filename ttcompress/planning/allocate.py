"""Formats and TT-ranks under an accuracy or a budget: the search over what every weight can be.

Minimising the total error within a budget couples all layers. The Lagrangian, error + lambda * cost, does
not: at a price lambda of one unit every layer decides for itself, and what they choose together has the least
error of all choices that cost no more (Everett 1963). The price is bisected until the budget is met. Such
choices lie on the lower convex hull of error against cost only, so that what is left over is spent rank by
rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import TypeVar

from ttcompress.errors import PlanError
from ttcompress.planning.candidates import Candidate, Choice, LayerOptions

T = TypeVar("T")

LOG_PRICES = (-60.0, 10.0)
"""Exponents of 2 between which a price is looked for; errors are in units of the largest weight's."""
BISECTIONS = 36


def fewest_params(options: LayerOptions, eps: float) -> Choice:
    """A small choice whose bound is at most `eps`, dense where none is smaller.

    The least over the formats of what the price finds, with single ranks lowered while the bound allows it.
    """
    tried = [_fewest_params(candidate, eps**2 * candidate.squared_norm) for candidate in options.candidates]
    choices = [choice for choice in tried if choice is not None]
    return min([options.dense, *choices], key=lambda choice: choice.cost)


def _fewest_params(candidate: Candidate, allowed: float) -> Choice | None:
    def fits(price: float) -> Choice | None:
        choice = candidate.best_at(price)
        return choice if choice.error <= allowed else None

    # A high price buys few parameters: the highest at which the error is still allowed is wanted.
    best = _bisect_price(fits, rising=False)
    if best is None and candidate.limit is not None:
        return None

    best = best or candidate.choice(candidate.tensorization.max_ranks())
    while True:
        lower = [step for step in candidate.steps(best.tt_ranks, -1) if step.error <= allowed]
        if not lower:
            return best
        best = max(lower, key=partial(_saving_for_error, best))


def _saving_for_error(now: Choice, step: Choice) -> float:
    return (now.cost - step.cost) / max(step.error - now.error, 1e-300)


def within_budget(layers: Sequence[LayerOptions], budget: int) -> list[Choice]:
    """One choice a layer: least total squared error with at most `budget` of cost for all of them.

    A price finds choices on the lower convex hull only, and the budget may lie far from the next of them.
    From the one below, what is left over is spent rank by rank; from the one above, ranks are given up one by
    one; the better result counts. In between each layer tries every format at the size that it got.

    Raises:
        PlanError: even all TT-ranks 1 need more.
    """
    # Two greedy starts: what one of them misses the other one often finds.
    below, beyond = _bracket(layers, budget)
    trimmed = _trim(beyond, total_cost(beyond) - budget)

    results = []
    for start in (below, trimmed):
        if start is not None:
            spent = _spend(layers, start, budget - total_cost(start))
            choices = [_best_format(layer, now) for layer, now in zip(layers, spent, strict=True)]
            results.append(_spend(layers, choices, budget - total_cost(choices)))
    return min(results, key=lambda choices: sum(choice.error for choice in choices))


def least_error(layer: LayerOptions, budget: int) -> float:
    """Squared error of a layer at a cost that its smallest form keeps to, as near as prices come to the best."""
    below, _ = _bracket([layer], budget)
    return below[0].error


def _best_format(layer: LayerOptions, now: Choice) -> Choice:
    """The best choice at the cost of a layer's present one, all of which every format may spend."""
    others = []
    for candidate in layer.candidates:
        single = replace(layer, candidates=(candidate,))
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

    # A low price buys little error: the lowest at which the cost still fits is wanted.
    below = _bisect_price(fits, rising=True) or least
    return below, beyond


def total_cost(choices: Sequence[Choice]) -> int:
    """Of all choices together."""
    return sum(choice.cost for choice in choices)


def _bisect_price(fits: Callable[[float], T | None], rising: bool) -> T | None:
    """What fits at the lowest price at which anything does if `rising`, else at the highest."""
    low, high = LOG_PRICES
    best: T | None = None
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = fits(2.0**middle)
        if found is not None:
            best = found

        if (found is not None) == rising:
            high = middle
        else:
            low = middle
    return best


def _spend(layers: Sequence[LayerOptions], choices: Sequence[Choice], spare: int) -> list[Choice]:
    """Raise single ranks, or make layers dense again, as long as anything fits.

    The move of the best gain for its cost comes first.
    """
    chosen = list(choices)
    moves = [_best_move(layer, now, spare) for layer, now in zip(layers, chosen, strict=True)]
    while True:
        # What is left shrinks with every move, and may no longer suffice for the best one of another layer.
        for index, move in enumerate(moves):
            if move is not None and move.cost - chosen[index].cost > spare:
                moves[index] = _best_move(layers[index], chosen[index], spare)

        gains = [(_gain(chosen[index], move), index, move) for index, move in enumerate(moves) if move]
        if not gains:
            return chosen
        _, index, move = max(gains, key=itemgetter(0, 1))
        spare -= move.cost - chosen[index].cost
        chosen[index] = move
        moves[index] = _best_move(layers[index], move, spare)


def _trim(choices: Sequence[Choice], excess: int) -> list[Choice] | None:
    """Lower single ranks, the least loss for its cost first, until `excess` is saved; None if never."""
    chosen = list(choices)
    moves = [_least_loss(choice) for choice in chosen]
    while excess > 0:
        losses = [(_gain(move, chosen[index]), index, move) for index, move in enumerate(moves) if move]
        if not losses:
            return None
        _, index, move = min(losses, key=lambda each: (each[0], -each[1]))
        excess -= chosen[index].cost - move.cost
        chosen[index] = move
        moves[index] = _least_loss(move)
    return chosen


def _least_loss(now: Choice) -> Choice | None:
    """The step down of a layer that costs the least error for what it saves; a dense layer has none."""
    if now.candidate is None:
        return None
    steps = [step for step in now.candidate.steps(now.tt_ranks, -1) if step.cost < now.cost]
    return min(steps, key=lambda step: _gain(step, now), default=None)


def _best_move(layer: LayerOptions, now: Choice, spare: int) -> Choice | None:
    """The affordable step up of a layer that gains the most for its cost; a dense layer has none."""
    if now.candidate is None:
        return None
    steps = filter(layer.pays, now.candidate.steps(now.tt_ranks, 1))
    affordable = [step for step in (*steps, layer.dense) if 0 < step.cost - now.cost <= spare]
    return max(affordable, key=lambda step: _gain(now, step), default=None)


def _gain(now: Choice, step: Choice) -> float:
    """Error that a step saves, for a unit of what it costs."""
    return (now.error - step.error) / (step.cost - now.cost)
