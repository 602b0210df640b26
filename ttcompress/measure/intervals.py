"""95 % confidence intervals: of a proportion, a mean, a rank correlation, and of what is lost on the same inputs."""

from __future__ import annotations

from math import atanh, isfinite, sqrt, tanh

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]

Z = 1.959963984540054
"""Standard deviations around the mean that hold 95 % of a normal distribution."""


def wilson_interval(right: int, n: int) -> Interval:
    """Of a proportion right / n, in percent (Wilson 1927)."""
    p = right / n
    centre = p + Z * Z / (2 * n)
    half = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 100 / (1 + Z * Z / n)
    # The interval holds p itself, also where it is 0 or 1 and round-off would have it outside.
    return max(0.0, min((centre - half) * scale, 100 * p)), min(100.0, max((centre + half) * scale, 100 * p))


def paired_interval(lost: int, won: int, n: int) -> Interval:
    """Of the fall (lost - won) / n of a proportion, in points: of n inputs `lost` were right before only, `won` after only.

    Inputs on which both agree say nothing of the fall, so that the interval is far shorter than those of the two
    proportions. It is Wald's with one more pair of each kind (Bonett and Price 2012), which covers 95 % for few
    inputs and rare changes too.

    >>> [round(end, 2) for end in paired_interval(lost=12, won=4, n=100)]
    [-0.17, 15.85]
    """
    more, less = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half = Z * sqrt((more + less - (more - less) ** 2) / (n + 2))
    fall = (lost - won) / n
    # The interval holds the fall itself, which the added pairs draw towards 0.
    low, high = min(more - less - half, fall), max(more - less + half, fall)
    return 100 * max(-1.0, low), 100 * min(1.0, high)


def interval_around(value: float, influences: ArrayLike) -> Interval | None:
    """Of an estimate that the i-th of n independent inputs moves by influences[i] / n: for a mean, the inputs themselves.

    The delta method: the variance is that of the influences over n. None for one input, or beyond all numbers.
    """
    moves = np.asarray(influences, dtype=np.float64)
    if len(moves) < 2:
        return None
    with np.errstate(all="ignore"):
        half = Z * float(moves.std(ddof=1)) / sqrt(len(moves))
    return (value - half, value + half) if isfinite(value) and isfinite(half) else None


def correlation_interval(r: float, n: int) -> Interval:
    """Of a rank correlation of n pairs (Fisher's z; the variance of Bonett and Wright 2000)."""
    if n < 4 or abs(r) >= 1:
        return (r, r) if abs(r) >= 1 else (-1.0, 1.0)
    half = Z * sqrt((1 + r * r / 2) / (n - 3))
    return tanh(atanh(r) - half), tanh(atanh(r) + half)


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where all of one are equal."""
    x, y = _centred_ranks(first), _centred_ranks(second)
    scale = sqrt(float((x * x).mean() * (y * y).mean()))
    return float((x * y).mean()) / scale if scale else 0.0


def spearman_influences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """How far each pair moves Spearman's correlation (n), for `interval_around`.

    Of a correlation c = m_xy / sqrt(m_xx m_yy) of mid-ranks, through both what a pair adds to the moments itself and the
    ranks of all others that it raises (Croux and Dehon 2010, here with ties).
    """
    x, y = _centred_ranks(first), _centred_ranks(second)
    m_xx, m_yy, m_xy = float((x * x).mean()), float((y * y).mean()), float((x * y).mean())
    if not m_xx * m_yy:
        return np.zeros(len(x))

    of_xy = x * y + _raised(x, y) + _raised(y, x) - 3 * m_xy
    of_xx = x * x + 2 * _raised(x, x) - 3 * m_xx
    of_yy = y * y + 2 * _raised(y, y) - 3 * m_yy
    r = m_xy / sqrt(m_xx * m_yy)
    influences: NDArray[np.float64] = of_xy / sqrt(m_xx * m_yy) - r / 2 * (of_xx / m_xx + of_yy / m_yy)
    return influences


def _centred_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Shares of the values that are smaller, half of the equal ones counted, less their mean 1/2."""
    _, place, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    middle = np.cumsum(counts) - counts / 2
    ranks: NDArray[np.float64] = middle[place] / len(place) - 0.5
    return ranks


def _raised(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each i the sum of y over those whose x is larger than x[i], half of the equal ones counted, over their number."""
    _, place = np.unique(x, return_inverse=True)
    sums = np.bincount(place, weights=y)
    above = sums.sum() - np.cumsum(sums)
    raised: NDArray[np.float64] = (above + sums / 2)[place] / len(x)
    return raised
