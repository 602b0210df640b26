"""TT-SVD (Oseledets 2011, algorithm 1): a tensor or a tensorized weight in, TT-cores and the achieved error out.

float32 and narrower tensors go through the float64 Gram matrix of the short side of each unfolding, with the remainder
U^T C: singular vectors of a long unfolding taken in float32 lose orthogonality. float64 tensors go through QR and SVD.
Cores are cut off at both ends, in the order that is cheapest: each projection is orthogonal, so that the bound
err^2 <= sum_k tail_k(r_k) (theorem 2.2) holds in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import frexp, isfinite, ldexp, log2, prod, sqrt
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt.arithmetic import rank_for, right_orthogonalize, times_two_to
from ttcompress.tt.contract import dense_weight, merge_all
from ttcompress.tt.quantize import as_stored
from ttcompress.tt.shapes import Mode, Tensorization, feasible_ranks
from ttcompress.tt.unfolding import BLOCK, Folded, Side, fold, interleave, split, sweep_order

FLOAT32_NOISE = 0.1
"""Relative errors above it are known to six digits from float32 remainders; smaller ones are measured in float64."""
KRYLOV_SIZE, KRYLOV_SHARE, KRYLOV_STEPS = 512, 8, 4
"""Fewer than a share of this many eigenvectors of a matrix of at least this size come from a Krylov space."""
SMALL = 1 << 22
logger = logging.getLogger(__name__)
T = TypeVar("T")


def smallest_eps(dtype: torch.dtype) -> float:
    """The relative accuracy down to which TT-SVD of a tensor of this type keeps its word."""
    return 1e-12 if dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class TTSVD:
    """TT-cores (r_{k-1}, s_k, r_k), or with the axes of a tensorization, and the relative Frobenius error they achieve.

    `clipped` tells that a requested TT-rank was above what the unfoldings can carry.
    """

    cores: tuple[Tensor, ...]
    relative_error: float
    clipped: bool = False

    @property
    def tt_ranks(self) -> tuple[int, ...]:
        """r_0 ... r_d, both ends 1."""
        return (1, *(core.shape[-1] for core in self.cores))


@torch.no_grad()
def tt_svd(
    tensor: Tensor,
    max_rank: int | Sequence[int] | None = None,
    eps: float | None = None,
    dtype: torch.dtype | None = None,
) -> TTSVD:
    """Decompose a d-way tensor by TT-SVD, with TT-ranks capped, with ||A - B||_F <= eps ||A||_F, or both.

    Args:
        tensor: shape (s_1, ..., s_d), floating point, finite. It is not changed and shares no storage with the result.
        max_rank: one cap for all cuts, or the d - 1 inner TT-ranks, or all d + 1; None does not cap.
        eps: relative accuracy; from 1e-6 for float32, 1e-12 for float64. It bounds the error before a cast to float16
            or bfloat16, and before the cap.
        dtype: storage type of the cores, by default that of `tensor`; int8 ones come as float32 of such values. The
            reported error is the one after the cast.

    Raises:
        ShapeError: an empty or non-finite tensor, an eps or values that the type cannot carry, ranks that do not fit.
    """
    _check_type(tensor)
    return _decomposed(tensor.reshape(1, -1), _plain(tensor), max_rank, eps, dtype)


@torch.no_grad()
def decompose_weight(
    weight: Tensor,
    tensorization: Tensorization,
    max_rank: int | Sequence[int] | None = None,
    eps: float | None = None,
    dtype: torch.dtype | None = None,
) -> TTSVD:
    """TT-SVD of a weight (out, in) or (out, in, kh, kw): cores of shape (r_{k-1}, m_k, n_k, w_k, r_k).

    Arguments and errors as in `tt_svd`. The error is that of the weight itself, padding cut away.
    """
    _check_type(weight)
    result = _decomposed(weight, tensorization, max_rank, eps, dtype)
    shapes = tensorization.core_shapes(result.tt_ranks)
    cores = tuple(core.reshape(shape) for core, shape in zip(result.cores, shapes, strict=True))
    error = result.relative_error
    if prod(tensorization.sizes) != weight.numel():
        exponent = _exponent(_bounds(weight))
        exact = _rescaled(weight.double(), -exponent)
        dense = dense_weight(_scaled_cores(cores, -exponent), tuple(weight.shape))
        error = _ratio(float((exact - dense).norm()) ** 2, float(exact.norm()) ** 2)
    return TTSVD(cores, error, result.clipped)


def _decomposed(
    weight: Tensor,
    tensorization: Tensorization,
    max_rank: int | Sequence[int] | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> TTSVD:
    """TT-SVD with cores (r_{k-1}, s_k, r_k)."""
    work_dtype = _work_dtype(weight)
    caps = tensorization.expand_ranks(prod(tensorization.sizes) if max_rank is None else max_rank)
    clipped_caps = feasible_ranks(tensorization.sizes, caps)
    clipped = not isinstance(max_rank, int | None) and clipped_caps != caps
    exponent = _checked_exponent(weight, eps)
    folded = _scaled_fold(weight, tensorization, exponent)
    cores, error = _accurate_cores(folded, clipped_caps, eps, exponent, capped=max_rank is not None)
    if (dtype or weight.dtype) != work_dtype:
        cores = as_stored(cores, dtype or weight.dtype)
        error = _relative_error(folded, cores, exponent)
    return TTSVD(tuple(cores), error, clipped)


def tensorize(weight: Tensor, tensorization: Tensorization) -> Tensor:
    """A weight (out, in[, kh, kw]) as the d-way tensor (s_1, ..., s_d) of its tensorization, zeros padded."""
    folded = fold(weight, tensorization)
    return interleave(folded.values, folded.modes).reshape(tensorization.sizes)


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _plain(tensor: Tensor) -> Tensorization:
    """The tensorization of a d-way tensor that is stored as a weight (1, s_1 ... s_d)."""
    return Tensorization("matrix", tuple(Mode(1, size, 1) for size in tensor.shape))


def _scaled_fold(weight: Tensor, tensorization: Tensorization, exponent: int) -> Folded:
    """The weight times 2^-exponent, in its own type where nothing needs scaling."""
    return fold(_rescaled(weight.to(_work_dtype(weight)), -exponent) if exponent else weight, tensorization)


@torch.no_grad()
def squared_spectra(tensor: Tensor, tensorization: Tensorization | None = None) -> list[Tensor]:
    """Squared singular values of the d - 1 unfoldings over ||A||_F^2, each descending, float64 on the CPU.

    Their tails bound the error of every choice of TT-ranks: err^2 <= sum_k tail_k(r_k) (Oseledets 2011, theorem 2.2).

    Args:
        tensor: a d-way tensor, or with a tensorization the weight (out, in[, kh, kw]) that it views as one.
    """
    _check_type(tensor)
    weight = tensor if tensorization else tensor.reshape(1, -1)
    folded = _scaled_fold(weight, tensorization or _plain(tensor), _checked_exponent(tensor))
    spectra = []
    for cut in range(1, len(folded.modes)):
        values = _eigh(folded.gram(cut, _short_side(folded, cut)), torch.linalg.eigvalsh)
        values = values.flip(0).clamp_(min=0).cpu()
        spectra.append(values / values.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return spectra


@torch.no_grad()
def frobenius_norm(tensor: Tensor) -> float:
    """||A||_F, accumulated in float64 without a float64 copy of the tensor."""
    exponent = _exponent(_bounds(tensor))
    return ldexp(_norm(_rescaled(tensor, -exponent)), exponent)


def _norm(tensor: Tensor) -> float:
    blocks = torch.split(tensor.reshape(-1), BLOCK)
    return sqrt(sum(float(block.double().square().sum()) for block in blocks))


def _check_type(tensor: Tensor) -> None:
    if tensor.dim() == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ShapeError(f"TT-SVD takes a non-empty floating-point tensor, not {tensor.dtype} {tuple(tensor.shape)}")


def _checked_exponent(tensor: Tensor, eps: float | None = None) -> int:
    """`_exponent` of a tensor that has a TT-SVD."""
    bounds = _bounds(tensor)
    if not all(map(isfinite, bounds)):
        raise ShapeError("TT-SVD takes finite values: the tensor holds NaN or Inf")
    least = smallest_eps(_work_dtype(tensor))
    if eps is not None and not least <= eps < 1:
        raise ShapeError(f"eps must lie in [{least:g}, 1) for {tensor.dtype}, not {eps:g}")
    return _exponent(bounds)


def _bounds(tensor: Tensor) -> tuple[float, float]:
    least, most = torch.aminmax(tensor)
    return float(least), float(most)


def _exponent(bounds: tuple[float, float]) -> int:
    """e with max|A| in [2^(e-1), 2^e) where A 2^-e is needed to keep squares and denormals in range; 0 where not."""
    exponent = frexp(max(-bounds[0], bounds[1]))[1]
    return exponent if abs(exponent) > 60 else 0


def _rescaled(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent, without a copy in the ordinary case that nothing needs scaling."""
    return times_two_to(tensor, exponent) if exponent else tensor


