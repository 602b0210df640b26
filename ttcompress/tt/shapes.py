"""Tensorizations: how a weight is viewed as a d-way tensor. Integers only; no tensor in sight.

A weight (out, in, kh, kw) -- a fully-connected one is (out, in, 1, 1) -- is viewed as a tensor whose k-th
mode joins an output factor m_k, an input factor n_k and a piece w_k of the kernel window. TT-core k then has
the stored shape (r_{k-1}, m_k, n_k, w_k, r_k). Multi-indices are row-major, the first mode slowest.
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
"""Most modes that are chosen without being asked for."""
LARGEST_SEARCHED = 10**8
"""Largest dimension whose factors are searched for, which takes the square root of as many steps."""
MIN_MODE_SIZE = 16
"""Least m_k n_k of a mode that is chosen without being asked for."""


class Mode(NamedTuple):
    """One mode of a tensorization: its output factor m_k, input factor n_k and window factor w_k.

    Example:
        >>> Mode(out=4, inp=2, window=9).size
        72
    """

    out: int
    inp: int
    window: int

    @property
    def size(self) -> int:
        """Number of indices of the mode, m_k n_k w_k."""
        return self.out * self.inp * self.window


@dataclass(frozen=True)
class Tensorization:
    """The modes of one weight, in order, under the name of their format.

    The formats are those of Novikov et al. (2015, section 4) and Garipov et al. (2016). `tensorize_shape`
    makes one from the shape of a weight.

    Raises:
        ShapeError: an unknown format, no modes at all, or factors that are not positive whole numbers.

    Example:
        >>> view = Tensorization("matrix", (Mode(4, 7, 1), Mode(5, 8, 1)))
        >>> view.sizes, view.max_ranks()
        ((28, 40), (1, 28, 1))
        >>> view.core_shapes([1, 3, 1]), view.num_params([1, 3, 1])
        ([(1, 4, 7, 1, 3), (3, 5, 8, 1, 1)], 204)
    """

    format: str
    modes: tuple[Mode, ...]
    groups: int = 1
    """Blocks of a weight, one for each group of channels, that are decomposed by themselves at the same TT-ranks."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            known = ", ".join(FORMATS)
            raise ShapeError(f"unknown format {self.format!r}: choose one of {known}")

        factors = [factor for mode in self.modes for factor in mode]
        are_positive = all(isinstance(factor, int) and factor >= 1 for factor in factors)
        if not self.modes or not are_positive:
            given = [tuple(mode) for mode in self.modes]
            raise ShapeError(f"modes must be positive whole numbers, not {given}")

    @property
    def out_modes(self) -> tuple[int, ...]:
        """The output factors m_1 ... m_d; their product is the (padded) output dimension."""
        return tuple(mode.out for mode in self.modes)

    @property
    def in_modes(self) -> tuple[int, ...]:
        """The input factors n_1 ... n_d; their product is the (padded) input dimension."""
        return tuple(mode.inp for mode in self.modes)

    @property
    def window_modes(self) -> tuple[int, ...]:
        """The window factors w_1 ... w_d; their product is kh kw."""
        return tuple(mode.window for mode in self.modes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The mode sizes m_k n_k w_k of the d-way tensor."""
        return tuple(mode.size for mode in self.modes)

    def core_shapes(self, tt_ranks: Sequence[int]) -> list[tuple[int, int, int, int, int]]:
        """Return the shapes (r_{k-1}, m_k, n_k, w_k, r_k) of the TT-cores of one group."""
        lefts = tt_ranks[:-1]
        rights = tt_ranks[1:]
        parts = zip(lefts, self.modes, rights, strict=True)
        return [(left, *mode, right) for left, mode, right in parts]

    def stored_shapes(self, tt_ranks: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the shapes of the TT-cores as they are stored, where there are several groups with these in front."""
        lead = (self.groups,) if self.groups > 1 else ()
        return [(*lead, *shape) for shape in self.core_shapes(tt_ranks)]

    def num_params(self, tt_ranks: Sequence[int]) -> int:
        """Count the entries of all TT-cores at these TT-ranks."""
        return self.groups * sum(prod(shape) for shape in self.core_shapes(tt_ranks))

    def max_ranks(self) -> tuple[int, ...]:
        """Return the largest feasible TT-ranks, r_k = min(s_1 ... s_k, s_{k+1} ... s_d)."""
        unlimited = prod(self.sizes)
        return feasible_ranks(self.sizes, [unlimited] * (len(self.modes) + 1))

    def swapped(self) -> Tensorization:
        """Return the same view of the transposed weight: outputs and inputs change places in each mode.

        Example:
            >>> Tensorization("lowrank", (Mode(1, 9, 1), Mode(4, 1, 1))).swapped().modes
            (Mode(out=9, inp=1, window=1), Mode(out=1, inp=4, window=1))
        """
        return Tensorization(self.format, tuple(Mode(inp, out, window) for out, inp, window in self.modes))

    def expand_ranks(self, ranks: int | Sequence[int]) -> tuple[int, ...]:
        """Return TT-ranks with both ends 1, from one number for all cuts, the inner ranks, or the full list.

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

        fits = len(full) == inner + 2 and full[0] == 1 and full[-1] == 1
        if not fits:
            raise ShapeError(f"{len(self.modes)} modes take {inner} inner TT-ranks, not {list(full)}")

        # A single mode has no cut, so that the full list would not show a wrong number.
        least = ranks if isinstance(ranks, int) else min(full)
        if least < 1:
            raise ShapeError(f"TT-ranks must be at least 1, not {list(full)}")
        return full


def is_contracted(weight_shape: Sequence[int], tensorization: Tensorization) -> bool:
    """Tell whether inputs meet the cores one by one, or the cores are a chain of convolutions."""
    return len(weight_shape) == 2 or tensorization.format == "matrix"


def feasible_ranks(sizes: Sequence[int], tt_ranks: Sequence[int]) -> tuple[int, ...]:
    """Clip TT-ranks to what the unfoldings can carry.

    An unfolding has at most as many independent rows and columns as there are of each, so that
    r_k <= r_{k-1} s_k and r_{k-1} <= s_k r_k (Oseledets 2011, section 2). Both ends become 1.

    Args:
        sizes: the mode sizes s_1 ... s_d.
        tt_ranks: all d + 1 TT-ranks.

    Example:
        >>> feasible_ranks((4, 5, 6), (1, 100, 100, 1))
        (1, 4, 6, 1)
    """
    ranks = [1, *tt_ranks[1:-1], 1]

    for k, size in enumerate(sizes[:-1]):
        most = ranks[k] * size
        ranks[k + 1] = min(ranks[k + 1], most)

    for k in range(len(sizes) - 1, 0, -1):
        most = sizes[k] * ranks[k + 1]
        ranks[k] = min(ranks[k], most)

    return tuple(ranks)


def tensorize_shape(
    weight_format: str,
    weight_shape: Sequence[int],
    out_modes: Sequence[int] | None = None,
    in_modes: Sequence[int] | None = None,
    groups: int = 1,
) -> Tensorization:
    """Choose the modes of a weight (out, in), with the axes of its window behind if any, in one of the FORMATS.

    `matrix` is the TT-matrix of Novikov et al. (2015, section 4) and its convolution by Garipov et al.
    (2016); `naive` is the latter's baseline. A kernel mode of size 1 is dropped, so that `chain` and `naive`
    on a 1x1 kernel are `lowrank`.

    Args:
        weight_format: one of the FORMATS.
        weight_shape: (out, in) or (out, in, kh, kw), of any number of axes after the first two.
        out_modes: the factors of the outputs, for `matrix` only; without them balanced ones are chosen.
        in_modes: the same of the inputs; both are given, or none.
        groups: how many weights of this shape there are, one for each group of channels.

    Raises:
        ShapeError: another kind of weight, an unknown format, modes given for another format than `matrix`,
            or modes whose product is below the dimension, or twice it and more.

    Example:
        >>> tensorize_shape("chain", (16, 8, 3, 3)).modes
        (Mode(out=1, inp=8, window=1), Mode(out=1, inp=1, window=9), Mode(out=16, inp=1, window=1))
        >>> tensorize_shape("matrix", (10, 784), out_modes=(2, 5), in_modes=(28, 28)).sizes
        (56, 140)
    """
    if len(weight_shape) < 2 or min(weight_shape) < 1:
        given = tuple(weight_shape)
        raise ShapeError(f"a weight is (out, in) or (out, in, kh, kw), all at least 1, not {given}")
    out_dim, in_dim, *kernel_sizes = weight_shape
    window = prod(kernel_sizes)

    if weight_format == "matrix":
        pairs = _matrix_modes(out_dim, in_dim, out_modes, in_modes)
        head = [Mode(1, 1, window)] if window > 1 else []
        return Tensorization("matrix", (*head, *(Mode(m, n, 1) for m, n in pairs)), groups)
    if out_modes or in_modes:
        raise ShapeError(f"in_modes and out_modes belong to format matrix, not {weight_format}")

    outputs = Mode(out_dim, 1, 1)
    is_single = window == 1 and weight_format in FORMATS
    if weight_format == "lowrank" or is_single:
        joined = Mode(1, in_dim, window)
        return Tensorization("lowrank", (joined, outputs), groups)

    inputs = Mode(1, in_dim, 1)
    if weight_format == "chain":
        return Tensorization("chain", (inputs, Mode(1, 1, window), outputs), groups)

    # An unknown format is left to the Tensorization to refuse.
    kernel = [Mode(1, 1, size) for size in kernel_sizes if size > 1]
    return Tensorization(weight_format, (*kernel, inputs, outputs), groups)


def _matrix_modes(
    out_dim: int,
    in_dim: int,
    out_modes: Sequence[int] | None,
    in_modes: Sequence[int] | None,
) -> list[tuple[int, int]]:
    """Pair the factors that were given, after a check, or choose them."""
    if (out_modes is None) != (in_modes is None):
        raise ShapeError("in_modes and out_modes are given together")
    if out_modes is None or in_modes is None:
        return auto_modes(out_dim, in_dim)
    if len(out_modes) != len(in_modes):
        given = f"{list(in_modes)} and {list(out_modes)}"
        raise ShapeError(f"in_modes and out_modes differ in length: {given}")

    _check_product("out_modes", out_modes, out_dim)
    _check_product("in_modes", in_modes, in_dim)
    return list(zip(out_modes, in_modes, strict=True))


def _check_product(what: str, modes: Sequence[int], dim: int) -> None:
    """Refuse factors that do not reach the dimension, or reach twice it and would store mostly padding."""
    product = prod(modes)
    are_positive = all(mode >= 1 for mode in modes)
    if are_positive and dim <= product < 2 * dim:
        return

    listed = ",".join(map(str, modes))
    raise ShapeError(
        f"{what} {listed} multiply to {product}; the weight needs {dim} (a little more is padded with zeros)"
    )


@lru_cache(maxsize=4096)
def _pairs(out_dim: int, in_dim: int, count: int) -> tuple[tuple[int, int], ...]:
    """Return `count` pairs (m_k, n_k) with even products."""
    # The largest m_k meets the smallest n_k, so that the products come out even.
    outs = sorted(_balanced_factors(out_dim, count), reverse=True)
    ins = sorted(_balanced_factors(in_dim, count))

    def by_product(pair: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return -pair[0] * pair[1], pair

    largest, *others = sorted(zip(outs, ins, strict=True), key=by_product)
    # A core at an end has one TT-rank of 1 and is cheapest: the two largest products go there.
    return (largest, *others[1:], *others[:1])


def auto_modes(out_dim: int, in_dim: int) -> list[tuple[int, int]]:
    """Choose pairs (m_k, n_k) for an out x in matrix: at most 6, as many as keep every m_k n_k >= 16."""
    for count in range(MAX_MODES, 1, -1):
        pairs = _pairs(out_dim, in_dim, count)
        least = min(m * n for m, n in pairs)
        if least >= MIN_MODE_SIZE:
            return list(pairs)
    return [(out_dim, in_dim)]


def _balanced_factors(dim: int, count: int) -> tuple[int, ...]:
    """Return `count` factors, as equal as possible, of `dim` or of the next number that has balanced ones."""
    if dim > LARGEST_SEARCHED:
        return _equal_factors(dim, count)

    # The least whole number whose power reaches `dim`: the size that equal factors would have.
    root = 1
    while root**count < dim:
        root += 1

    def spread(factors: tuple[int, ...]) -> tuple[int, int]:
        return sum(factors), max(factors)

    for padded in range(dim, root**count + 1):
        factors = min(_factorizations(padded, count), key=spread)
        if max(factors) <= 2 * root:
            return factors
    return (root,) * count


def _equal_factors(dim: int, count: int) -> tuple[int, ...]:
    """Return `count` factors, two neighbouring numbers, of the least such product that is at least `dim`."""
    low, high = 1, 1 << -(-dim.bit_length() // count)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if middle**count < dim else (low, middle)

    root = low
    smaller = 0
    while (root - 1) ** (smaller + 1) * root ** (count - smaller - 1) >= dim:
        smaller += 1
    return (root - 1,) * smaller + (root,) * (count - smaller)


def _factorizations(number: int, count: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write `number` as a product of `count` ascending factors, each at least `least`."""
    if count == 1:
        if number >= least:
            yield (number,)
        return

    factor = least
    while factor**count <= number:
        quotient, remainder = divmod(number, factor)
        if remainder == 0:
            for rest in _factorizations(quotient, count - 1, factor):
                yield (factor, *rest)
        factor += 1
