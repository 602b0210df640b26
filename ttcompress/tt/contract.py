"""Contraction of TT-cores: with an input, and with each other.

Cores have the stored shape (r_{k-1}, m_k, n_k, w_k, r_k). Two neighbouring cores merge into one of the same
form, so one pairwise product carries every format and every way to run a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.tt.cost import ContractionPlan, Shape, contraction_plan


def merge_cores(left: Tensor, right: Tensor) -> Tensor:
    """Merge cores (r, m, n, w, q) and (q, m', n', w', s) into one, (r, m m', n n', w w', s).

    Axes in front, of groups, are the same in both.
    """
    *lead, r, m, n, w, q = left.shape
    _, o, p, v, s = right.shape[-5:]
    # On small cores, as every training step merges them, this takes about half the time of an einsum.
    product = left.reshape(*lead, -1, q) @ right.reshape(*lead, q, -1)
    merged = product.reshape(*lead, r, m, n, w, o, p, v, s)
    count = len(lead)
    order = [count + axis for axis in (0, 1, 4, 2, 5, 3, 6, 7)]
    paired = merged.permute(*range(count), *order)
    return paired.reshape(*lead, r, m * o, n * p, w * v, s)


def merge_all(cores: Sequence[Tensor]) -> Tensor:
    """Merge all cores into one, (r_0, M, N, W, r_d)."""
    return reduce(merge_cores, cores)


def dense_weight(cores: Sequence[Tensor], weight_shape: Shape) -> Tensor:
    """Form the weight (out, in) or (out, in, kh, kw) that the cores stand for, padding cut away.

    It is the TT-matrix of Novikov et al. (2015, section 3), with a window beside rows and columns as Garipov
    et al. (2016) have it.

    Args:
        cores: shapes (r_{k-1}, m_k, n_k, w_k, r_k), perhaps with an axis of groups in front.
        weight_shape: the shape of the weight, whose dimensions may be below the products of the m_k and n_k. Groups
            come in front of it.

    Raises:
        RuntimeError: cores that do not fit together or do not fill the weight. The message is torch's own,
            for layers call this at every step and nothing is checked beforehand.

    Example:
        >>> cores = [torch.eye(2).reshape(1, 2, 2, 1, 1), torch.ones(1, 1, 3, 1, 1)]
        >>> dense_weight(cores, (2, 6)).tolist()
        [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
    """
    lead = cores[0].shape[:-5]
    chain = cores[0].flatten(-5, -2)
    for core in cores[1:]:
        chain = (chain @ core.flatten(-4)).reshape(*lead, -1, core.shape[-1])

    # Layers of training networks do this at every step, and small ones pay for each operation. So the modes
    # are brought into order once, at the end, from m_1, n_1, w_1, m_2 ... to all m, all n, all w.
    sizes = [size for core in cores for size in core.shape[-4:-1]]
    wanted = [axis for kind in range(3) for axis in range(kind, len(sizes), 3) if sizes[axis] > 1]
    stored = sorted(wanted)
    places = {axis: place for place, axis in enumerate(stored)}
    view = chain.reshape([*lead, *(sizes[axis] for axis in stored)])
    count = len(lead)
    whole = view.permute([*range(count), *(count + places[axis] for axis in wanted)])

    outs, ins, windows = (prod(sizes[kind::3]) for kind in range(3))
    out_dim, in_dim = weight_shape[:2]
    if (outs, ins) != (out_dim, in_dim):
        whole = whole.reshape(*lead, outs, ins, windows)[..., :out_dim, :in_dim, :]
    return whole.reshape(*lead, *weight_shape)


def merge_groups(cores: Sequence[Tensor], plan: ContractionPlan) -> list[Tensor]:
    """Merge each group of a plan into one core."""
    return [merge_all(cores[first:last]) for first, last in pairwise(plan.bounds)]


def contract(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """Contract the input with window-less cores as planned: (B, N) to (B, r_0 M), both row-major."""
    shapes = tuple(tuple(core.shape) for core in cores)
    plan = contraction_plan(shapes)
    groups = merge_groups(cores, plan)
    return contract_groups(groups, x, plan)


def contract_groups(groups: Sequence[Tensor], x: Tensor, plan: ContractionPlan) -> Tensor:
    """Contract the input as `contract` does, with the groups of the plan merged already.

    Both orders keep the axes where they are, so that no permutation is needed (Novikov et al. 2015, equation
    5).
    """
    y = _contract_from_last(groups, x) if plan.from_last else _contract_from_first(groups, x)
    outs = prod([group.shape[1] for group in groups])
    return y.reshape(x.shape[0], groups[0].shape[0] * outs)


def _contract_from_last(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = G_k z keeps (remaining input modes, r_k, output modes so far) in order."""
    z = x
    tail = 1
    for core in reversed(cores):
        r, m, n, _, s = core.shape
        matrix = core.reshape(r * m, n * s)
        z = _apply(matrix, z.reshape(-1, n * s, tail))
        tail *= m
    return z


def _contract_from_first(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """z = z G_k keeps (output modes so far, r_k, remaining input modes) in order."""
    # r_0 counts as an output mode, so that a group of cores from the middle of a train can be contracted as well.
    first = cores[0].flatten(0, 1)[None]

    z = x
    tail = x.shape[1]
    for core in (first, *cores[1:]):
        r, m, n, _, s = core.shape
        tail //= n
        matrix = core[:, :, :, 0].permute(1, 3, 0, 2).reshape(m * s, r * n)
        z = _apply(matrix, z.reshape(-1, r * n, tail))
    return z


def _apply(matrix: Tensor, z: Tensor) -> Tensor:
    """Apply a matrix (a, b) to every (b, tail) of z."""
    if z.shape[-1] == 1:
        return functional.linear(z.squeeze(-1), matrix)

    if torch.is_grad_enabled() and matrix.requires_grad:
        if _is_worth_own_gradient(matrix, z):
            product: Tensor = _SharedProduct.apply(matrix, z)
            return product
        # The gradient of a product with a batch of matrices would be one matrix for each, to be added up.
        return functional.linear(z.mT, matrix).mT

    # matmul would bring the batch into another order, to have one large product, if a core is a parameter.
    return torch.bmm(matrix.expand(z.shape[0], -1, -1), z)


LARGE_ENTRIES = 8192
"""So many numbers take longer to be brought into another order than one more product takes to begin."""


def _is_worth_own_gradient(matrix: Tensor, z: Tensor) -> bool:
    """Whether a product is large enough, and is part of no graph that has no place for it."""
    if not z.is_cpu or matrix.dtype != z.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return sum(matrix.shape) * z.shape[-1] >= LARGE_ENTRIES


class _SharedProduct(torch.autograd.Function):
    """One matrix times a batch of them, whose gradient is added up as it comes.

    Torch would turn the batch round to have one large product, and its gradient back; both take as long as a third
    of the products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, z: Tensor) -> Tensor:
        return torch.bmm(matrix.expand(z.shape[0], -1, -1), z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        matrix, z = ctx.saved_tensors
        of_matrix = of_z = None
        if ctx.needs_input_grad[0]:
            of_matrix = torch.addbmm(torch.zeros_like(matrix), gradient, z.mT)
        if ctx.needs_input_grad[1]:
            of_z = torch.bmm(matrix.mT.expand(z.shape[0], -1, -1), gradient)
        return of_matrix, of_z

    @staticmethod
    def jvp(ctx: Any, matrix_tangent: Tensor, z_tangent: Tensor) -> Tensor:
        matrix, z = ctx.saved_tensors
        tangent: Tensor = matrix_tangent @ z + matrix @ z_tangent
        return tangent


def pad_features(x: Tensor, size: int) -> Tensor:
    """Pad the last axis with zeros up to `size`, for dimensions that do not factor."""
    missing = size - x.shape[-1]
    return functional.pad(x, (0, missing)) if missing > 0 else x
