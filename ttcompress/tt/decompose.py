"""TT-SVD (Oseledets 2011, algorithm 1): a tensor or a tensorized weight in, TT-cores and the achieved error out.

float32 and narrower tensors go through the float64 Gram matrix of the short side of each unfolding, with the remainder
U^T C: singular vectors of a long unfolding taken in float32 lose orthogonality. float64 tensors go through QR and SVD.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import frexp, ldexp, log2, prod, sqrt

import torch
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt.arithmetic import rank_for, right_orthogonalize, times_two_to
from ttcompress.tt.contract import chain_product, dense_weight
from ttcompress.tt.shapes import Mode, Tensorization, feasible_ranks

BLOCK = 1 << 22


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
        dtype: storage type of the cores, by default that of `tensor`. The reported error is the one after the cast.

    Raises:
        ShapeError: an empty or non-finite tensor, an eps or values that the type cannot carry, ranks that do not fit.
    """
    work_dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    _check_input(tensor, eps, work_dtype)
    caps = _caps(tensor.shape, max_rank)
    clipped_caps = feasible_ranks(tensor.shape, caps)
    clipped = not isinstance(max_rank, int | None) and clipped_caps != caps
    exponent = _exponent(tensor)
    scaled = _rescaled(tensor.to(work_dtype), -exponent)
    cores, error = _accurate_cores(scaled, clipped_caps, eps, exponent, capped=max_rank is not None)
    if (dtype or tensor.dtype) != work_dtype:
        cores = [core.to(dtype or tensor.dtype) for core in cores]
        if not all(bool(core.isfinite().all()) for core in cores):
            raise ShapeError(f"TT-cores of these values leave the range of {cores[0].dtype}: choose a wider dtype")
        error = _relative_error(scaled, cores, exponent)
    return TTSVD(tuple(cores), error, clipped)


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
    result = tt_svd(tensorize(weight, tensorization), max_rank, eps, dtype)
    shapes = tensorization.core_shapes(result.tt_ranks)
    cores = tuple(core.reshape(shape) for core, shape in zip(result.cores, shapes, strict=True))
    error = result.relative_error
    if prod(tensorization.sizes) != weight.numel():
        exponent = _exponent(weight)
        exact = _rescaled(weight.double(), -exponent)
        dense = dense_weight(_scaled_cores(cores, -exponent), tuple(weight.shape))
        error = _ratio(float((exact - dense).norm()), float(exact.norm()))
    return TTSVD(cores, error, result.clipped)


def tensorize(weight: Tensor, tensorization: Tensorization) -> Tensor:
    """View a weight (out, in[, kh, kw]) as the d-way tensor (s_1, ..., s_d) of its tensorization, zeros padded."""
    outs, ins, windows = tensorization.out_modes, tensorization.in_modes, tensorization.window_modes
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    pad_out, pad_in = prod(outs) - flat.shape[0], prod(ins) - flat.shape[1]
    if pad_out or pad_in:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, pad_in, 0, pad_out))
    count = len(outs)
    order = [axis for k in range(count) for axis in (k, count + k, 2 * count + k)]
    return flat.reshape(*outs, *ins, *windows).permute(order).reshape(tensorization.sizes)


@torch.no_grad()
def squared_spectra(tensor: Tensor) -> list[Tensor]:
    """Squared singular values of the d - 1 unfoldings over ||A||_F^2, each descending, float64 on the CPU.

    Their tails bound the error of every choice of TT-ranks: err^2 <= sum_k tail_k(r_k) (Oseledets 2011, theorem 2.2).
    """
    work_dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    _check_input(tensor, None, work_dtype)
    scaled = _rescaled(tensor.to(work_dtype), -_exponent(tensor))
    spectra = []
    for k in range(1, tensor.dim()):
        gram = _gram(scaled.reshape(prod(tensor.shape[:k]), -1))
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0).cpu()
        spectra.append(values / values.sum().clamp(min=torch.finfo(torch.float64).tiny))
    return spectra


@torch.no_grad()
def frobenius_norm(tensor: Tensor) -> float:
    """||A||_F, accumulated in float64 without a float64 copy of the tensor."""
    exponent = _exponent(tensor)
    return ldexp(_norm(_rescaled(tensor, -exponent)), exponent)


