"""Contraction of TT-cores: with an input, and with each other.

Cores have the stored shape (r_{k-1}, m_k, n_k, w_k, r_k). Two neighbouring cores merge into one of the same form, so
one pairwise product carries every format and every way to run a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.tt.cost import Shape, SweepPlan, sweep_plan


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


def dense_weight(cores: Sequence[Tensor], weight_shape: Shape) -> Tensor:
    """The weight (out, in) or (out, in, kh, kw) that the cores stand for, padding cut away.

    Modes are brought into order once, at the end: layers of training networks do this at every step, and small ones
    pay for each operation.
    """
    chain = reduce(
        lambda left, core: (left @ core.flatten(1)).reshape(-1, core.shape[4]), cores[1:], cores[0].flatten(0, 3)
    )
    sizes = [size for core in cores for size in core.shape[1:4]]
    order = [axis for kind in range(3) for axis in range(kind, len(sizes), 3) if sizes[axis] > 1]
    places = {axis: place for place, axis in enumerate(sorted(order))}
    whole = chain.reshape([sizes[axis] for axis in sorted(order)]).permute([places[axis] for axis in order])
    outs, ins, windows = (prod(sizes[kind::3]) for kind in range(3))
    if (outs, ins) != tuple(weight_shape[:2]):
        whole = whole.reshape(outs, ins, windows)[: weight_shape[0], : weight_shape[1]]
    return whole.reshape(tuple(weight_shape))


def merge_groups(cores: Sequence[Tensor], plan: SweepPlan) -> list[Tensor]:
    """The groups of a plan, each merged into one core."""
    return [merge_all(cores[first:last]) for first, last in pairwise(plan.bounds)]


def sweep(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Contract the input with window-less cores as planned: (B, N) to (B, r_0 M), both row-major."""
    plan = sweep_plan(tuple(tuple(core.shape) for core in cores))
    return sweep_groups(merge_groups(cores, plan), x, plan)


def sweep_groups(groups: Sequence[Tensor], x: Tensor, plan: SweepPlan) -> Tensor:
    """The same with the groups of the plan merged already.

    Both orders keep the axes where they are, so that no permutation is needed (Novikov et al. 2015, equation 5).
    """
    y = _sweep_from_last(groups, x) if plan.from_last else _sweep_from_first(groups, x)
    return y.reshape(x.shape[0], groups[0].shape[0] * prod([group.shape[1] for group in groups]))


def _sweep_from_last(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = G_k z keeps (remaining input modes, r_k, output modes so far) in order."""
    z, tail = x, 1
    for core in reversed(cores):
        r, m, n, _, s = core.shape
        z = _apply(core.reshape(r * m, n * s), z.reshape(-1, n * s, tail))
        tail *= m
    return z


def _sweep_from_first(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = z G_k keeps (output modes so far, r_k, remaining input modes) in order; r_0 counts as an output mode."""
    z, tail = x, x.shape[1]
    for core in (cores[0].flatten(0, 1)[None], *cores[1:]):
        r, m, n, _, s = core.shape
        tail //= n
        z = _apply(core[:, :, :, 0].permute(1, 3, 0, 2).reshape(m * s, r * n), z.reshape(-1, r * n, tail))
    return z


def _apply(matrix: Tensor, z: Tensor) -> Tensor:
    """A matrix (a, b) on every (b, tail) of z."""
    if z.shape[-1] == 1:
        return functional.linear(z[..., 0], matrix)
    if torch.is_grad_enabled() and matrix.requires_grad:
        # The gradient of a product with a batch of matrices would be one matrix for each, to be added up.
        return functional.linear(z.mT, matrix).mT
    # matmul would bring the batch into another order, to have one large product, if a core is a parameter.
    return torch.bmm(matrix.expand(z.shape[0], -1, -1), z)


def pad_features(x: Tensor, size: int) -> Tensor:
    """Zeros after the last axis up to `size`, for dimensions that do not factor."""
    return functional.pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x
