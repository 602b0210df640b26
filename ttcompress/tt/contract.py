"""Contraction of TT-cores: with an input, with each other, and what each costs.

Cores have the stored shape (r_{k-1}, m_k, n_k, w_k, r_k). Two neighbouring cores merge into one of the same form, so
one pairwise product carries every format and every way to run a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, reduce
from itertools import combinations, pairwise
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Shape = Sequence[int]
ELEMENT_COST = 16
"""Multiply-adds that take as long as moving one element through memory, on the CPUs and GPUs we measured."""

TRAINING_TRAFFIC = 16
"""How much more an element of an intermediate counts in training."""
TYPICAL_ROWS = 64
MOST_GROUPS = 4


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


def dense_weight(cores: Sequence[Tensor], weight_shape: Shape) -> Tensor:
    """The weight (out, in) or (out, in, kh, kw) that the cores stand for, padding cut away."""
    whole = merge_all(cores)[0, : weight_shape[0], : weight_shape[1], :, 0]
    return whole.reshape(tuple(weight_shape))


class SweepPlan(NamedTuple):
    """How an input meets the cores: bounds of the groups that are merged first, from which end, and the costs.

    `per_row` is the cost for one input vector, `merging` that of merging the groups.
    """

    bounds: tuple[int, ...]
    from_last: bool
    per_row: Cost
    merging: Cost

    def cost(self, rows: int, merged: bool = False) -> Cost:
        """For `rows` input vectors; `merged` if the groups are at hand."""
        madds, elements = (rows * each for each in self.per_row)
        return Cost(madds, elements) if merged else Cost(madds + self.merging[0], elements + self.merging[1])


@cache
def sweep_plan(shapes: tuple[Shape, ...], training: bool = False) -> SweepPlan:
    """The cheapest way to contract inputs with window-less cores of these shapes (r_{k-1}, m_k, n_k, 1, r_k).

    Memory traffic decides more than multiply-adds: cores merged into a few groups leave fewer intermediates. In
    training each of them is also saved, brought into another order, and has a gradient. The plan does not depend on the
    number of inputs, so that graphs are the same for all.
    """
    weight = TRAINING_TRAFFIC if training else 1
    plans = [_plan(shapes, bounds, from_last) for bounds in _groupings(len(shapes)) for from_last in (True, False)]

    def total(plan: SweepPlan) -> float:
        madds, elements = plan.cost(TYPICAL_ROWS)
        return Cost(madds, weight * elements).total

    return min(plans, key=total)


def _plan(shapes: Sequence[Shape], bounds: tuple[int, ...], from_last: bool) -> SweepPlan:
    groups = [shapes[first:last] for first, last in pairwise(bounds)]
    merged = [_merged_shape(group) for group in groups]
    costs = [merge_cost(group) for group in groups]
    merging = Cost(sum(cost.multiply_adds for cost in costs), sum(cost.elements for cost in costs))
    return SweepPlan(bounds, from_last, _sweep_cost(merged if from_last else _mirrored(merged), 1), merging)


def _groupings(count: int) -> Iterator[tuple[int, ...]]:
    """Bounds of at most MOST_GROUPS groups of neighbours, and of every core by itself."""
    for number in range(min(MOST_GROUPS, count)):
        for inner in combinations(range(1, count), number):
            yield (0, *inner, count)
    yield tuple(range(count + 1))


def _merged_shape(shapes: Sequence[Shape]) -> Shape:
    return (shapes[0][0], *(prod(factors) for factors in list(zip(*shapes, strict=True))[1:4]), shapes[-1][4])


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
