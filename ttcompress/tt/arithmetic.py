"""The algebra of TT-tensors (Oseledets 2011, sections 3 and 4; Novikov et al. 2015, sections 3 and 4).

A TT-tensor is a sequence of cores; core k has shape (r_{k-1}, *modes of core k, r_k), r_0 = r_d = 1. One mode a core
makes a TT-vector, two make a TT-matrix (r_{k-1}, m_k, n_k, r_k). Only `to_tensor` and `to_matrix` form the full tensor.
No function changes its inputs or shares storage with them. Scalars and orthogonalisations are computed in float64 and
without autograd, the rest in the type of the cores. Every function raises ShapeError where cores do not fit together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, inf, isfinite, ldexp, prod, sqrt

import torch
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt.contract import sweep

# Where the largest entry of a normalised core lies: products of two stay finite, and tiny entries beside it survive.
EXPONENT = 400
# Multiples of the unit of float64: below them a singular value, or what a contraction leaves, is round-off.
NOISE = 64 * torch.finfo(torch.float64).eps
CANCELLED = 8 * torch.finfo(torch.float64).eps


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """A + B, modes equal; TT-ranks add (Oseledets 2011, section 4.1)."""
    _check_same_modes(a, b)
    cores = []
    for x, y in zip(a, b, strict=True):
        upper = torch.cat([x, x.new_zeros(*x.shape[:-1], y.shape[-1])], dim=-1)
        lower = torch.cat([y.new_zeros(*y.shape[:-1], x.shape[-1]), y], dim=-1)
        cores.append(torch.cat([upper, lower]))
    cores[0] = cores[0].sum(0, keepdim=True)
    cores[-1] = cores[-1].sum(-1, keepdim=True)
    return cores


def scale(a: Sequence[Tensor], c: float) -> list[Tensor]:
    """c A; the factor goes to the first core."""
    _check(a)
    return [a[0] * c, *(core.clone() for core in a[1:])]


def add_constant(a: Sequence[Tensor], c: float) -> list[Tensor]:
    """A with c added to every entry; TT-ranks grow by one."""
    _check(a)
    return add(a, scale(_ones_like(a), c))


def multiply(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """The entrywise product, modes equal; TT-ranks multiply (Oseledets 2011, section 4.2)."""
    _check_same_modes(a, b)
    cores = []
    for x, y in zip(a, b, strict=True):
        product = torch.einsum("anb,cnd->acnbd", _three_way(x), _three_way(y))
        cores.append(product.reshape(x.shape[0] * y.shape[0], *x.shape[1:-1], -1))
    return cores


def total(a: Sequence[Tensor]) -> float:
    """The sum of all entries."""
    _check(a)
    return inner(a, _ones_like(a))


@torch.no_grad()
def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The sum of the entrywise product, modes equal (Oseledets 2011, algorithm 4): O(d n r^3)."""
    _check_same_modes(a, b)
    gram, exponent = a[0].new_ones(1, 1, dtype=torch.float64), 0
    for x, y in zip(a, b, strict=True):
        x, shift_x = _normalized(_three_way(x))
        y, shift_y = _normalized(_three_way(y))
        half, shift_half = _normalized(gram.T @ x.flatten(1))
        gram, shift_gram = _normalized(half.reshape(-1, x.shape[-1]).T @ y.flatten(0, 1))
        exponent += shift_x + shift_y + shift_half + shift_gram
    return _ldexp(float(gram), exponent)


@torch.no_grad()
def norm(a: Sequence[Tensor]) -> float:
    """The Frobenius norm, by orthogonalisation: that of a difference is as accurate as any other."""
    (first, *_), exponent = _right_sweep(a)
    return _ldexp(float(torch.linalg.vector_norm(first)), exponent)


