"""How much of a moment to spread evenly: few images show some directions too much and others not at all.

A weight that is truncated in the metric of a moment gives up the directions of which it says least, so that what a few
images leave out by chance is what goes first.
"""

from __future__ import annotations

import torch

from ttcompress.tt.decompose import solved_for_eigenvalues
from ttcompress.tt.whiten import Moments

SHARES = torch.arange(1, 100, dtype=torch.float64) / 100
"""Those that are tried."""


def likeliest_share(moments: Moments, held_out: Moments) -> float:
    """The share spread evenly under which vectors that the moments have not seen are the likeliest, as a Gaussian's.

    A Gaussian of covariance S gives vectors of moment H the log-likelihood -(log det S + tr(S^-1 H)) / 2 each, up to
    a constant.
    """
    values, vectors = solved_for_eigenvalues(moments.own, torch.linalg.eigh)
    values = values.clamp(min=0)
    seen = ((held_out.own @ vectors) * vectors).sum(0)
    if not values.any():
        return 0.0

    shares = SHARES.to(values)
    spread = torch.outer(1 - shares, values) + shares[:, None] * values.mean()
    surprise = spread.log().sum(1) + (seen / spread).sum(1)
    return float(shares[surprise.argmin()])


def sampling_share(moments: Moments, squares: float, count: int) -> float:
    """The share spread evenly that leaves the least expected squared error of a moment from so many samples.

    `squares` is the mean of ||M_i||_F^2, M_i the moment of sample i. As derived by Ledoit and Wolf (2004, "A
    well-conditioned estimator for large-dimensional covariance matrices", section 3.3): what the samples differ by, over
    what the moment differs by from an even one.
    """
    square = float(moments.own.square().sum())
    uneven = square - moments.trace**2 / moments.size
    differ = max(squares - square, 0.0) / count
    return min(differ / uneven, 1.0) if uneven > 0 else 1.0
