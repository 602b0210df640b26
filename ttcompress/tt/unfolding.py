"""Unfoldings of a tensorized weight, block by block, without ever bringing its modes into order in memory.

Gram matrices and projections do not depend on the order of the columns of an unfolding. So the tensor stays
as the weight lies in memory, outputs, inputs and window beside each other instead of mode by mode, and no
interleaved copy of it is made. A cut divides each of the three products of modes in two; with three modes,
cut after the second:

    Folded.values     a   M = m_1 m_2 m_3     N = n_1 n_2 n_3     W = w_1 w_2 w_3     b
                      |     m_1 m_2 | m_3       n_1 n_2 | n_3       w_1 w_2 | w_3     |
    axis              0        1       2           3       4           5       6      7
    side            left     left    right       left    right       left    right  right

`a` and `b` are TT-ranks: cores that were cut off already have left them in their places. The rows of the
unfolding are the axes 0, 1, 3, 5 joined, its columns the axes 2, 4, 6, 7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise
from math import prod
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.tt.shapes import Mode, Tensorization

BLOCK = 1 << 18
"""Entries that are brought into order at a time: few enough for a processor's cache."""
COLUMNS, LARGE_BLOCK = 512, 1 << 22
"""Columns, and entries at most, of a block of many rows: products of narrow ones would only move memory."""
BLOCK_ON_GPU = 1 << 24
"""The same on a GPU, which has to be told of each block."""
HALVED_ON_GPU = 2048
"""There, half of a Gram matrix that is large enough to be computed in halves."""
LIKELY_RANK = 4
"""The TT-rank that is expected at a cut, to compare orders before any is known."""
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
    """A d-way tensor with TT-ranks at its ends, as (a, M, N, W, b).

    M, N and W are the products of the m_k, the n_k and the w_k. `is_owned` tells that no one else reads the
    values, so that a projection may overwrite them.
    """

    values: Tensor
    modes: tuple[Mode, ...]
    is_owned: bool = False

    def shape(self, cut: int, side: Side) -> tuple[int, ...]:
        """Return (a, M, N, W) of the first `cut` modes, or (M, N, W, b) of the others."""
        first, *_, last = self.values.shape
        modes = self.modes[:cut] if side == Side.LEFT else self.modes[cut:]
        # The ones stand for no modes at all.
        factors = zip((1, 1, 1), *modes, strict=True)
        sizes = tuple(prod(each) for each in factors)
        return (first, *sizes) if side == Side.LEFT else (*sizes, last)

    def _pieces(self, cut: int, side: Side) -> Iterator[tuple[int, int, Tensor]]:
        """Yield parts with the `side` whole: the axis that is cut, where they start, and values.

        The axis is one of the other side. The axes of the values are those of the side, then those of the
        other.
        """
        view = self._view(cut, side)
        rows = prod(view.shape[:4])
        sizes = view.shape[4:]
        most = max(block_size(view.device), min(LARGE_BLOCK, COLUMNS * rows))
        count = -(-view.numel() // most)

        # The slowest axis that is long enough leaves the longest runs in memory to what is copied.
        longest = sizes.index(max(sizes))
        long_enough = (axis for axis in range(4) if 4 * sizes[axis] >= count)
        axis = next(long_enough, longest)

        length = sizes[axis]
        step = max(1, length // count)
        for start in range(0, length, step):
            width = min(step, length - start)
            yield axis, start, view.narrow(4 + axis, start, width)

    def blocks(self, cut: int, side: Side, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield matrices with the `side` as rows; side by side, in some order, they are the unfolding."""
        for _, _, piece in self._pieces(cut, side):
            yield _matrix(piece, dtype)

    def gram(self, cut: int, side: Side) -> Tensor:
        """Return the Gram matrix of the rows of a side, accumulated in float64."""
        size = prod(self.shape(cut, side))
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.values.device)
        for block in self.blocks(cut, side, torch.float64):
            _add_gram(gram, block)

        # Only the lower triangle was summed up.
        upper = gram.tril(-1).T
        return gram.tril_().add_(upper)

    def project(self, cut: int, side: Side, basis: Tensor, dtype: torch.dtype) -> Folded:
        """Contract a side with a basis (size of the side, r): r is left in its place.

        The product is taken in the type of the basis. Values that belong to no one else are overwritten where
        the result, of type `dtype`, fits among them: each piece is copied before its part of the result is
        written.
        """
        is_left = side == Side.LEFT
        out = self._room(cut, side, basis.shape[1], dtype)

        for axis, start, piece in self._pieces(cut, side):
            width = piece.shape[4 + axis]
            # On the left the TT-rank that is new comes before the axes of the other side.
            part = out.narrow(axis + is_left, start, width)
            block = _matrix(piece, basis.dtype)
            product = basis.T @ block if is_left else block.T @ basis
            part.copy_(product.reshape(part.shape))

        modes = self.modes[cut:] if is_left else self.modes[:cut]
        return Folded(out, modes, is_owned=True)

    def _room(self, cut: int, side: Side, rank: int, dtype: torch.dtype) -> Tensor:
        """Find memory for (r, M, N, W, b) or (a, M, N, W, r): among the values where it fits, else new."""
        is_left = side == Side.LEFT
        shape = self.shape(cut, side.other)
        view = self._view(cut, side)
        # An axis of the side that has r entries or more holds the TT-rank; of the side's other axes the first
        # entries are taken.
        axis = next((axis for axis in range(4) if view.shape[axis] >= rank), None)

        if not self.is_owned or axis is None or view.dtype != dtype:
            needed = (rank, *shape) if is_left else (*shape, rank)
            return view.new_empty(needed, dtype=dtype)

        first = view.narrow(axis, 0, rank).movedim(axis, 0)[:, 0, 0, 0]
        return first if is_left else first.movedim(0, -1)

    def _view(self, cut: int, side: Side) -> Tensor:
        """View the values with eight axes: those of the side, then those of the other."""
        axes = (*_AXES[side], *_AXES[side.other])
        lengths = (*self.shape(cut, side), *self.shape(cut, side.other))
        sizes = dict(zip(axes, lengths, strict=True))
        divided = self.values.view([sizes[axis] for axis in range(8)])
        return divided.permute(*axes)

    def squared_difference(self, cut: int, left: Tensor, right: Tensor) -> tuple[float, float]:
        """Measure ||A - B||^2 and ||A||^2 for a B of factors (a, M, N, W, r) and (r, M, N, W, b) on a cut."""
        # The smaller factor is used whole for every piece, the larger one in the parts that meet the piece.
        is_left = left.numel() <= right.numel()
        side = Side.LEFT if is_left else Side.RIGHT
        other = right if is_left else left
        whole = left.flatten(0, 3) if is_left else right.flatten(1).T

        squares, missed = list[Tensor](), list[Tensor]()
        for axis, start, piece in self._pieces(cut, side):
            width = piece.shape[4 + axis]
            part = other.narrow(axis + is_left, start, width)
            columns = part.flatten(1) if is_left else part.flatten(0, 3).T
            block = _matrix(piece, whole.dtype)
            squares.append(block.square().sum())
            block.addmm_(whole, columns, alpha=-1)
            missed.append(block.square_().sum())
        # Read at once: a GPU would have to be waited for at each block.
        both = (sum(torch.stack(sums).tolist()) for sums in (missed, squares))
        return next(both), next(both)


def block_size(device: torch.device) -> int:
    """Return how many entries are looked at at a time."""
    return BLOCK_ON_GPU if device.type == "cuda" else BLOCK


def _matrix(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy a piece into a fresh matrix, its first four axes as rows."""
    rows = prod(piece.shape[:4])
    matrix = torch.empty(piece.shape, dtype=dtype, device=piece.device)
    return matrix.copy_(piece).reshape(rows, -1)


def _add_gram(gram: Tensor, block: Tensor) -> None:
    """Add the lower triangle of block block^T, in halves where that saves time."""
    half = len(gram) // 2
    # On a GPU a few large products take less time than many small ones to begin.
    if half < (HALVED_ON_GPU if gram.is_cuda else 64):
        gram.addmm_(block, block.T)
        return

    # The quarter above the diagonal is left out.
    upper, lower = block[:half], block[half:]
    _add_gram(gram[:half, :half], upper)
    _add_gram(gram[half:, half:], lower)
    gram[half:, :half].addmm_(lower, upper.T)


def fold(weight: Tensor, tensorization: Tensorization) -> Folded:
    """View a weight (out, in[, kh, kw]) as its tensorization has it; a copy only where it is padded."""
    out_dim, in_dim = weight.shape[:2]
    flat = weight.reshape(out_dim, in_dim, -1)

    pad_out = prod(tensorization.out_modes) - out_dim
    pad_in = prod(tensorization.in_modes) - in_dim
    if pad_out or pad_in:
        flat = functional.pad(flat, (0, 0, 0, pad_in, 0, pad_out))

    return Folded(flat[None, ..., None], tensorization.modes)


def interleave(values: Tensor, modes: Sequence[Mode]) -> Tensor:
    """Bring values (a, M, N, W, b) into the order of the modes, as one vector."""
    count = len(modes)
    outs, ins, windows = zip(*modes, strict=True)
    view = values.reshape(len(values), *outs, *ins, *windows, -1)

    # Mode k has its factors at k, d + k and 2 d + k, after the axis of the TT-rank in front.
    by_mode = [1 + k + j * count for k in range(count) for j in range(3)]
    order = [0, *by_mode, 3 * count + 1]
    # torch copies at most some two dozen axes at a time; those of size 1 have no order.
    wide = [axis for axis in order if view.shape[axis] > 1]
    place = {axis: number for number, axis in enumerate(sorted(wide))}
    ordered = view.squeeze().permute([place[axis] for axis in wide])
    return ordered.reshape(-1)


def split(values: Tensor, modes: Sequence[Mode], centre: int) -> list[Tensor]:
    """Return exact cores (r, s_k, r') of values (a, M, N, W, b): all but the one at `centre` are identities.

    The TT-ranks are the full ones: of the modes to the left of the centre, and to the right of it.
    """
    sizes = [mode.size for mode in modes]
    first, *_, last = values.shape
    lefts = [first * prod(sizes[:k]) for k in range(centre + 1)]
    rights = [prod(sizes[k:]) * last for k in range(centre + 1, len(sizes) + 1)]

    # A core before the centre joins its mode to the TT-rank that it takes over, one after it parts them
    # again.
    largest = max(lefts[-1], rights[0])
    eye = torch.eye(largest, dtype=values.dtype, device=values.device)
    before = [eye[:q, :q].reshape(p, -1, q) for p, q in pairwise(lefts)]
    after = [eye[:p, :p].reshape(p, -1, q) for p, q in pairwise(rights)]

    core = interleave(values, modes).reshape(lefts[-1], sizes[centre], rights[0])
    return [*before, core, *after]


_Order = tuple[tuple[int, Side], ...]
"""Cuts, one after the other, with the side that is cut off."""


@cache
def cut_order(sizes: tuple[int, ...]) -> tuple[tuple[int, Side], ...]:
    """Return the cuts in the order in which TT-SVD is cheapest, each with the side that becomes a core.

    The ends are cut off one by one towards the middle. Only the mode sizes decide, with LIKELY_RANK at every
    cut: were it the TT-ranks, more rank could mean another order and with it more error.
    """
    count = len(sizes)
    ranks = [min(LIKELY_RANK, prod(sizes[:k]), prod(sizes[k:])) for k in range(count + 1)]

    @cache
    def best(first: int, last: int) -> tuple[float, _Order]:
        """What is the least cost of the modes from `first` up to `last`, and by which cuts?"""
        if last - first < 2:
            return 0.0, ()
        total = ranks[first] * prod(sizes[first:last]) * ranks[last]

        def after(end: int, cut: int, side: Side, rest: tuple[int, int]) -> tuple[float, _Order]:
            """Cut off an end of this size, by the Gram matrix of the shorter side, then the rest."""
            later, order = best(*rest)
            short = min(end, total // end)
            return later + total * (short + PASS_COST), ((cut, side), *order)

        left = after(ranks[first] * sizes[first], first + 1, Side.LEFT, (first + 1, last))
        right = after(sizes[last - 1] * ranks[last], last - 1, Side.RIGHT, (first, last - 1))
        # Of two that cost the same, the end that fewer modes were cut from: real TT-ranks grow towards the
        # middle.
        ends = [left, right] if first <= count - last else [right, left]
        return min(ends, key=itemgetter(0))

    return best(0, count)[1]
