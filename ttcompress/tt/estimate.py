"""Bounds of the singular spectrum of an unfolding from few random vectors, where the spectrum itself takes long.

The r largest eigenvalues of a positive semidefinite G have a sum of at most r^(1 - 1/p) tr(G^p)^(1/p), for every p
(Hoelder). The traces are those of the Gram matrix, which is never formed: z^T G^p z for random signs z has the mean
tr(G^p) (Hutchinson 1989).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttcompress.tt.unfolding import Folded, Side

VECTORS, PRODUCTS = 16, 4
"""Random vectors, and how often the Gram matrix is applied to each: powers up to twice as high are known."""
CAUTION = 3.0
"""Standard errors that a trace is taken to be larger than estimated."""


def bounded_spectrum(folded: Folded, cut: int, short: Side, size: int) -> Tensor:
    """Return squared singular values over ||A||_F^2 whose leading sums are at least those of the unfolding.

    They are descending, in float64 on the CPU, as many as the short side has entries (`size`).
    """
    traces = _traces(folded, cut, short, size)
    counts = torch.arange(size + 1, dtype=torch.float64)

    sums = torch.ones_like(counts)
    for power, trace in traces.items():
        sums = torch.minimum(sums, counts ** (1 - 1 / power) * trace ** (1 / power))
    sums[0] = 0.0
    return sums.diff()


def _traces(folded: Folded, cut: int, short: Side, size: int) -> dict[int, float]:
    """Estimate tr(G^p) of the Gram matrix over its trace, by p, rather too large than too small."""
    # Drawn on the CPU, so that they are the same on every device.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (size, VECTORS), generator=generator) * 2 - 1
    device = folded.values.device
    images = [signs.to(device, torch.float32)]

    norm = _norm(folded, cut, short)
    for _ in range(PRODUCTS):
        images.append(_gram_product(folded, cut, short, images[-1], norm))

    traces = {}
    for power in range(2, 2 * PRODUCTS + 1):
        left, right = images[power // 2], images[power - power // 2]
        samples = (left.double() * right.double()).sum(0)
        error = float(samples.std()) / VECTORS**0.5
        traces[power] = min(1.0, float(samples.mean()) + CAUTION * error)
    return traces


def _norm(folded: Folded, cut: int, short: Side) -> float:
    blocks = folded.blocks(cut, short, torch.float64)
    squares = torch.stack([block.square().sum() for block in blocks])
    # Of zeros nothing is left either way.
    return float(sum(squares.tolist()) ** 0.5) or 1.0


def _gram_product(folded: Folded, cut: int, short: Side, vectors: Tensor, norm: float) -> Tensor:
    """Return A A^T v / ||A||^2 for an unfolding A with the short side as rows, by two contractions."""
    across = _rows(folded.project(cut, short, vectors, vectors.dtype).values, short) / norm
    return _rows(folded.project(cut, short.other, across, vectors.dtype).values, short.other) / norm


def _rows(values: Tensor, contracted: Side) -> Tensor:
    """View what is left of a contraction with the other side as rows and the vectors as columns."""
    return values.flatten(1).T if contracted == Side.LEFT else values.flatten(0, 3)