def _accurate_cores(
    folded: Folded, caps: Sequence[int], eps: float | None, exponent: int, capped: bool
) -> tuple[list[Tensor], float]:
    """Sweep, measure, and sweep again with less truncation where round-off used up the margin left for it."""
    work_dtype = _work_dtype(folded.values)
    norm = _norm(folded.values) if eps else 0.0
    share = sqrt(1 - (0.4 * smallest_eps(work_dtype) / eps) ** 2) if eps else 0.0
    while True:
        delta = share * eps * norm / sqrt(max(1, len(folded.modes) - 1)) if eps else None
        cores, missed = _sweep(folded, caps, delta)
        if not _is_feasible(cores):
            cores = right_orthogonalize(cores)
        cores = [core.to(work_dtype) for core in spread_norm(cores, exponent)]
        error = missed if missed > FLOAT32_NOISE else _relative_error(folded, cores, exponent)
        at_cap = capped and any(core.shape[-1] == cap for core, cap in zip(cores[:-1], caps[1:-1], strict=True))
        if eps is None or error <= eps or at_cap or share < 1e-3:
            return cores, error
        share /= 2


def _is_feasible(cores: Sequence[Tensor]) -> bool:
    """A sweep by accuracy may keep a rank that the cores on its other side cannot carry."""
    return all(core.shape[0] <= core.shape[1] * core.shape[2] for core in cores)


