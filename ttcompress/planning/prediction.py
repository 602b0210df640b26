"""What the spectra say of every size of a network at once: the curve of size against error, and whose error it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log, sqrt
from typing import NamedTuple

from torch import Tensor

from ttcompress.planning.allocate import LOG_PRICES, total_cost
from ttcompress.planning.candidates import LayerOptions
from ttcompress.planning.spectra import LayerSpectra
from ttcompress.records.common import Json
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.shapes import Tensorization

POINTS = 30
LARGEST_ERROR = 0.9
"""Share of all squared error beyond which nobody looks closely."""
CLOSEST = 1e-3
"""Prices whose exponents differ by less are one."""
DRAWN_VALUES = 48
"""Singular values of a cut that a picture has room for; more are drawn as a ladder of them."""


class _Point(NamedTuple):
    log_price: float
    cost: int
    error: float


def predicted_curve(options: Sequence[LayerOptions], fixed: int, dense: int) -> list[tuple[float, float]]:
    """Compression and relative error of some thirty choices of least error for their size, mildest first.

    A price of one parameter makes every layer choose for itself (`planning.allocate`), so that a point costs far less
    than a plan. `fixed` parameters are spent whatever is chosen, of `dense` in all.
    """

    def at(log_price: float) -> _Point:
        choices = [layer.best_at(2.0**log_price) for layer in options]
        return _Point(log_price, total_cost(choices), sum(choice.error for choice in choices))

    # All of every weight, in units of the largest: what an error of everything would be.
    whole = sum(max((each.squared_norm for each in layer.candidates), default=0.0) for layer in options)
    # The widest gap in size is halved again and again, as far as there are choices in it.
    points = [at(exponent) for exponent in LOG_PRICES]
    while len(points) < POINTS:
        gaps = [
            (log((fixed + left.cost) / max(1, fixed + right.cost)), index)
            for index, (left, right) in enumerate(pairwise(points))
            if right.log_price - left.log_price > CLOSEST and left.error < LARGEST_ERROR * whole
        ]
        widest, index = max(gaps, default=(0.0, 0))
        if widest <= 0:
            break
        points.insert(index + 1, at((points[index].log_price + points[index + 1].log_price) / 2))

    distinct = {point.cost: point for point in points}
    ordered = sorted(distinct.values(), key=lambda point: -point.cost)
    if not whole:
        return []
    # Tails of eigenvalues may be a rounding error below 0, their bound is above all.
    shares = [min(1.0, max(0.0, point.error / whole)) for point in ordered]
    ratios = [dense / max(1, fixed + point.cost) for point in ordered]
    return [(_rounded(ratio), _rounded(sqrt(share))) for ratio, share in zip(ratios, shares, strict=True)]


def _rounded(value: float) -> float:
    """Four digits, as a curve has them."""
    return float(f"{value:.4g}")


def error_shares(
    plans: Sequence[LayerPlan],
    known: Mapping[str, tuple[Sequence[Tensorization], LayerSpectra]],
) -> dict[str, float]:
    """The share of each layer in the squared error that the plan predicts, by fqn."""
    errors = {}
    for plan in plans:
        if plan.fqn in known and plan.predicted_error is not None:
            tensorizations, spectra = known[plan.fqn]
            place = list(tensorizations).index(plan.tensorization)
            errors[plan.fqn] = (plan.predicted_error * spectra.tensorizations[place].norm) ** 2
    total = sum(errors.values())
    return {fqn: _rounded(error / total) for fqn, error in errors.items()} if total else {}


def drawn_layer(plan: LayerPlan, cuts: Sequence[Tensor]) -> Json:
    """The singular values of one layer, from their squares, as a page draws them."""
    pairs = zip(cuts, plan.tt_ranks[1:-1], strict=True)
    drawn = [_drawn_cut(squared, rank) for squared, rank in pairs]
    return {"fqn": plan.fqn, "format": plan.tensorization.format, "cuts": drawn}


def _drawn_cut(squared: Tensor, rank: int) -> Json:
    """The singular values of a cut over the largest, all of them or a ladder, and the rank that was taken."""
    values = squared.clamp(min=0).sqrt()
    largest = float(values[0]) or 1.0
    size = len(values)

    places = sorted({*_ladder(size), min(rank, size)})
    return {
        "rank": rank,
        "size": size,
        "places": places,
        "values": [_rounded(float(values[place - 1]) / largest) for place in places],
    }


def _ladder(size: int) -> list[int]:
    """All places from 1 on, or so many of them that each is the same factor beyond the one before."""
    if size <= DRAWN_VALUES:
        return list(range(1, size + 1))
    steps = (size ** (step / (DRAWN_VALUES - 1)) for step in range(DRAWN_VALUES))
    return [min(size, max(1, round(step))) for step in steps]


def prediction_of(points: Sequence[tuple[float, float]], shares: Mapping[str, float], by: str) -> Json:
    """The `prediction` of a report: of errors of weights or of outputs (`by`)."""
    return {"by": by, "points": [list(point) for point in points], "shares": dict(shares)}
