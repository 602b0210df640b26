"""Rows of a table in TT form, one index at a time, without the table.

A table (rows, dim) is a matrix (dim, rows) in TT form, of which an index picks a column: it has a digit for each core,
by which the core gives a slice (Khrulkov et al. 2019, "Tensorized Embedding Layers for Efficient Model Compression").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul

import torch
from torch import Tensor

MOST_ELEMENTS = 2**22
"""Of slices that are held at a time; with more indices they are taken a part after the other."""


def look_up(cores: Sequence[Tensor], ids: Tensor, num_rows: int, at_once: bool = False) -> Tensor:
    """Return the rows of a table at these indices, (B,) to (B, M), with the padding of the outputs.

    Args:
        cores: window-less, shapes (r_{k-1}, m_k, n_k, 1, r_k); the n_k multiply to `num_rows` or a little more.
        ids: whole numbers from 0 to num_rows - 1.
        num_rows: of the table without padding.
        at_once: never in parts, so that a recorded graph is one for any number of indices.

    Raises:
        IndexError: an index outside, as torch.nn.functional.embedding does (on a GPU its kernel fails, as there).

    Example:
        >>> cores = [torch.arange(6.0).reshape(1, 1, 3, 1, 2), torch.ones(2, 4, 1, 1, 1)]
        >>> look_up(cores, torch.tensor([2, 0]), 3).tolist()
        [[9.0, 9.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]]
    """
    most = max(1, MOST_ELEMENTS // _largest_slice(cores))
    if at_once or ids.shape[0] <= most:
        return _rows(cores, ids, num_rows)
    return torch.cat([_rows(cores, part, num_rows) for part in torch.split(ids, most)])


def _largest_slice(cores: Sequence[Tensor]) -> int:
    """Elements of the largest slice that one index takes."""
    return max(core.numel() // core.shape[2] for core in cores if core.shape[2] > 1 or core is cores[0])


def _rows(cores: Sequence[Tensor], ids: Tensor, num_rows: int) -> Tensor:
    slices = [_slices(core, digit) for core, digit in zip(cores, _digits(cores, ids, num_rows), strict=True)]
    rows = _from_last(slices) if _is_cheaper_from_last(cores) else _from_first(slices)
    return rows.expand(ids.shape[0], -1)


def _digits(cores: Sequence[Tensor], ids: Tensor, num_rows: int) -> list[Tensor | None]:
    """The digit of each index for each core, the first one slowest; None for cores that all indices share."""
    sizes = [core.shape[2] for core in cores]
    after = [*accumulate(reversed(sizes[1:]), mul, initial=1)][::-1]
    leading = next((k for k, size in enumerate(sizes) if size > 1), 0)

    digits: list[Tensor | None] = []
    for k, (size, step) in enumerate(zip(sizes, after, strict=True)):
        if size == 1 and k != leading:
            digits.append(None)
            continue
        digit = ids if step == 1 else torch.div(ids, step, rounding_mode="floor")
        # What is out of range shows in the first digit, which is not cut.
        digits.append(digit if k == leading else digit % size)

    first = digits[leading]
    if prod(sizes) > num_rows and first is not None:
        digits[leading] = first.masked_fill(ids >= num_rows, sizes[leading])
    return digits


def _slices(core: Tensor, digit: Tensor | None) -> Tensor:
    """(r, m, n, 1, s) to (B, r, m, s), or (r, m, s) where all indices take the same."""
    r, m, n, _, s = core.shape
    if digit is None:
        return core[:, :, 0, 0]
    if r * m == 1:
        return core.reshape(n, s).index_select(0, digit)[:, None, None]
    return core[:, :, :, 0].index_select(2, digit).permute(2, 0, 1, 3)


def _is_cheaper_from_last(cores: Sequence[Tensor]) -> bool:
    """Whether the products of slices take fewer multiply-adds from the last one on."""
    outs = [core.shape[1] for core in cores]
    sizes = [core.numel() // core.shape[2] for core in cores]
    before = [*accumulate(outs, mul)]
    after = [*accumulate(reversed(outs), mul)][::-1]
    from_first = sum(done * size for done, size in zip(before, sizes[1:], strict=False))
    from_last = sum(done * size for done, size in zip(after[1:], sizes, strict=False))
    # What all indices share is best met last, when it is a product of two matrices.
    shares_first, shares_last = cores[0].shape[2] == 1, cores[-1].shape[2] == 1
    return shares_first if shares_first != shares_last else from_last < from_first


def _from_first(slices: Sequence[Tensor]) -> Tensor:
    """z = z G_k keeps (outputs so far, r_k)."""
    z = _batched(slices[0]).flatten(1, 2)
    for each in slices[1:]:
        *_, r, m, s = each.shape
        outs = z.shape[1] * m
        if each.dim() == 3:
            z = (z.reshape(-1, r) @ each.reshape(r, m * s)).reshape(z.shape[0], outs, s)
        else:
            z = (z @ each.reshape(-1, r, m * s)).reshape(each.shape[0], outs, s)
    return z.flatten(1)


def _from_last(slices: Sequence[Tensor]) -> Tensor:
    """z = G_k z keeps (r_k, outputs so far)."""
    z = _batched(slices[-1]).flatten(2)
    for each in reversed(slices[:-1]):
        *_, r, m, s = each.shape
        outs = m * z.shape[2]
        if each.dim() == 3 and z.shape[2] == 1:
            z = (z[:, :, 0] @ each.reshape(r * m, s).T).reshape(z.shape[0], r, outs)
        elif each.dim() == 3:
            z = (each.reshape(r * m, s) @ z).reshape(z.shape[0], r, outs)
        else:
            z = (each.reshape(-1, r * m, s) @ z).reshape(each.shape[0], r, outs)
    return z.flatten(1)


def _batched(slices: Tensor) -> Tensor:
    return slices if slices.dim() == 4 else slices[None]