def left_orthogonalize(a: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with Q^T Q = I for every core but the last, as (r_{k-1} n_k) x r_k; never raises a TT-rank."""
    return _mirrored(right_orthogonalize(_mirrored(a)))


@torch.no_grad()
def right_orthogonalize(a: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with Q Q^T = I for every core but the first, as r_{k-1} x (n_k r_k); never raises a TT-rank."""
    (first, *rest), exponent = _right_sweep(a)
    cores = _restored([times_two_to(first, exponent), *rest], a)
    if not cores[0].isfinite().all():
        raise ShapeError(f"the core that carries the norm is not finite, or beyond the range of {a[0].dtype}")
    return cores


@torch.no_grad()
def round_tt(a: Sequence[Tensor], eps: float = 0.0, max_rank: int | None = None) -> list[Tensor]:
    """Lower the TT-ranks so that ||A - B||_F <= eps ||A||_F (Oseledets 2011, algorithm 2), capped at `max_rank`.

    Each of the d - 1 cuts may leave out delta = eps ||A||_F / sqrt(d - 1). An eps below the round-off of the type, as
    the default, removes what is redundant at that round-off. The cap comes before the accuracy; no TT-rank is raised.
    A zero tensor gets TT-ranks 1. A tensor comes back as it was where the range of its type cannot hold new cores.

    Raises:
        ShapeError: also for a negative or infinite eps, a cap below 1, cores that are not finite, and where the range
            of the type cannot hold the cores that the cap asks for.
    """
    if not 0 <= eps < inf or (max_rank is not None and max_rank < 1):
        raise ShapeError(f"rounding takes eps >= 0 and max_rank >= 1, not eps={eps} and max_rank={max_rank}")
    cores, exponent = _right_sweep(a)
    size = float(torch.linalg.vector_norm(cores[0]))
    if not isfinite(size):
        raise ShapeError("rounding takes finite cores: one holds NaN or Inf")
    if size == 0:
        return [core.new_zeros(1, *core.shape[1:-1], 1) for core in a]
    delta = _relative_delta(cores, a[0].dtype, eps) * size / sqrt(max(1, len(a) - 1))
    for k in range(len(cores) - 1):
        left, values, right = torch.linalg.svd(cores[k].flatten(0, 1), full_matrices=False)
        rank = rank_for(values.square(), delta, max_rank)
        cores[k] = left[:, :rank].reshape(*cores[k].shape[:-1], rank)
        cores[k + 1] = torch.tensordot(values[:rank, None] * right[:rank], cores[k + 1], 1)
    rounded = _restored(_spread(cores, exponent), a)
    if all(map(_is_normal, rounded)):
        return rounded
    if max_rank is not None and any(core.shape[-1] > max_rank for core in a):
        raise ShapeError(f"rounding to max_rank={max_rank} leaves the range of {a[0].dtype}: scale the cores first")
    return [core.clone() for core in a]


def matvec(a: Sequence[Tensor], x: Tensor) -> Tensor:
    """TT-matrix times vectors: x (..., N) to (..., M), O(d r^2 m max(M, N)) each (Novikov et al. 2015, section 4)."""
    _check_matrix(a)
    columns = prod(core.shape[2] for core in a)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ShapeError(f"the TT-matrix takes vectors of length {columns}, not a tensor of shape {tuple(x.shape)}")
    y = sweep([core[:, :, :, None] for core in a], x.reshape(-1, columns))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matvec_tt(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """TT-matrix times TT-vector, a TT-vector; TT-ranks multiply (Oseledets 2011, section 4.3)."""
    _check_matrix(a)
    _check(b)
    columns, modes = [core.shape[2:3] for core in a], [core.shape[1:-1] for core in b]
    if columns != modes:
        raise ShapeError(f"the TT-matrix takes modes {_words(columns)}, the TT-vector has {_words(modes)}")
    cores = []
    for matrix, vector in zip(a, b, strict=True):
        product = torch.einsum("amnb,cnd->acmbd", matrix, vector)
        cores.append(product.flatten(3).flatten(0, 1))
    return cores


def to_tensor(a: Sequence[Tensor]) -> Tensor:
    """The full tensor of shape (*modes of core 1, ..., *modes of core d)."""
    _check(a)
    full = a[0].new_ones(1, 1)
    for core in a:
        full = (full @ core.flatten(1)).reshape(-1, core.shape[-1])
    return full.reshape([mode for core in a for mode in core.shape[1:-1]])


def to_matrix(a: Sequence[Tensor]) -> Tensor:
    """The full (M, N) matrix of a TT-matrix, M = prod m_k and N = prod n_k, row-major."""
    _check_matrix(a)
    full = to_tensor(a)
    axes = [*range(0, full.dim(), 2), *range(1, full.dim(), 2)]
    return full.permute(axes).reshape(prod(core.shape[1] for core in a), -1)


def _check(a: Sequence[Tensor]) -> None:
    shapes = [tuple(core.shape) for core in a]
    if not shapes or any(len(shape) < 3 or 0 in shape for shape in shapes):
        raise ShapeError(f"TT-cores have a left rank, one mode or more, and a right rank, not shapes {shapes}")
    left, right = [shape[0] for shape in shapes], [shape[-1] for shape in shapes]
    if [1, *right] != [*left, 1]:
        raise ShapeError(f"neighbouring TT-cores share their TT-rank and both ends are 1, not shapes {shapes}")


def _check_same_modes(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    _check(a)
    _check(b)
    modes_a, modes_b = ([core.shape[1:-1] for core in cores] for cores in (a, b))
    if modes_a != modes_b:
        raise ShapeError(f"the modes of two TT-tensors differ: {_words(modes_a)} and {_words(modes_b)}")


def _check_matrix(a: Sequence[Tensor]) -> None:
    _check(a)
    if any(core.dim() != 4 for core in a):
        raise ShapeError(f"cores of a TT-matrix have four axes, not shapes {[tuple(core.shape) for core in a]}")


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


def _right_sweep(a: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Three-way float64 cores, all but the first right-orthogonal, and e, so that the tensor is theirs times 2^e."""
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
    product, terms = core @ factor, core.abs() @ factor.abs()
    return product.masked_fill(product.abs().amax() <= CANCELLED * terms.amax(), 0.0)


def _normalized(tensor: Tensor) -> tuple[Tensor, int]:
    """In float64, (tensor 2^-e, e) with its largest entry near 2^EXPONENT; a zero tensor gets e = 0."""
    exact = tensor.double()
    largest = float(exact.abs().amax())
    if largest == 0 or not isfinite(largest):
        return exact, 0
    exponent = frexp(largest)[1] - EXPONENT
    return times_two_to(exact, -exponent), exponent


def times_two_to(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent in two steps, since 2^exponent itself may not be representable."""
    half = exponent // 2
    return tensor * _ldexp(1.0, half) * _ldexp(1.0, exponent - half)


def _ldexp(value: float, exponent: int) -> float:
    try:
        return ldexp(value, exponent)
    except OverflowError:
        return inf if value > 0 else -inf


def _relative_delta(cores: Sequence[Tensor], dtype: torch.dtype, eps: float) -> float:
    """The error left to truncation: eps less what the cast of orthogonal cores may add, but at least round-off."""
    unit = torch.finfo(dtype).eps
    cast = unit / 2 * sum(sqrt(core.shape[-1]) for core in cores)
    return max(eps - cast, unit, NOISE)


def rank_for(squared_values: Tensor, delta: float, max_rank: int | None) -> int:
    """The least rank >= 1 whose tail of squared singular values is at most delta^2, but no more than `max_rank`."""
    rank = max(1, int((squared_values.flip(0).cumsum(0) > delta**2).sum()))
    return rank if max_rank is None else min(rank, max_rank)


def _spread(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Put 2^exponent back in equal shares, so that no single core leaves the range of a narrow type."""
    last, shift = _normalized(cores[-1])
    share, left_over = divmod(exponent + shift + EXPONENT, len(cores))
    shares = [share] * (len(cores) - 1) + [share + left_over - EXPONENT]
    return [times_two_to(core, power) for core, power in zip([*cores[:-1], last], shares, strict=True)]


def _restored(cores: Sequence[Tensor], a: Sequence[Tensor]) -> list[Tensor]:
    """Give three-way cores the modes and the type of `a`."""
    return [
        core.reshape(core.shape[0], *old.shape[1:-1], core.shape[-1]).to(old.dtype)
        for core, old in zip(cores, a, strict=True)
    ]


def _is_normal(core: Tensor) -> bool:
    info = torch.finfo(core.dtype)
    return info.tiny <= float(core.abs().amax()) <= info.max
