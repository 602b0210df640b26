"""The algebra of TT-tensors (Oseledets 2011, sections 3 and 4; Novikov et al. 2015, sections 3 and 4).

A TT-tensor is a sequence of cores; core k has shape (r_{k-1}, *modes of core k, r_k), r_0 = r_d = 1. One mode
a core makes a TT-vector, two make a TT-matrix (r_{k-1}, m_k, n_k, r_k). Only `to_tensor` and `to_matrix` form
the full tensor. No function changes its inputs or shares storage with them. Scalars and orthogonalisations
are computed in float64 and without autograd, the rest in the type of the cores. Every function raises
ShapeError where cores do not fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, inf, isfinite, ldexp, prod, sqrt

import torch
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt.contract import contract

# Where the largest entry of a normalised core lies: products of two stay finite, and tiny entries survive.
EXPONENT = 400
# Multiples of the unit of float64: below them a singular value, or what a contraction leaves, is round-off.
NOISE = 64 * torch.finfo(torch.float64).eps
CANCELLED = 8 * torch.finfo(torch.float64).eps


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Add two TT-tensors of the same modes; their TT-ranks add up.

    Core k of A + B is block diagonal, with core k of A above that of B (Oseledets 2011, section 4.1).

    Raises:
        ShapeError: cores that do not fit together, or modes that differ.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> total = add(a, a)
        >>> [tuple(core.shape) for core in total]
        [(1, 2, 2), (2, 3, 1)]
        >>> to_tensor(total).tolist()
        [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    """
    _check_same_modes(a, b)

    cores = []
    for x, y in zip(a, b, strict=True):
        beside_x = x.new_zeros(*x.shape[:-1], y.shape[-1])
        beside_y = y.new_zeros(*y.shape[:-1], x.shape[-1])
        upper = torch.cat([x, beside_x], dim=-1)
        lower = torch.cat([beside_y, y], dim=-1)
        cores.append(torch.cat([upper, lower]))

    # The TT-ranks at both ends are 1: the first core is a row of blocks, the last one a column.
    cores[0] = cores[0].sum(0, keepdim=True)
    cores[-1] = cores[-1].sum(-1, keepdim=True)
    return cores


def scale(a: Sequence[Tensor], c: float) -> list[Tensor]:
    """Multiply a TT-tensor by a number, which goes to the first core (Oseledets 2011, section 4.1).

    Raises:
        ShapeError: cores that do not fit together.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> to_tensor(scale(a, -2)).tolist()
        [[-2.0, -4.0, -6.0], [-2.0, -4.0, -6.0]]
    """
    _check(a)
    return [a[0] * c, *(core.clone() for core in a[1:])]


def add_constant(a: Sequence[Tensor], c: float) -> list[Tensor]:
    """Add a number to every entry of a TT-tensor; inner TT-ranks grow by one.

    It is the sum with a constant tensor, which has TT-ranks 1 (Novikov et al. 2015, section 3).

    Raises:
        ShapeError: cores that do not fit together.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> to_tensor(add_constant(a, 10)).tolist()
        [[11.0, 12.0, 13.0], [11.0, 12.0, 13.0]]
    """
    _check(a)
    constant = scale(_ones_like(a), c)
    return add(a, constant)


