"""The total cost nearest below a budget, over all rank choices of small layers: a subset sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import gcd, prod

from ttcompress.planning.candidates import Candidate, Choice, LayerOptions
from ttcompress.tt.shapes import feasible_ranks

LISTABLE = 4096
"""Tensorizations of more rank choices are not listed."""
MOST_SUMS = 2**22

Menu = Mapping[int, Choice]
"""By cost of a layer: the choice of least error."""


def nearest_below(layers: Sequence[LayerOptions], choices: Sequence[Choice], budget: int) -> list[Choice]:
    """The choices whose cost comes nearest to `budget` from below, over all rank choices of the small layers.

    For small networks, where single ranks are coarse against the budget; layers with too many rank choices to
    list keep the one in `choices`.
    """
    listed = [_menu(layer, now) for layer, now in zip(layers, choices, strict=True)]
    # Multiply-adds are whole numbers of pixels.
    unit = gcd(*(cost for menu in listed for cost in menu))
    most = budget // unit
    if most > MOST_SUMS:
        return [*choices]
    menus = [{cost // unit: choice for cost, choice in menu.items()} for menu in listed]
    return _reaching_most(menus, most)


def _reaching_most(menus: Sequence[Menu], most: int) -> list[Choice]:
    """One choice of each menu, with the largest total of costs that is at most `most`."""
    # Bit t of reachable[k] says whether the first k layers can cost t together. One shift adds a cost to all.
    within = (1 << (most + 1)) - 1
    reachable = [1]
    for menu in menus:
        sums = 0
        for cost in menu:
            sums |= reachable[-1] << cost
        reachable.append(sums & within)

    # Backwards: of the costs from which the layers before can make up the rest, the one of least error.
    chosen: list[Choice] = []
    left = reachable[-1].bit_length() - 1
    for menu, before in zip(reversed(menus), reversed(reachable[:-1]), strict=True):
        possible = [cost for cost in menu if cost <= left and before >> (left - cost) & 1]
        cost = min(possible, key=lambda cost: menu[cost].error)
        chosen.append(menu[cost])
        left -= cost
    return chosen[::-1]


def _menu(layer: LayerOptions, now: Choice) -> Menu:
    """The choice of least error for every cost the layer can have."""
    choices = [choice for candidate in layer.candidates for choice in _all_choices(candidate)]
    paying = filter(layer.pays, choices)
    # Of equal costs the last one stays, which has the least error.
    ordered = sorted([now, *paying, layer.dense], key=lambda choice: choice.error, reverse=True)
    return {choice.cost: choice for choice in ordered}


def _all_choices(candidate: Candidate) -> Iterator[Choice]:
    """Every choice of feasible TT-ranks; none where they are too many to list."""
    sizes = candidate.tensorization.sizes
    if prod(map(len, candidate.ranks)) > LISTABLE:
        return
    for inner in product(*candidate.ranks):
        ranks = (1, *inner, 1)
        if feasible_ranks(sizes, ranks) == ranks and candidate.allows(ranks):
            yield candidate.choice(ranks)
