"""Unfoldings of a tensorized weight, block by block, without ever bringing its modes into order in memory.

Gram matrices and projections do not depend on the order of the columns of an unfolding. So the tensor stays as the
weight lies in memory, outputs, inputs and window beside each other instead of mode by mode, and no interleaved copy of
it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise
from math import inf, prod

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.tt.shapes import Mode, Tensorization

BLOCK = 1 << 18
"""Entries that are brought into order at a time: few enough for a processor's cache."""
COLUMNS, LARGE_BLOCK = 512, 1 << 22
"""Columns, and entries at most, of a block with so many rows that products of narrow ones would only move memory."""
LIKELY_RANK = 4
PASS_COST = 50
"""Multiply-adds that take as long as bringing one entry into order."""


class Side(IntEnum):
    """The modes to the left or to the right of a cut."""

    LEFT = 0
    RIGHT = 1

    @property
    def other(self) -> Side:
        """The side across the cut."""
        return Side(1 - self)


_AXES = {Side.LEFT: (0, 1, 3, 5), Side.RIGHT: (2, 4, 6, 7)}
"""Axes of both sides among (a, M_left, M_right, N_left, N_right, W_left, W_right, b)."""


@dataclass(frozen=True)
class Folded:
    """A d-way tensor with TT-ranks at its ends, as (a, M, N, W, b): the products of the m_k, the n_k, the w_k."""

    values: Tensor
    modes: tuple[Mode, ...]
    is_owned: bool = False

    def shape(self, cut: int, side: Side) -> tuple[int, ...]:
        """(a, M, N, W) of the first `cut` modes, or (M, N, W, b) of the others."""
        modes = self.modes[:cut] if side == Side.LEFT else self.modes[cut:]
        sizes = tuple(prod(factors) for factors in zip((1, 1, 1), *modes, strict=True))
        return (self.values.shape[0], *sizes) if side == Side.LEFT else (*sizes, self.values.shape[-1])

    def _pieces(self, cut: int, side: Side) -> Iterator[tuple[int, int, Tensor]]:
        """Parts with the `side` whole: the axis of the other side they are cut along, where they start, their values.

        The axes of the values are those of the side, then those of the other.
        """
        view = self._view(cut, side)
        sizes = view.shape[4:]
        most = max(BLOCK, min(LARGE_BLOCK, COLUMNS * prod(view.shape[:4])))
        count = -(-view.numel() // most)
        # The slowest axis that is long enough leaves the longest runs in memory to what is copied.
        axis = next((axis for axis in range(4) if 4 * sizes[axis] >= count), sizes.index(max(sizes)))
        step = max(1, sizes[axis] // count)
        for start in range(0, sizes[axis], step):
            yield axis, start, view.narrow(4 + axis, start, min(step, sizes[axis] - start))

    def blocks(self, cut: int, side: Side, dtype: torch.dtype) -> Iterator[Tensor]:
        """Matrices with the `side` as rows; beside each other, in some order, they are the unfolding."""
        for _, _, piece in self._pieces(cut, side):
            yield _matrix(piece, dtype)

    def gram(self, cut: int, side: Side) -> Tensor:
        """Gram matrix of the rows of a side, accumulated in float64."""
        size = prod(self.shape(cut, side))
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.values.device)
        for block in self.blocks(cut, side, torch.float64):
            _add_gram(gram, block)
        return gram.tril_().add_(gram.tril(-1).T)

    def project(self, cut: int, side: Side, basis: Tensor, dtype: torch.dtype) -> Folded:
        """Contract a side with a basis (size of the side, r), in the type of the basis: r is left in its place.

        Values that belong to no one else are overwritten where the result, of type `dtype`, fits among them.
        """
        is_left = side == Side.LEFT
        out = self._room(cut, side, basis.shape[1], dtype)
        for axis, start, piece in self._pieces(cut, side):
            part = out.narrow(axis + is_left, start, piece.shape[4 + axis])
            block = _matrix(piece, basis.dtype)
            part.copy_((basis.T @ block if is_left else block.T @ basis).reshape(part.shape))
        return Folded(out, self.modes[cut:] if is_left else self.modes[:cut], is_owned=True)

    def _room(self, cut: int, side: Side, rank: int, dtype: torch.dtype) -> Tensor:
        """Where (r, M, N, W, b) or (a, M, N, W, r) goes."""
        shape = self.shape(cut, side.other)
        view = self._view(cut, side)
        axis = next((axis for axis in range(4) if view.shape[axis] >= rank), None)
        if not self.is_owned or axis is None or view.dtype != dtype:
            return view.new_empty((rank, *shape) if side == Side.LEFT else (*shape, rank), dtype=dtype)
        first = view.narrow(axis, 0, rank).movedim(axis, 0)[:, 0, 0, 0]
        return first if side == Side.LEFT else first.movedim(0, -1)

    def _view(self, cut: int, side: Side) -> Tensor:
        """Eight axes: those of the side, then those of the other."""
        whole, other = _AXES[side], _AXES[side.other]
        sizes = dict(zip((*whole, *other), (*self.shape(cut, side), *self.shape(cut, side.other)), strict=True))
        return self.values.view([sizes[axis] for axis in range(8)]).permute(*whole, *other)

    def squared_difference(self, cut: int, left: Tensor, right: Tensor) -> tuple[float, float]:
        """||A - B||^2 and ||A||^2 for a B of the unfoldings' factors (a, M, N, W, r), (r, M, N, W, b) on a cut."""
        side = Side.LEFT if left.numel() <= right.numel() else Side.RIGHT
        whole, other = (left, right) if side == Side.LEFT else (right, left)
        whole = whole.flatten(0, 3) if side == Side.LEFT else whole.flatten(1).T
        missed = squared = 0.0
        for axis, start, piece in self._pieces(cut, side):
            is_left = side == Side.LEFT
            part = other.narrow(axis + is_left, start, piece.shape[4 + axis])
            block = _matrix(piece, whole.dtype)
            squared += float(block.square().sum())
            block.addmm_(whole, part.flatten(1) if is_left else part.flatten(0, 3).T, alpha=-1)
            missed += float(block.square_().sum())
        return missed, squared


def _matrix(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """A fresh matrix of a piece, its first four axes as rows."""
    rows = prod(piece.shape[:4])
    matrix = torch.empty(piece.shape, dtype=dtype, device=piece.device).copy_(piece)
    return matrix.reshape(rows, -1)


def _add_gram(gram: Tensor, block: Tensor) -> None:
    """Add the lower triangle of block block^T, in halves where that saves time."""
    half = len(gram) // 2
    if half < 64:
        gram.addmm_(block, block.T)
        return
    upper, lower = block[:half], block[half:]
    _add_gram(gram[:half, :half], upper)
    _add_gram(gram[half:, half:], lower)
    gram[half:, :half].addmm_(lower, upper.T)


def fold(weight: Tensor, tensorization: Tensorization) -> Folded:
    """View a weight (out, in[, kh, kw]) as the tensor of its tensorization; copied only where zeros are padded."""
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    pad_out, pad_in = (
        prod(factors) - size
        for factors, size in zip((tensorization.out_modes, tensorization.in_modes), flat.shape, strict=False)
    )
    if pad_out or pad_in:
        flat = functional.pad(flat, (0, 0, 0, pad_in, 0, pad_out))
    return Folded(flat[None, ..., None], tensorization.modes)


def interleave(values: Tensor, modes: Sequence[Mode]) -> Tensor:
    """Values (a, M, N, W, b) in the order of the modes, as one vector."""
    count = len(modes)
    view = values.reshape(len(values), *(n for factors in zip(*modes, strict=True) for n in factors), -1)
    order = [0, *(1 + k + j * count for k in range(count) for j in range(3)), 3 * count + 1]
    # torch copies at most some two dozen axes at a time; those of size 1 have no order.
    wide = [axis for axis in order if view.shape[axis] > 1]
    rank = {axis: number for number, axis in enumerate(sorted(wide))}
    return view.squeeze().permute([rank[axis] for axis in wide]).reshape(-1)


def split(values: Tensor, modes: Sequence[Mode], centre: int) -> list[Tensor]:
    """Exact cores (r, s_k, r') of values (a, M, N, W, b): all but the one at `centre` are identities.

    The TT-ranks are the full ones: of the modes to the left of the centre, and to the right of it.
    """
    sizes = [mode.size for mode in modes]
    lefts = [values.shape[0] * prod(sizes[:k]) for k in range(centre + 1)]
    rights = [prod(sizes[k:]) * values.shape[-1] for k in range(centre + 1, len(sizes) + 1)]
    eye = torch.eye(max(lefts[-1], rights[0]), dtype=values.dtype, device=values.device)
    return [
        *(eye[:q, :q].reshape(p, -1, q) for p, q in pairwise(lefts)),
        interleave(values, modes).reshape(lefts[-1], sizes[centre], rights[0]),
        *(eye[:p, :p].reshape(p, -1, q) for p, q in pairwise(rights)),
    ]


@cache
def sweep_order(sizes: tuple[int, ...]) -> tuple[tuple[int, Side], ...]:
    """Cuts in the order in which TT-SVD is cheapest, each with the side that becomes a core.

    The ends are cut off one by one towards the middle. Only the mode sizes decide, with LIKELY_RANK at every cut: were
    it the TT-ranks, more rank could mean another order and with it more error.
    """
    count = len(sizes)
    ranks = [min(LIKELY_RANK, prod(sizes[:k]), prod(sizes[k:])) for k in range(count + 1)]

    @cache
    def best(first: int, last: int) -> tuple[float, tuple[tuple[int, Side], ...]]:
        if last - first < 2:
            return 0.0, ()
        total = ranks[first] * prod(sizes[first:last]) * ranks[last]
        found: tuple[float, tuple[tuple[int, Side], ...]] = (inf, ())
        ends = [(Side.LEFT, first + 1, (first + 1, last)), (Side.RIGHT, last - 1, (first, last - 1))]
        # Of two that cost the same, the end that fewer modes were cut from: real TT-ranks grow towards the middle.
        for side, cut, rest in ends if first <= count - last else reversed(ends):
            end = ranks[first] * sizes[first] if side == Side.LEFT else sizes[last - 1] * ranks[last]
            later, order = best(*rest)
            cost = later + total * (min(end, total // end) + PASS_COST)
            found = min(found, (cost, ((cut, side), *order)), key=lambda each: each[0])
        return found

    return best(0, count)[1]