class Basis(NamedTuple):
    """Orthonormal columns for a side of an unfolding; ||C - U U^T C||^2 and ||C||^2."""

    vectors: Tensor
    squared_miss: float
    squared_norm: float


def _sweep(folded: Folded, caps: Sequence[int], delta: float | None) -> tuple[list[Tensor], float]:
    """From both ends: an orthonormal basis of each unfolding is the core, the projection goes on.

    With caps alone, a cut that keeps all of an end takes no work: its basis is the identity, and its mode waits for the
    next one. Returns cores in float64, and the relative error before any of them is rounded.
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    first, last = 0, len(folded.modes)
    missed, norm = 0.0, None
    for at, side in sweep_order(tuple(mode.size for mode in folded.modes)):
        cut = at - first
        if delta is None and caps[at] == prod(folded.shape(cut, side)):
            continue
        basis = _basis(folded, cut, side, caps[at], delta)
        missed += basis.squared_miss
        norm = basis.squared_norm if norm is None else norm
        shape, modes = folded.shape(cut, side), folded.modes
        folded = _projected(folded, cut, side, basis.vectors)
        if side == Side.LEFT:
            lefts += split(basis.vectors.reshape(*shape, -1), modes[:cut], cut - 1)
            first = at
        else:
            rights = split(basis.vectors.T.reshape(-1, *shape), modes[cut:], 0) + rights
            last = at
    waiting = sum(caps[at] == prod(folded.shape(at - first, Side.LEFT)) for at in range(first + 1, last))
    return lefts + split(folded.values.double(), folded.modes, waiting) + rights, _ratio(missed, norm or 0.0)


def _projected(folded: Folded, cut: int, side: Side, basis: Tensor) -> Folded:
    """In float64 where that takes no time to speak of."""
    work_dtype = _work_dtype(folded.values)
    is_small = folded.values.numel() <= SMALL
    return folded.project(cut, side, basis if is_small else basis.to(work_dtype), work_dtype)


def _short_side(folded: Folded, cut: int) -> Side:
    return min(Side, key=lambda side: prod(folded.shape(cut, side)))


def _basis(folded: Folded, cut: int, side: Side, cap: int, delta: float | None) -> Basis:
    """Leading singular vectors of a side: at most `cap`, and as few as leave out no more than `delta` in norm."""
    if folded.values.dtype == torch.float64:
        return _basis_by_qr(torch.cat(list(folded.blocks(cut, side, torch.float64)), dim=1), cap, delta)
    short = _short_side(folded, cut)
    gram = folded.gram(cut, short)
    values, vectors = _leading(gram, None if delta is not None else cap)
    kept: Tensor = vectors[:, : _kept(values, cap, delta)]
    norm = float(gram.trace())
    missed = max(0.0, norm - float(values[: kept.shape[1]].sum()))
    if short == side:
        return Basis(kept, missed, norm)
    # Dividing by small singular values would lose orthogonality; QR does not.
    image = folded.project(cut, short, kept, kept.dtype).values
    rows = image.flatten(0, 3) if side == Side.LEFT else image.flatten(1).T
    return Basis(torch.linalg.qr(rows).Q, missed, norm)


def _leading(gram: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and their vectors: all, or the first `count` where that is much less work.

    A few from a block Krylov space (Musco and Musco 2015, algorithm 2), which holds nearly as much of the matrix as the
    exact ones, also where eigenvalues lie close together.
    """
    if count is None or len(gram) < KRYLOV_SIZE or count * KRYLOV_SHARE > len(gram):
        values, vectors = _eigh(gram, torch.linalg.eigh)
        return values.flip(0).clamp_(min=0), vectors.flip(1)
    start = torch.randn(len(gram), count + 8, dtype=gram.dtype, generator=torch.Generator().manual_seed(0))
    blocks = [torch.linalg.qr(gram @ start.to(gram.device)).Q]
    for _ in range(KRYLOV_STEPS - 1):
        blocks.append(torch.linalg.qr(gram @ blocks[-1]).Q)
    space = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    values, vectors = _eigh(space.T @ gram @ space, torch.linalg.eigh)
    return values.flip(0)[:count].clamp_(min=0), space @ vectors.flip(1)[:, :count]


