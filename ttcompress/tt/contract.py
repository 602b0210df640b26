"""Contraction of TT-cores: with an input, with each other, and what each costs.

Cores have the stored shape (r_{k-1}, m_k, n_k, w_k, r_k). Two neighbouring cores merge into one of the same form, so
one pairwise product carries every format and every way to run a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

Shape = Sequence[int]
ELEMENT_COST = 16
"""Multiply-adds that take as long as moving one element through memory, on the CPUs and GPUs we measured."""


class Cost(NamedTuple):
    """Multiply-adds of a computation and elements it moves through memory."""

    multiply_adds: int
    elements: int

    @property
    def total(self) -> int:
        """One number to compare by."""
        return self.multiply_adds + ELEMENT_COST * self.elements


def merge_cores(left: Tensor, right: Tensor) -> Tensor:
    """(r, m, n, w, q) and (q, m', n', w', s) into (r, m m', n n', w w', s)."""
    r, m, n, w, q = left.shape
    _, o, p, v, s = right.shape
    # On small cores, as every training step merges them, this takes about half the time of an einsum.
    merged = (left.reshape(-1, q) @ right.reshape(q, -1)).reshape(r, m, n, w, o, p, v, s)
    return merged.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(r, m * o, n * p, w * v, s)


def merge_all(cores: Sequence[Tensor]) -> Tensor:
    """All cores merged: (r_0, M, N, W, r_d)."""
    return reduce(merge_cores, cores)


def chain_product(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_{k-1}, s_k, r_k) multiplied out: (r_0, s_1 ... s_d, r_d)."""
    flat = [core.reshape(core.shape[0], 1, -1, 1, core.shape[-1]) for core in cores]
    return merge_all(flat)[:, 0, :, 0]


def dense_weight(cores: Sequence[Tensor], weight_shape: Shape) -> Tensor:
    """The weight (out, in) or (out, in, kh, kw) that the cores stand for, padding cut away."""
    whole = merge_all(cores)[0, : weight_shape[0], : weight_shape[1], :, 0]
    return whole.reshape(tuple(weight_shape))


def sweep(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Contract the input with window-less cores, from the cheaper end: (B, N) to (B, r_0 M), both row-major.

    Both orders keep the axes where they are, so that no permutation is needed (Novikov et al. 2015, equation 5).
    """
    shapes = [core.shape for core in cores]
    from_last = _sweep_cost(shapes, 1).total <= _sweep_cost(_mirrored(shapes), 1).total
    y = _sweep_from_last(cores, x) if from_last else _sweep_from_first(cores, x)
    return y.reshape(x.shape[0], shapes[0][0] * prod([shape[1] for shape in shapes]))


def _sweep_from_last(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = G_k z keeps (remaining input modes, r_k, output modes so far) in order."""
    z, tail = x, 1
    for core in reversed(cores):
        r, m, n, _, s = core.shape
        matrix = core.reshape(r * m, n * s)
        z = functional.linear(z.reshape(-1, n * s), matrix) if tail == 1 else matrix @ z.reshape(-1, n * s, tail)
        tail *= m
    return z


def _sweep_from_first(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = z G_k keeps (output modes so far, r_k, remaining input modes) in order; r_0 counts as an output mode."""
    z, tail = x, x.shape[1]
    for core in (cores[0].flatten(0, 1)[None], *cores[1:]):
        r, m, n, _, s = core.shape
        tail //= n
        matrix = core[:, :, :, 0].permute(1, 3, 0, 2).reshape(m * s, r * n)
        z = functional.linear(z.reshape(-1, r * n), matrix) if tail == 1 else matrix @ z.reshape(-1, r * n, tail)
    return z


def sweep_cost(shapes: Sequence[Shape], rows: int) -> Cost:
    """Cost of `sweep` on `rows` inputs."""
    return min(_sweep_cost(shapes, rows), _sweep_cost(_mirrored(shapes), rows), key=lambda cost: cost.total)


def _sweep_cost(shapes: Sequence[Shape], rows: int) -> Cost:
    remaining, tail = prod([shape[2] for shape in shapes]), 1
    madds, elements = 0, rows * remaining
    for r, m, n, _, s in reversed(shapes):
        remaining //= n
        madds += rows * remaining * r * m * n * s * tail
        tail *= m
        elements += rows * remaining * r * tail
    return Cost(madds, elements)


def _mirrored(shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes that a sweep from the last core would have if it were the sweep from the first."""
    (r_0, m_1, *rest), *others = shapes
    return [(s, m, n, w, r) for r, m, n, w, s in reversed([(1, r_0 * m_1, *rest), *others])]


def merge_cost(shapes: Sequence[Shape]) -> Cost:
    """Cost of `merge_all`, the last product of which writes the dense weight."""
    madds = elements = 0
    size = prod(shapes[0][:4])
    for shape in shapes[1:]:
        madds += size * prod(shape)
        size *= prod(shape[1:4])
        elements += 2 * size * shape[4]
    return Cost(madds, elements)


def pad_features(x: Tensor, size: int) -> Tensor:
    """Zeros after the last axis up to `size`, for dimensions that do not factor."""
    return functional.pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x