def _norm(tensor: Tensor) -> float:
    return sqrt(sum(float(block.double().square().sum()) for block in _row_blocks(tensor.reshape(-1, 1))))


def _check_input(tensor: Tensor, eps: float | None, work_dtype: torch.dtype) -> None:
    if tensor.dim() == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise ShapeError(f"TT-SVD takes a non-empty floating-point tensor, not {tensor.dtype} {tuple(tensor.shape)}")
    if not all(bool(bound.isfinite()) for bound in torch.aminmax(tensor)):
        raise ShapeError("TT-SVD takes finite values: the tensor holds NaN or Inf")
    if eps is not None and not smallest_eps(work_dtype) <= eps < 1:
        raise ShapeError(f"eps must lie in [{smallest_eps(work_dtype):g}, 1) for {tensor.dtype}, not {eps:g}")


def _caps(shape: Sequence[int], max_rank: int | Sequence[int] | None) -> tuple[int, ...]:
    whole = Tensorization("matrix", tuple(Mode(1, size, 1) for size in shape))
    return whole.expand_ranks(prod(shape) if max_rank is None else max_rank)


def _exponent(tensor: Tensor) -> int:
    """e with max|A| in [2^(e-1), 2^e) where A 2^-e is needed to keep squares and denormals in range; 0 where not."""
    least, most = (float(bound) for bound in torch.aminmax(tensor))
    exponent = frexp(max(-least, most))[1]
    return exponent if abs(exponent) > 60 else 0


def _rescaled(tensor: Tensor, exponent: int) -> Tensor:
    """tensor * 2^exponent, without a copy in the ordinary case that nothing needs scaling."""
    return times_two_to(tensor, exponent) if exponent else tensor


def _accurate_cores(
    scaled: Tensor, caps: Sequence[int], eps: float | None, exponent: int, capped: bool
) -> tuple[list[Tensor], float]:
    """Sweep, measure, and sweep again with less truncation where round-off used up the margin left for it."""
    norm = _norm(scaled)
    share = sqrt(1 - (0.4 * smallest_eps(scaled.dtype) / eps) ** 2) if eps else 0.0
    while True:
        delta = share * eps * norm / sqrt(max(1, scaled.dim() - 1)) if eps else None
        cores = _sweep(scaled, caps, delta)
        if not _is_feasible(cores):
            cores = right_orthogonalize(cores)
        cores = [core.to(scaled.dtype) for core in spread_norm(cores, exponent)]
        error = _relative_error(scaled, cores, exponent)
        at_cap = capped and any(core.shape[-1] == cap for core, cap in zip(cores[:-1], caps[1:-1], strict=True))
        if eps is None or error <= eps or at_cap or share < 1e-3:
            return cores, error
        share /= 2


def _is_feasible(cores: Sequence[Tensor]) -> bool:
    """A left-to-right sweep by accuracy may keep a rank that the cores to its right cannot carry."""
    return all(core.shape[0] <= core.shape[1] * core.shape[2] for core in cores)


def _sweep(scaled: Tensor, caps: Sequence[int], delta: float | None) -> list[Tensor]:
    """Left to right: an orthonormal basis of each unfolding is the core, the projection goes on. Cores in float64."""
    cores: list[Tensor] = []
    rank, rest = 1, scaled
    for k, size in enumerate(scaled.shape[:-1]):
        unfolding = rest.reshape(rank * size, -1)
        basis = _basis(unfolding, caps[k + 1], delta)
        cores.append(basis.reshape(rank, size, -1))
        rest = torch.cat([(basis.T @ block.double()).to(scaled.dtype) for block in _column_blocks(unfolding)], dim=1)
        rank = basis.shape[1]
    return [*cores, rest.reshape(rank, scaled.shape[-1], 1).double()]


