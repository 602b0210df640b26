"""Rows of a table in TT form, one index at a time, without the table.

A table (rows, dim) is a matrix (dim, rows) in TT form, of which an index picks a column: it has a digit for each core,
by which the core gives a slice (Khrulkov et al. 2019, "Tensorized Embedding Layers for Efficient Model Compression").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from ttcompress.tt.cost import Shape

MOST_ELEMENTS = 2**22
"""Of slices that are held at a time; with more indices they are taken a part after the other."""


class LookupPlan(NamedTuple):
    """How rows are looked up; integers only.

    Index j has the digit j // step % n_k for core k; `steps` has 0 for cores that all indices share. The `leading`
    digit is not cut, so that what is out of range shows there; `num_rows` is given where there are padded rows besides
    those of the table. Slices before `split` are multiplied from the first on, the others from the last on.
    """

    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    leading: int
    num_rows: int
    split: int
    most: int


def lookup_plan(shapes: Sequence[Shape], num_rows: int) -> LookupPlan:
    """Plan the lookup in cores of shapes (r_{k-1}, m_k, n_k, 1, r_k), the way that takes the fewest multiply-adds.

    Example:
        >>> lookup_plan([(1, 2, 5, 1, 3), (3, 2, 5, 1, 1)], 24).steps
        (5, 1)
    """
    sizes = tuple(shape[2] for shape in shapes)
    leading = next((k for k, size in enumerate(sizes) if size > 1), 0)
    after = [*accumulate(reversed(sizes[1:]), mul, initial=1)][::-1]
    steps = tuple(
        step if size > 1 or k == leading else 0
        for k, (size, step) in enumerate(zip(sizes, after, strict=True))
    )

    padded = num_rows if prod(sizes) > num_rows else 0
    split = min(range(len(shapes) + 1), key=lambda cut: _multiply_adds(shapes, cut))
    largest = max(prod(shape) // shape[2] for shape, step in zip(shapes, steps, strict=True) if step)
    return LookupPlan(sizes, steps, leading, padded, split, max(1, MOST_ELEMENTS // largest))


def _multiply_adds(shapes: Sequence[Shape], split: int) -> int:
    """For one row, with the slices before `split` from the first on and the others from the last on."""
    outs = [shape[1] for shape in shapes]
    slices = [prod(shape) // shape[2] for shape in shapes]
    left = sum(prod(outs[:k]) * slices[k] for k in range(1, split))
    right = sum(prod(outs[k + 1 :]) * slices[k] for k in range(split, len(shapes) - 1))
    is_one_side = split in (0, len(shapes))
    return left + right + (0 if is_one_side else prod(outs) * shapes[split][0])


def look_up(
    cores: Sequence[Tensor],
    ids: Tensor,
    plan: LookupPlan,
    dtype: torch.dtype | None = None,
    at_once: bool = False,
) -> Tensor:
    """Return the rows of a table at these indices, (B,) to (B, M), with the padding of the outputs.

    Args:
        cores: window-less, of the shapes that were planned for.
        ids: whole numbers from 0 to num_rows - 1.
        plan: see `lookup_plan`.
        dtype: of the rows, into which slices are brought before they are multiplied; by default that of the cores.
        at_once: never in parts, so that a recorded graph is one for any number of indices.

    Raises:
        IndexError: an index outside, as torch.nn.functional.embedding does (on a GPU its kernel fails, as there).

    Example:
        >>> cores = [torch.arange(6.0).reshape(1, 1, 3, 1, 2), torch.ones(2, 4, 1, 1, 1)]
        >>> plan = lookup_plan([core.shape for core in cores], 3)
        >>> look_up(cores, torch.tensor([2, 0]), plan).tolist()
        [[9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]]
    """
    if at_once or ids.shape[0] <= plan.most:
        return _rows(cores, ids, plan, dtype)
    return torch.cat([_rows(cores, part, plan, dtype) for part in torch.split(ids, plan.most)])


def _rows(cores: Sequence[Tensor], ids: Tensor, plan: LookupPlan, dtype: torch.dtype | None) -> Tensor:
    slices = [_slices(core, ids, plan, k).to(dtype or core.dtype) for k, core in enumerate(cores)]
    split = plan.split
    if split == 0:
        rows = _from_last(slices)
    elif split == len(slices):
        rows = _from_first(slices)
    else:
        rows = _product(_from_first(slices[:split]), _from_last(slices[split:]))
    return rows.flatten(1)


def _slices(core: Tensor, ids: Tensor, plan: LookupPlan, k: int) -> Tensor:
    """(r, m, n, 1, s) to (B, r, m, s), or (r, m, s) where all indices take the same."""
    r, m, n, _, s = core.shape
    step = plan.steps[k]
    if step == 0:
        return core[:, :, 0, 0]

    digit = ids if step == 1 else torch.div(ids, step, rounding_mode="floor")
    if k != plan.leading:
        digit = digit % n
    elif plan.num_rows:
        digit = digit.masked_fill(ids >= plan.num_rows, n)
    if r * m == 1:
        return core.reshape(n, s).index_select(0, digit)[:, None, None]
    return core[:, :, :, 0].index_select(2, digit).permute(2, 0, 1, 3)


def _from_first(slices: Sequence[Tensor]) -> Tensor:
    """z = z G_k keeps (outputs so far, r_k); three axes with that of the indices before, two where they share it."""
    z = slices[0].flatten(-3, -2)
    for each in slices[1:]:
        r, m, s = each.shape[-3:]
        product = _product(z, each.reshape(*each.shape[:-3], r, m * s))
        z = torch.unflatten(product, -1, (m, s)).flatten(-3, -2)
    return z


def _from_last(slices: Sequence[Tensor]) -> Tensor:
    """z = G_k z keeps (r_k, outputs so far); axes as in `_from_first`."""
    z = slices[-1].flatten(-2)
    for each in reversed(slices[:-1]):
        r, m, s = each.shape[-3:]
        product = _product(each.reshape(*each.shape[:-3], r * m, s), z)
        z = torch.unflatten(product, -2, (r, m)).flatten(-2)
    return z


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of matrices, one of which may be the same for all indices: then it is one product for all of them."""
    if right.dim() == 2 and left.dim() == 3:
        return torch.unflatten(left.flatten(0, 1) @ right, 0, left.shape[:2])
    if left.dim() == 2 and right.dim() == 3 and right.shape[2] == 1:
        return (right[:, :, 0] @ left.T)[:, :, None]
    return left @ right