def multiply(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Multiply two TT-tensors of the same modes entry by entry; their TT-ranks multiply.

    Each slice of a core is the Kronecker product of the two slices (Oseledets 2011, section 4.2).

    Raises:
        ShapeError: cores that do not fit together, or modes that differ.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> to_tensor(multiply(a, a)).tolist()
        [[1.0, 4.0, 9.0], [1.0, 4.0, 9.0]]
    """
    _check_same_modes(a, b)

    cores = []
    for x, y in zip(a, b, strict=True):
        product = torch.einsum("anb,cnd->acnbd", _three_way(x), _three_way(y))
        left_rank = x.shape[0] * y.shape[0]
        cores.append(product.reshape(left_rank, *x.shape[1:-1], -1))
    return cores


def total(a: Sequence[Tensor]) -> float:
    """Sum up all entries of a TT-tensor: its inner product with ones (Novikov et al. 2015, section 3).

    Raises:
        ShapeError: cores that do not fit together.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> round(total(a), 6)
        12.0
    """
    _check(a)
    return inner(a, _ones_like(a))


@torch.no_grad()
def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Sum up the entrywise product of two TT-tensors of the same modes, in O(d n r^3) operations.

    The cores are contracted pair by pair from the first to the last (Oseledets 2011, algorithm 4).

    Raises:
        ShapeError: cores that do not fit together, or modes that differ.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> round(inner(a, a), 6)
        28.0
    """
    _check_same_modes(a, b)

    gram = a[0].new_ones(1, 1, dtype=torch.float64)
    exponent = 0
    for x, y in zip(a, b, strict=True):
        x, shift_x = _normalized(_three_way(x))
        y, shift_y = _normalized(_three_way(y))
        half, shift_half = _normalized(gram.T @ x.flatten(1))
        columns = half.reshape(-1, x.shape[-1])
        gram, shift_gram = _normalized(columns.T @ y.flatten(0, 1))
        exponent += shift_x + shift_y + shift_half + shift_gram
    return _ldexp(float(gram), exponent)


@torch.no_grad()
def norm(a: Sequence[Tensor]) -> float:
    """Return the Frobenius norm of a TT-tensor, that of the first core once the others are orthogonal.

    The square root of `inner` would lose half of the digits of a small difference (Oseledets 2011, section
    4.2).

    Raises:
        ShapeError: cores that do not fit together.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> round(norm(a) ** 2, 6)
        28.0
    """
    (first, *_), exponent = _from_the_right(a)
    size = float(torch.linalg.vector_norm(first))
    return _ldexp(size, exponent)


def left_orthogonalize(a: Sequence[Tensor]) -> list[Tensor]:
    """Return the same tensor with Q^T Q = I for every core but the last, as a matrix (r_{k-1} n_k) x r_k.

    No TT-rank is raised (Oseledets 2011, section 3).

    Raises:
        ShapeError: cores that do not fit together, or a norm that is not finite in the type of the cores.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> first, last = left_orthogonalize(a)
        >>> round(float(first.norm()), 5), round(float(last.norm()) ** 2, 4)
        (1.0, 28.0)
    """
    return _mirrored(right_orthogonalize(_mirrored(a)))


@torch.no_grad()
def right_orthogonalize(a: Sequence[Tensor]) -> list[Tensor]:
    """Return the same tensor with Q Q^T = I for every core but the first, as a matrix r_{k-1} x (n_k r_k).

    No TT-rank is raised (Oseledets 2011, section 3).

    Raises:
        ShapeError: cores that do not fit together, or a norm that is not finite in the type of the cores.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> first, last = right_orthogonalize(a)
        >>> round(float(first.norm()) ** 2, 4), round(float(last.norm()), 5)
        (28.0, 1.0)
    """
    (first, *rest), exponent = _from_the_right(a)
    first = times_two_to(first, exponent)
    cores = _restored([first, *rest], a)
    if not cores[0].isfinite().all():
        raise ShapeError(f"the core that carries the norm is not finite, or beyond the range of {a[0].dtype}")
    return cores


@torch.no_grad()
def round_tt(a: Sequence[Tensor], eps: float = 0.0, max_rank: int | None = None) -> list[Tensor]:
    """Lower the TT-ranks so that ||A - B||_F <= eps ||A||_F, capped at `max_rank`.

    It is TT-rounding (Oseledets 2011, algorithm 2): orthogonalise, then truncate.

    Each of the d - 1 cuts may leave out delta = eps ||A||_F / sqrt(d - 1). An eps below the round-off of the
    type, as the default, removes what is redundant at that round-off. The cap comes before the accuracy; no
    TT-rank is raised. A zero tensor gets TT-ranks 1. A tensor comes back as it was where the range of its
    type cannot hold new cores.

    Raises:
        ShapeError: also for a negative or infinite eps, a cap below 1, cores that are not finite, and where
            the range of the type cannot hold the cores that the cap asks for.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> [tuple(core.shape) for core in round_tt(add(a, a))]
        [(1, 2, 1), (1, 3, 1)]
    """
    if not 0 <= eps < inf or (max_rank is not None and max_rank < 1):
        given = f"eps={eps} and max_rank={max_rank}"
        raise ShapeError(f"rounding takes eps >= 0 and max_rank >= 1, not {given}")

    cores, exponent = _from_the_right(a)
    size = float(torch.linalg.vector_norm(cores[0]))
    if not isfinite(size):
        raise ShapeError("rounding takes finite cores: one holds NaN or Inf")
    if size == 0:
        return [core.new_zeros(1, *core.shape[1:-1], 1) for core in a]

    cuts = max(1, len(a) - 1)
    delta = _relative_delta(cores, a[0].dtype, eps) * size / sqrt(cuts)
    _truncate(cores, delta, max_rank)
    rounded = _restored(_spread(cores, exponent), a)
    if all(map(_is_normal, rounded)):
        return rounded

    # Cores that came out infinite or denormal would be wrong. Those that were given are right, if within the
    # cap.
    if max_rank is not None and any(core.shape[-1] > max_rank for core in a):
        dtype = a[0].dtype
        goal = f"rounding to max_rank={max_rank}"
        raise ShapeError(f"{goal} leaves the range of {dtype}: scale the cores first")
    return [core.clone() for core in a]


def _truncate(cores: list[Tensor], delta: float, max_rank: int | None) -> None:
    """Cut right-orthogonal cores to the ranks that `delta` allows, in place, from the first to the last.

    What lies to the right of a cut is orthogonal, so that the singular values of the core are those of the
    whole unfolding.
    """
    for k in range(len(cores) - 1):
        left, values, right = torch.linalg.svd(cores[k].flatten(0, 1), full_matrices=False)
        rank = rank_for(values.square(), delta, max_rank)
        carried = values[:rank, None] * right[:rank]
        cores[k] = left[:, :rank].reshape(*cores[k].shape[:-1], rank)
        cores[k + 1] = torch.tensordot(carried, cores[k + 1], 1)


def matvec(a: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multiply vectors (..., N) by a TT-matrix, to (..., M), in O(d r^2 m max(M, N)) operations each.

    y(i) = sum_j G_1[i_1, j_1] ... G_d[i_d, j_d] x(j), the fully-connected TT-layer without its bias
    (Novikov et al. 2015, section 4, equation 5).

    Raises:
        ShapeError: cores that do not fit together or are no TT-matrix, or vectors of another length.

    Example:
        >>> a = [torch.eye(2).reshape(1, 2, 2, 1), torch.ones(1, 1, 3, 1)]
        >>> to_matrix(a).tolist()
        [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]
        >>> matvec(a, torch.arange(6.0)).tolist()
        [3.0, 12.0]
    """
    _check_matrix(a)
    columns = prod(core.shape[2] for core in a)
    if x.dim() == 0 or x.shape[-1] != columns:
        shape = tuple(x.shape)
        raise ShapeError(f"the TT-matrix takes vectors of length {columns}, not a tensor of shape {shape}")

    # Stored cores have an axis for the kernel window, of size 1 here.
    cores = [core[:, :, :, None] for core in a]
    y = contract(cores, x.reshape(-1, columns))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matvec_tt(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Multiply a TT-vector by a TT-matrix, to a TT-vector; TT-ranks multiply (Oseledets 2011, section 4.3).

    Raises:
        ShapeError: cores that do not fit together, or modes of the vector that are not the matrix's n_k.

    Example:
        >>> a = [torch.eye(2).reshape(1, 2, 2, 1), torch.ones(1, 1, 3, 1)]
        >>> x = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> to_tensor(matvec_tt(a, x)).tolist()
        [[6.0], [6.0]]
    """
    _check_matrix(a)
    _check(b)
    columns = [core.shape[2:3] for core in a]
    modes = [core.shape[1:-1] for core in b]
    if columns != modes:
        raise ShapeError(f"the TT-matrix takes modes {_words(columns)}, the TT-vector has {_words(modes)}")

    cores = []
    for matrix, vector in zip(a, b, strict=True):
        product = torch.einsum("amnb,cnd->acmbd", matrix, vector)
        cores.append(product.flatten(3).flatten(0, 1))
    return cores


def to_tensor(a: Sequence[Tensor]) -> Tensor:
    """Form the full tensor, of shape (*modes of core 1, ..., *modes of core d).

    A(i_1, ..., i_d) = G_1[i_1] ... G_d[i_d], a product of matrices for each entry (Oseledets 2011, section
    1).

    Raises:
        ShapeError: cores that do not fit together.

    Example:
        >>> a = [torch.ones(1, 2, 1), torch.tensor([1.0, 2, 3]).reshape(1, 3, 1)]
        >>> to_tensor(a).tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """
    _check(a)
    full = a[0].new_ones(1, 1)
    for core in a:
        full = (full @ core.flatten(1)).reshape(-1, core.shape[-1])
    modes = [mode for core in a for mode in core.shape[1:-1]]
    return full.reshape(modes)


def to_matrix(a: Sequence[Tensor]) -> Tensor:
    """Form the full (M, N) matrix of a TT-matrix.

    M = prod m_k and N = prod n_k, with row-major multi-indices. The paired modes are those of Novikov et al.
    (2015, section 3).

    Raises:
        ShapeError: cores that do not fit together or are no TT-matrix.

    Example:
        >>> to_matrix([torch.eye(2).reshape(1, 2, 2, 1), torch.ones(1, 1, 1, 1)]).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    _check_matrix(a)
    full = to_tensor(a)
    # The modes come in pairs (m_k, n_k): rows first, then columns.
    rows = range(0, full.dim(), 2)
    columns = range(1, full.dim(), 2)
    size = prod(core.shape[1] for core in a)
    return full.permute([*rows, *columns]).reshape(size, -1)


def _check(a: Sequence[Tensor]) -> None:
    shapes = [tuple(core.shape) for core in a]
    are_cores = all(len(shape) >= 3 and 0 not in shape for shape in shapes)
    if not shapes or not are_cores:
        wanted = "a left rank, one mode or more, and a right rank"
        raise ShapeError(f"TT-cores have {wanted}, not shapes {shapes}")

    left = [shape[0] for shape in shapes]
    right = [shape[-1] for shape in shapes]
    if [1, *right] != [*left, 1]:
        wanted = "share their TT-rank and both ends are 1"
        raise ShapeError(f"neighbouring TT-cores {wanted}, not shapes {shapes}")


def _check_same_modes(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    _check(a)
    _check(b)
    modes_a = [core.shape[1:-1] for core in a]
    modes_b = [core.shape[1:-1] for core in b]
    if modes_a != modes_b:
        raise ShapeError(f"the modes of two TT-tensors differ: {_words(modes_a)} and {_words(modes_b)}")


def _check_matrix(a: Sequence[Tensor]) -> None:
    _check(a)
    if any(core.dim() != 4 for core in a):
        shapes = [tuple(core.shape) for core in a]
        raise ShapeError(f"cores of a TT-matrix have four axes, not shapes {shapes}")


def _words(modes: Sequence[torch.Size]) -> str:
    """Modes for a message: `4,5` for a TT-vector, `4x2,5x3` for a TT-matrix."""
    return ",".join("x".join(map(str, shape)) for shape in modes)


def _ones_like(a: Sequence[Tensor]) -> list[Tensor]:
    return [core.new_ones(1, *core.shape[1:-1], 1) for core in a]


def _three_way(core: Tensor) -> Tensor:
    """View a core as (r_{k-1}, n_k, r_k), its modes joined."""
    return core.flatten(1, -2)


def _mirrored(a: Sequence[Tensor]) -> list[Tensor]:
    return [core.transpose(0, -1).contiguous() for core in reversed(a)]


def _from_the_right(a: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Three-way float64 cores, all but the first right-orthogonal, and e: the tensor is theirs times 2^e."""
    _check(a)
    cores = [_three_way(core) for core in a]
    cores[-1], exponent = _normalized(cores[-1])

    for k in range(len(cores) - 1, 0, -1):
        basis, triangle = torch.linalg.qr(cores[k].flatten(1).T)
        cores[k] = basis.T.reshape(-1, *cores[k].shape[1:])
        factor, shift_factor = _normalized(triangle.T)
        core, shift_core = _normalized(cores[k - 1])
        cores[k - 1], shift = _normalized(_product(core, factor))
        exponent += shift_factor + shift_core + shift

    return cores, exponent


def _product(core: Tensor, factor: Tensor) -> Tensor:
    """core @ factor, zero where it is nothing but the round-off of terms that cancel, as in A - A."""
    product = core @ factor
    terms = core.abs() @ factor.abs()
    is_noise = product.abs().amax() <= CANCELLED * terms.amax()
    return product.masked_fill(is_noise, 0.0)


def _normalized(tensor: Tensor) -> tuple[Tensor, int]:
    """In float64, (tensor 2^-e, e) with its largest entry near 2^EXPONENT; a zero tensor gets e = 0."""
    exact = tensor.double()
    largest = float(exact.abs().amax())
    if largest == 0 or not isfinite(largest):
        return exact, 0
    exponent = frexp(largest)[1] - EXPONENT
    return times_two_to(exact, -exponent), exponent


def times_two_to(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by 2^exponent in two steps, since 2^exponent itself may not be representable."""
    half = exponent // 2
    return tensor * _ldexp(1.0, half) * _ldexp(1.0, exponent - half)


def _ldexp(value: float, exponent: int) -> float:
    try:
        return ldexp(value, exponent)
    except OverflowError:
        return inf if value > 0 else -inf


def _relative_delta(cores: Sequence[Tensor], dtype: torch.dtype, eps: float) -> float:
    """The error left to truncation: eps less what a cast of the cores may add, but at least round-off."""
    unit = torch.finfo(dtype).eps
    cast = unit / 2 * sum(sqrt(core.shape[-1]) for core in cores)
    return max(eps - cast, unit, NOISE)


def rank_for(squared_values: Tensor, delta: float, max_rank: int | None) -> int:
    """Find the least rank >= 1 that leaves out at most delta^2 of squared values, or take the cap."""
    # Summed up from the smallest, tails grow: as many singular values are kept as there are tails too large.
    tails = squared_values.flip(0).cumsum(0)
    too_large = int((tails > delta**2).sum())
    rank = max(1, too_large)
    return rank if max_rank is None else min(rank, max_rank)


def _spread(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Put 2^exponent back in equal shares, so that no single core leaves the range of a narrow type."""
    last, shift = _normalized(cores[-1])
    # The last core, normalised, is 2^EXPONENT larger than the orthogonal ones, whose entries are at most 1.
    share, left_over = divmod(exponent + shift + EXPONENT, len(cores))
    powers = [share] * (len(cores) - 1) + [share + left_over - EXPONENT]
    scaled = zip([*cores[:-1], last], powers, strict=True)
    return [times_two_to(core, power) for core, power in scaled]


def _restored(cores: Sequence[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    """Give three-way cores the modes and the type of `a`."""
    return [
        core.reshape(core.shape[0], *old.shape[1:-1], core.shape[-1]).to(old.dtype)
        for core, old in zip(cores, a, strict=True)
    ]


def _is_normal(core: Tensor) -> bool:
    info = torch.finfo(core.dtype)
    return info.tiny <= float(core.abs().amax()) <= info.max