def _eigh(gram: Tensor, solver: Callable[[Tensor], T]) -> T:
    """Eigenvalues, with vectors or not; on the CPU where a GPU's solver gives up."""
    try:
        return solver(gram)
    except RuntimeError as error:
        if gram.device.type == "cpu":
            raise
        logger.warning("eigenvalues of a %d x %d matrix are computed on the CPU: %s", *gram.shape, error)
        return solver(gram.cpu())


def _kept(squared_values: Tensor, cap: int, delta: float | None) -> int:
    return min(cap, len(squared_values)) if delta is None else rank_for(squared_values, delta, cap)


def _basis_by_qr(unfolding: Tensor, cap: int, delta: float | None) -> Basis:
    rows, columns = unfolding.shape
    if rows <= columns:
        vectors, values, _ = torch.linalg.svd(torch.linalg.qr(unfolding.T, mode="r").R.T)
    else:
        outer, inner = torch.linalg.qr(unfolding)
        vectors, values, _ = torch.linalg.svd(inner)
        vectors = outer @ vectors
    squares = values**2
    count = _kept(squares, cap, delta)
    return Basis(vectors[:, :count], float(squares[count:].sum()), float(squares.sum()))


def spread_norm(cores: Sequence[Tensor], exponent: int = 0) -> list[Tensor]:
    """Give every core the same Frobenius norm and put 2^exponent back, so that no narrow type overflows."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0:
        return [torch.zeros_like(core) for core in cores]
    if len(cores) == 1:
        return [_rescaled(cores[0].clone(), exponent)]
    each = 2.0 ** ((exponent + sum(map(log2, norms))) / len(cores))
    return [core * (each / norm) for core, norm in zip(cores, norms, strict=True)]


def _relative_error(folded: Folded, cores: Sequence[Tensor], exponent: int) -> float:
    """||A - B||_F / ||A||_F, measured block by block; `folded` is A 2^-exponent."""
    shaped = [core.reshape(len(core), *mode, -1) for core, mode in zip(cores, folded.modes, strict=True)]
    exact = _scaled_cores(shaped, -exponent)
    cut = min(range(1, len(cores)), key=lambda at: cores[at].shape[0] * _perimeter(folded, at), default=0)
    one = exact[0].new_ones(1, 1, 1, 1, 1)
    left, right = merge_all([one, *exact[:cut]]), merge_all(exact[cut:])
    error = 0.0
    if folded.values.dtype != torch.float64:
        error = _ratio(*folded.squared_difference(cut, left.float(), right.float()))
    if error < FLOAT32_NOISE:
        error = _ratio(*folded.squared_difference(cut, left, right))
    return error


def _perimeter(folded: Folded, cut: int) -> int:
    return sum(prod(folded.shape(cut, side)) for side in Side)


def _scaled_cores(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Cores in float64 of the tensor times 2^exponent."""
    first, *rest = (core.double() for core in cores)
    return [_rescaled(first, exponent), *rest]


def _ratio(squared_miss: float, squared_norm: float) -> float:
    return sqrt(squared_miss / squared_norm) if squared_norm else float(squared_miss > 0)