def _basis(unfolding: Tensor, cap: int, delta: float | None) -> Tensor:
    """Leading left singular vectors: at most `cap`, and as few as leave out no more than `delta` in norm."""
    if unfolding.dtype == torch.float64:
        return _basis_by_qr(unfolding, cap, delta)
    values, vectors = torch.linalg.eigh(_gram(unfolding))
    values, vectors = values.flip(0).clamp_(min=0), vectors.flip(1)
    kept: Tensor = vectors[:, : _kept(values, cap, delta)]
    if unfolding.shape[0] <= unfolding.shape[1]:
        return kept
    # Dividing by small singular values would lose orthogonality; QR does not.
    image = torch.cat([block.double() @ kept for block in _row_blocks(unfolding)])
    orthonormal: Tensor = torch.linalg.qr(image).Q
    return orthonormal


def _kept(squared_values: Tensor, cap: int, delta: float | None) -> int:
    return min(cap, len(squared_values)) if delta is None else rank_for(squared_values, delta, cap)


def _basis_by_qr(unfolding: Tensor, cap: int, delta: float | None) -> Tensor:
    rows, columns = unfolding.shape
    if rows <= columns:
        vectors, values, _ = torch.linalg.svd(torch.linalg.qr(unfolding.T, mode="r").R.T)
    else:
        outer, inner = torch.linalg.qr(unfolding)
        vectors, values, _ = torch.linalg.svd(inner)
        vectors = outer @ vectors
    kept: Tensor = vectors[:, : _kept(values**2, cap, delta)]
    return kept


def _gram(matrix: Tensor) -> Tensor:
    """Gram matrix of the short side, accumulated in float64 over blocks of the long one."""
    rows, columns = matrix.shape
    gram = torch.zeros(min(rows, columns), min(rows, columns), dtype=torch.float64, device=matrix.device)
    if rows <= columns:
        for block in _column_blocks(matrix):
            wide = block.double()
            gram.addmm_(wide, wide.T)
    else:
        for block in _row_blocks(matrix):
            tall = block.double()
            gram.addmm_(tall.T, tall)
    return gram


def _column_blocks(matrix: Tensor) -> Iterator[Tensor]:
    yield from torch.split(matrix, max(1, BLOCK // matrix.shape[0]), dim=1)


def _row_blocks(matrix: Tensor, columns: int = 0) -> Iterator[Tensor]:
    yield from torch.split(matrix, max(1, BLOCK // (columns or matrix.shape[1])), dim=0)


def spread_norm(cores: Sequence[Tensor], exponent: int = 0) -> list[Tensor]:
    """Give every core the same Frobenius norm and put 2^exponent back, so that no narrow type overflows."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0:
        return [torch.zeros_like(core) for core in cores]
    if len(cores) == 1:
        return [_rescaled(cores[0].clone(), exponent)]
    each = 2.0 ** ((exponent + sum(map(log2, norms))) / len(cores))
    return [core * (each / norm) for core, norm in zip(cores, norms, strict=True)]


def _relative_error(scaled: Tensor, cores: Sequence[Tensor], exponent: int) -> float:
    """||A - B||_F / ||A||_F, measured block by block in float64; `scaled` is A 2^-exponent."""
    exact = _scaled_cores(cores, -exponent)
    shape = scaled.shape
    cost = [core.shape[0] * (prod(shape[:k]) + prod(shape[k:])) for k, core in enumerate(cores)]
    cut = cost.index(min(cost[1:], default=cost[0]))
    one = exact[0].new_ones(1, 1, 1)
    left, right = chain_product([one, *exact[:cut]])[0], chain_product(exact[cut:])[:, :, 0]
    unfolding = scaled.reshape(left.shape[0], -1)
    missed = squared = 0.0
    for block, part in zip(_row_blocks(unfolding), _row_blocks(left, unfolding.shape[1]), strict=True):
        wide = block.double()
        squared += float(wide.square().sum())
        missed += float((wide - part @ right).square().sum())
    return _ratio(sqrt(missed), sqrt(squared))


def _scaled_cores(cores: Sequence[Tensor], exponent: int) -> list[Tensor]:
    """Cores in float64 of the tensor times 2^exponent."""
    first, *rest = (core.double() for core in cores)
    return [_rescaled(first, exponent), *rest]


def _ratio(missed: float, norm: float) -> float:
    return missed / norm if norm else float(missed > 0)
