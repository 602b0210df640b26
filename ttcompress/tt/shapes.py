"""Tensorizations: how a weight is viewed as a d-way tensor. Integers only; no tensor in sight.

A weight (out, in, kh, kw) -- a fully-connected one is (out, in, 1, 1) -- is viewed as a tensor whose k-th mode joins an
output factor m_k, an input factor n_k and a piece w_k of the kernel window. TT-core k then has the stored shape
(r_{k-1}, m_k, n_k, w_k, r_k). Multi-indices are row-major, the first mode slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ttcompress.errors import ShapeError

FORMATS = ("matrix", "chain", "naive", "lowrank")
MAX_MODES = 6
MIN_MODE_SIZE = 16


class Mode(NamedTuple):
    """One mode of a tensorization: its output, input and window factors."""

    out: int
    inp: int
    window: int

    @property
    def size(self) -> int:
        """Number of indices of the mode, m_k n_k w_k."""
        return self.out * self.inp * self.window


@dataclass(frozen=True)
class Tensorization:
    """The modes of one weight, in order, under the name of their format (Novikov et al. 2015; Garipov et al. 2016)."""

    format: str
    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ShapeError(f"unknown format {self.format!r}: choose one of {', '.join(FORMATS)}")
        if not self.modes or any(not isinstance(f, int) or f < 1 for mode in self.modes for f in mode):
            raise ShapeError(f"modes must be positive whole numbers, not {[tuple(mode) for mode in self.modes]}")

    @property
    def out_modes(self) -> tuple[int, ...]:
        """m_1 ... m_d; their product is the (padded) output dimension."""
        return tuple(mode.out for mode in self.modes)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """n_1 ... n_d; their product is the (padded) input dimension."""
        return tuple(mode.inp for mode in self.modes)

    @property
    def window_modes(self) -> tuple[int, ...]:
        """w_1 ... w_d; their product is kh kw."""
        return tuple(mode.window for mode in self.modes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Mode sizes m_k n_k w_k of the d-way tensor."""
        return tuple(mode.size for mode in self.modes)

    def core_shapes(self, tt_ranks: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
        """Stored shapes (r_{k-1}, m_k, n_k, w_k, r_k) of the TT-cores."""
        return [(left, *mode, right) for left, mode, right in zip(tt_ranks[:-1], self.modes, tt_ranks[1:], strict=True)]

    def num_params(self, tt_ranks: Sequence[int]) -> int:
        """Number of entries of all TT-cores at these TT-ranks."""
        return sum(prod(shape) for shape in self.core_shapes(tt_ranks))

    def max_ranks(self) -> tuple[int, ...]:
        """The largest feasible TT-ranks: r_k <= min(s_1 ... s_k, s_{k+1} ... s_d)."""
        return feasible_ranks(self.sizes, [prod(self.sizes)] * (len(self.modes) + 1))

    def expand_ranks(self, ranks: int | Sequence[int]) -> tuple[int, ...]:
        """TT-ranks with both ends 1 from one number for all cuts, from the inner ranks, or from the full list.

        Raises:
            ShapeError: a rank below 1, or a list whose length fits neither form.
        """
        inner = len(self.modes) - 1
        if isinstance(ranks, int):
            full = (1, *[ranks] * inner, 1)
        elif len(ranks) == inner:
            full = (1, *ranks, 1)
        else:
            full = tuple(ranks)
        if len(full) != inner + 2 or full[0] != 1 or full[-1] != 1:
            raise ShapeError(f"{len(self.modes)} modes take {inner} inner TT-ranks, not {list(full)}")
        if (ranks if isinstance(ranks, int) else min(full)) < 1:
            raise ShapeError(f"TT-ranks must be at least 1, not {list(full)}")
        return full


def is_swept(weight_shape: Sequence[int], tensorization: Tensorization) -> bool:
    """Whether inputs are contracted with the cores one by one; else the cores are a chain of convolutions."""
    return len(weight_shape) == 2 or tensorization.format == "matrix"


def feasible_ranks(sizes: Sequence[int], tt_ranks: Sequence[int]) -> tuple[int, ...]:
    """Clip TT-ranks to what unfoldings can carry: r_k <= r_{k-1} s_k and r_{k-1} <= s_k r_k (both ends are 1)."""
    ranks = [1, *tt_ranks[1:-1], 1]
    for k, size in enumerate(sizes[:-1]):
        ranks[k + 1] = min(ranks[k + 1], ranks[k] * size)
    for k in range(len(sizes) - 1, 0, -1):
        ranks[k] = min(ranks[k], sizes[k] * ranks[k + 1])
    return tuple(ranks)


def tensorize_shape(
    weight_format: str,
    weight_shape: Sequence[int],
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
) -> Tensorization:
    """The tensorization of a weight of shape (out, in) or (out, in, kh, kw) in one of the FORMATS.

    A kernel mode of size 1 is dropped, so that `chain` and `naive` on a 1x1 kernel are `lowrank`. `out_modes` and
    `in_modes` are the channel (feature) factors of `matrix`; without them balanced ones are chosen.

    Raises:
        ShapeError: another kind of weight, modes given for another format than `matrix`, or too small for the weight.
    """
    if len(weight_shape) not in (2, 4) or min(weight_shape) < 1:
        raise ShapeError(f"a weight is (out, in) or (out, in, kh, kw), all at least 1, not {tuple(weight_shape)}")
    out_dim, in_dim, kh, kw = (*weight_shape, 1, 1)[:4]
    window = kh * kw
    if weight_format == "matrix":
        pairs = _matrix_modes(out_dim, in_dim, out_modes, in_modes)
        head = [Mode(1, 1, window)] if window > 1 else []
        return Tensorization("matrix", (*head, *(Mode(m, n, 1) for m, n in pairs)))
    if out_modes or in_modes:
        raise ShapeError(f"in_modes and out_modes belong to format matrix, not {weight_format}")
    if weight_format == "lowrank" or (window == 1 and weight_format in FORMATS):
        return Tensorization("lowrank", (Mode(1, in_dim, window), Mode(out_dim, 1, 1)))
    channels = Mode(1, in_dim, 1), Mode(out_dim, 1, 1)
    if weight_format == "chain":
        return Tensorization("chain", (channels[0], Mode(1, 1, window), channels[1]))
    kernel = [Mode(1, 1, size) for size in (kh, kw) if size > 1]
    return Tensorization(weight_format, (*kernel, *channels))


def _matrix_modes(
    out_dim: int, in_dim: int, out_modes: Sequence[int] | None, in_modes: Sequence[int] | None
) -> list[tuple[int, int]]:
    if (out_modes is None) != (in_modes is None):
        raise ShapeError("in_modes and out_modes are given together")
    if out_modes is None or in_modes is None:
        return auto_modes(out_dim, in_dim)
    if len(out_modes) != len(in_modes):
        raise ShapeError(f"in_modes and out_modes differ in length: {list(in_modes)} and {list(out_modes)}")
    for what, modes, dim in (("out_modes", out_modes, out_dim), ("in_modes", in_modes, in_dim)):
        if any(mode < 1 for mode in modes) or not dim <= prod(modes) < 2 * dim:
            raise ShapeError(
                f"{what} {','.join(map(str, modes))} multiply to {prod(modes)}; the weight needs {dim} "
                "(a little more is padded with zeros)"
            )
    return list(zip(out_modes, in_modes, strict=True))


@lru_cache(maxsize=4096)
def _pairs(out_dim: int, in_dim: int, count: int) -> tuple[tuple[int, int], ...]:
    """`count` (m_k, n_k) pairs with even products, the two largest products at the ends, where a core is cheapest."""
    outs = sorted(_balanced_factors(out_dim, count), reverse=True)
    pairs = sorted(
        zip(outs, sorted(_balanced_factors(in_dim, count)), strict=True), key=lambda pair: (-pair[0] * pair[1], pair)
    )
    return (*pairs[:1], *pairs[2:], *pairs[1:2])


def auto_modes(out_dim: int, in_dim: int) -> list[tuple[int, int]]:
    """(m_k, n_k) pairs for an out_dim x in_dim matrix: at most 6, as many as keep every m_k n_k >= 16."""
    for count in range(MAX_MODES, 1, -1):
        pairs = _pairs(out_dim, in_dim, count)
        if all(m * n >= MIN_MODE_SIZE for m, n in pairs):
            return list(pairs)
    return [(out_dim, in_dim)]


def _balanced_factors(dim: int, count: int) -> tuple[int, ...]:
    """`count` factors, as equal as possible, of `dim` or of the next number above it that has balanced ones."""
    root = 1
    while root**count < dim:
        root += 1
    for padded in range(dim, root**count + 1):
        factors = min(_factorizations(padded, count), key=lambda fs: (sum(fs), max(fs)))
        if max(factors) <= 2 * root:
            return factors
    return (root,) * count


def _factorizations(number: int, count: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """All ways to write `number` as a product of `count` factors in ascending order, each at least `least`."""
    if count == 1:
        if number >= least:
            yield (number,)
        return
    factor = least
    while factor**count <= number:
        if number % factor == 0:
            for rest in _factorizations(number // factor, count - 1, factor):
                yield (factor, *rest)
        factor += 1
