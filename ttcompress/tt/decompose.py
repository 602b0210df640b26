"""TT-SVD (Oseledets 2011, algorithm 1): a tensor or a tensorized weight in, TT-cores and the error out.

float32 and narrower tensors go through the float64 Gram matrix of the short side of each unfolding, with the
remainder U^T C: singular vectors of a long unfolding taken in float32 lose orthogonality. float64 tensors go
through QR and SVD. Cores are cut off at both ends, in the order that is cheapest: each projection is
orthogonal, so that the bound err^2 <= sum_k tail_k(r_k) (theorem 2.2) holds in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import frexp, hypot, isfinite, ldexp, log2, prod, sqrt
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.tt.arithmetic import left_orthogonalize, rank_for, right_orthogonalize, times_two_to
from ttcompress.tt.contract import dense_weight, merge_all
from ttcompress.tt.estimate import bounded_spectrum
from ttcompress.tt.quantize import as_stored
from ttcompress.tt.shapes import Mode, Tensorization, feasible_ranks
from ttcompress.tt.unfolding import Folded, Side, block_size, cut_order, fold, interleave, split

FLOAT32_NOISE = 0.1
"""Relative errors above it are known to six digits from float32 remainders; smaller ones take float64."""
KRYLOV_SIZE, KRYLOV_SHARE, KRYLOV_STEPS = 512, 8, 4
"""Fewer than a share of this many eigenvectors of a matrix of at least this size come from a Krylov space."""
SMALL = 1 << 22
"""Up to this many entries a tensor is projected in float64."""
logger = logging.getLogger(__name__)
T = TypeVar("T")


def smallest_eps(dtype: torch.dtype) -> float:
    """Return the relative accuracy down to which TT-SVD of a tensor of this type keeps its word."""
    return 1e-12 if dtype == torch.float64 else 1e-6


@dataclass(frozen=True)
class TTSVD:
    """What TT-SVD finds: TT-cores and the relative Frobenius error that they achieve.

    Cores are (r_{k-1}, s_k, r_k), or (r_{k-1}, m_k, n_k, w_k, r_k) where there is a tensorization. `clipped`
    tells that a requested TT-rank was above what the unfoldings can carry (Oseledets 2011, theorem 2.1).

    Example:
        >>> result = tt_svd(torch.ones(4, 5, 6), max_rank=7)
        >>> result.tt_ranks, result.clipped
        ((1, 4, 6, 1), False)
    """

    cores: tuple[Tensor, ...]
    relative_error: float
    clipped: bool = False

    @property
    def tt_ranks(self) -> tuple[int, ...]:
        """The TT-ranks r_0 ... r_d, both ends 1."""
        return (1, *(core.shape[-1] for core in self.cores))


@torch.no_grad()
def tt_svd(
    tensor: Tensor,
    max_rank: int | Sequence[int] | None = None,
    eps: float | None = None,
    dtype: torch.dtype | None = None,
) -> TTSVD:
    """Decompose a d-way tensor by TT-SVD, with TT-ranks capped, with ||A - B||_F <= eps ||A||_F, or both.

    The bound on the error is theorem 2.2, the method algorithm 1 (Oseledets 2011).

    Args:
        tensor: shape (s_1, ..., s_d), floating point, finite. It is not changed and shares no storage with
            the result.
        max_rank: one cap for all cuts, or the d - 1 inner TT-ranks, or all d + 1; None does not cap.
        eps: relative accuracy; from 1e-6 for float32, 1e-12 for float64. It bounds the error before a cast to
            float16 or bfloat16, and before the cap.
        dtype: storage type of the cores, by default that of `tensor`; int8 ones come as float32 of such
            values. The reported error is the one after the cast.

    Raises:
        ShapeError: an empty or non-finite tensor, an eps or values that the type cannot carry, ranks that do
            not fit.

    Example:
        >>> result = tt_svd(torch.ones(4, 5, 6), eps=1e-4)
        >>> result.tt_ranks, result.relative_error < 1e-4
        ((1, 1, 1, 1), True)
        >>> [tuple(core.shape) for core in result.cores]
        [(1, 4, 1), (1, 5, 1), (1, 6, 1)]
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
    """Decompose a weight (out, in) or (out, in, kh, kw) by TT-SVD of the tensor that it is viewed as.

    The view is that of Novikov et al. (2015, section 4) and Garipov et al. (2016), the method that of
    `tt_svd`, with its arguments. Cores have the shape (r_{k-1}, m_k, n_k, w_k, r_k). The error is that of the
    weight itself, padding cut away. Where the tensorization has groups, weight and cores have an axis for them in
    front; each is decomposed by itself, and the TT-ranks are the largest that any of them needs.

    Raises:
        ShapeError: as in `tt_svd`.

    Example:
        >>> from ttcompress.tt.shapes import tensorize_shape
        >>> result = decompose_weight(torch.ones(8, 4, 3, 3), tensorize_shape("chain", (8, 4, 3, 3)), 1)
        >>> [tuple(core.shape) for core in result.cores]
        [(1, 1, 4, 1, 1), (1, 1, 1, 9, 1), (1, 8, 1, 1, 1)]
        >>> result.relative_error < 1e-5
        True
    """
    _check_type(weight)
    if tensorization.groups > 1:
        return _decomposed_groups(weight, tensorization, max_rank, eps, dtype)
    result = _decomposed(weight, tensorization, max_rank, eps, dtype)
    shapes = tensorization.core_shapes(result.tt_ranks)
    shaped = zip(result.cores, shapes, strict=True)
    cores = tuple(core.reshape(shape) for core, shape in shaped)
    is_padded = prod(tensorization.sizes) != weight.numel()
    error = _weight_error(weight, cores) if is_padded else result.relative_error
    return TTSVD(cores, error, result.clipped)


def _decomposed_groups(
    weight: Tensor,
    tensorization: Tensorization,
    max_rank: int | Sequence[int] | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> TTSVD:
    one = replace(tensorization, groups=1)
    found = [decompose_weight(block, one, max_rank, eps, dtype) for block in weight]
    tt_ranks = [max(ranks) for ranks in zip(*(each.tt_ranks for each in found), strict=True)]

    cores = []
    for k, pair in enumerate(pairwise(tt_ranks)):
        # Of groups that need less, the rest is zeros.
        cores.append(torch.stack([_with_ranks(each.cores[k], *pair) for each in found]))

    norms = [frobenius_norm(block) for block in weight]
    missed = hypot(*(each.relative_error * norm for each, norm in zip(found, norms, strict=True)))
    whole = hypot(*norms)
    return TTSVD(tuple(cores), missed / whole if whole else 0.0, found[0].clipped)


def _with_ranks(core: Tensor, left: int, right: int) -> Tensor:
    missing = left - core.shape[0], right - core.shape[-1]
    return functional.pad(core, (0, missing[1], *[0, 0] * 3, 0, missing[0]))


def _weight_error(weight: Tensor, cores: Sequence[Tensor]) -> float:
    """Measure ||W - B||_F / ||W||_F of a weight, without what the cores hold in place of its padding."""
    exponent = _exponent(_bounds(weight))
    exact = _rescaled(weight.double(), -exponent)
    dense = dense_weight(_scaled_cores(cores, -exponent), tuple(weight.shape))
    missed = float((exact - dense).norm())
    norm = float(exact.norm())
    return _ratio(missed**2, norm**2)


def _decomposed(
    weight: Tensor,
    tensorization: Tensorization,
    max_rank: int | Sequence[int] | None,
    eps: float | None,
    dtype: torch.dtype | None,
) -> TTSVD:
    """TT-SVD with cores (r_{k-1}, s_k, r_k)."""
    is_capped = max_rank is not None
    caps = tensorization.expand_ranks(max_rank if max_rank is not None else prod(tensorization.sizes))
    feasible = feasible_ranks(tensorization.sizes, caps)
    # One number for all cuts is a limit, not a wish: that it is more than some cuts can carry is no news.
    clipped = not isinstance(max_rank, int | None) and feasible != caps

    exponent = _checked_exponent(weight, eps)
    folded = _scaled_fold(weight, tensorization, exponent)
    cores, error = _accurate_cores(folded, feasible, eps, exponent, is_capped)

    stored_dtype = dtype or weight.dtype
    if stored_dtype != _work_dtype(weight):
        cores = as_stored(cores, stored_dtype)
        error = _relative_error(folded, cores, exponent)
    return TTSVD(tuple(cores), error, clipped)


def tensorize(weight: Tensor, tensorization: Tensorization) -> Tensor:
    """Bring a weight (out, in[, kh, kw]) into the d-way tensor (s_1, ..., s_d), zeros padded."""
    folded = fold(weight, tensorization)
    entries = interleave(folded.values, folded.modes)
    return entries.reshape(tensorization.sizes)


def _work_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _plain(tensor: Tensor) -> Tensorization:
    """The tensorization of a d-way tensor that is stored as a weight (1, s_1 ... s_d)."""
    modes = tuple(Mode(1, size, 1) for size in tensor.shape)
    return Tensorization("matrix", modes)


def _scaled_fold(weight: Tensor, tensorization: Tensorization, exponent: int) -> Folded:
    """The weight times 2^-exponent, in its own type where nothing needs scaling."""
    if not exponent:
        return fold(weight, tensorization)
    scaled = _rescaled(weight.to(_work_dtype(weight)), -exponent)
    return fold(scaled, tensorization)


@torch.no_grad()
def squared_spectra(
    tensor: Tensor, tensorization: Tensorization | None = None, bounded_above: int | None = None
) -> list[Tensor]:
    """Return the squared singular values of the d - 1 unfoldings over ||A||_F^2.

    Each is descending, in float64 on the CPU. Their tails bound the error of every choice of TT-ranks: err^2
    <= sum_k tail_k(r_k) (Oseledets 2011, theorem 2.2).

    Args:
        tensor: a d-way tensor, or with a tensorization the weight (out, in[, kh, kw]) that it views as one; with
            groups in front where it has some, whose errors add up.
        bounded_above: of unfoldings with a longer short side only bounds are taken (tt/estimate.py): their
            leading sums are, but for the luck of random vectors, not below the true ones.

    Raises:
        ShapeError: an empty or non-finite tensor.
    """
    _check_type(tensor)
    if tensorization and tensorization.groups > 1:
        one = replace(tensorization, groups=1)
        return pooled_spectra(
            [squared_spectra(block, one, bounded_above) for block in tensor],
            [frobenius_norm(b) for b in tensor],
        )
    weight = tensor if tensorization else tensor.reshape(1, -1)
    view = tensorization or _plain(tensor)
    folded = _scaled_fold(weight, view, _checked_exponent(tensor))

    tiny = torch.finfo(torch.float64).tiny
    spectra = []
    for cut in range(1, len(folded.modes)):
        short = _short_side(folded, cut)
        size = prod(folded.shape(cut, short))
        if bounded_above is not None and size > bounded_above:
            spectra.append(bounded_spectrum(folded, cut, short, size))
            continue

        # Without a name, a Gram matrix is gone before the next one is made.
        values = solved_for_eigenvalues(folded.gram(cut, short), torch.linalg.eigvalsh)
        values = values.flip(0).clamp_(min=0).cpu()
        whole = values.sum().clamp(min=tiny)
        spectra.append(values / whole)
    return spectra


def pooled_spectra(spectra: Sequence[Sequence[Tensor]], norms: Sequence[float]) -> list[Tensor]:
    """Return the spectra of several tensors that are cut at the same TT-ranks, given those of each, and its norm.

    At each rank the squares of what is left out add up, and so do the squared singular values there.
    """
    whole = sum(norm**2 for norm in norms) or 1.0
    shares = [norm**2 / whole for norm in norms]
    cuts = zip(*spectra, strict=True)
    return [sum(share * each for share, each in zip(shares, cut, strict=True)) for cut in cuts]


@torch.no_grad()
def frobenius_norm(tensor: Tensor) -> float:
    """Return ||A||_F, accumulated in float64 without a float64 copy of the tensor."""
    exponent = _exponent(_bounds(tensor))
    scaled = _rescaled(tensor, -exponent)
    return ldexp(_norm(scaled), exponent)


def _norm(tensor: Tensor) -> float:
    blocks = torch.split(tensor.reshape(-1), block_size(tensor.device))
    squares = [block.double().square().sum() for block in blocks]
    # Read at once: a GPU would have to be waited for at each of them.
    return sqrt(sum(torch.stack(squares).tolist()))


def _check_type(tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"TT-SVD takes a torch tensor, not {type(tensor).__name__}")
    if tensor.dim() == 0 or tensor.numel() == 0 or not tensor.is_floating_point():
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ShapeError(f"TT-SVD takes a non-empty floating-point tensor, not {given}")


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
    """Return e with max|A| in [2^(e-1), 2^e) where squares of A could leave the range, else 0."""
    least, most = bounds
    _, exponent = frexp(max(-least, most))
    return exponent if abs(exponent) > 60 else 0


def _rescaled(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply by 2^exponent, without a copy in the ordinary case that nothing needs scaling."""
    return times_two_to(tensor, exponent) if exponent else tensor


def _accurate_cores(
    folded: Folded, caps: Sequence[int], eps: float | None, exponent: int, capped: bool
) -> tuple[list[Tensor], float]:
    """Truncate, measure, and truncate again with less truncation where round-off used up the margin left for it."""
    work_dtype = _work_dtype(folded.values)
    cuts = max(1, len(folded.modes) - 1)
    norm = _norm(folded.values) if eps else 0.0
    # Truncation and round-off are independent: their squares add up to eps^2.
    round_off = 0.4 * smallest_eps(work_dtype)
    share = sqrt(1 - (round_off / eps) ** 2) if eps else 0.0

    while True:
        delta = share * eps * norm / sqrt(cuts) if eps else None
        cores, missed = _truncate_cuts(folded, caps, delta)
        cores = _feasible(cores)
        cores = [core.to(work_dtype) for core in spread_norm(cores, exponent)]
        # Below the noise, what truncation left out is not all there is to the error.
        error = missed if missed > FLOAT32_NOISE else _relative_error(folded, cores, exponent)

        # More accuracy cannot be had where a cap binds.
        bound = zip(cores[:-1], caps[1:-1], strict=True)
        at_cap = capped and any(core.shape[-1] == cap for core, cap in bound)
        if eps is None or error <= eps or at_cap or share < 1e-3:
            return cores, error
        share /= 2


def _feasible(cores: list[Tensor]) -> list[Tensor]:
    """The same tensor at TT-ranks that all cores can carry.

    Truncation by accuracy may keep a rank beyond what the cores on either side of it have room for.
    """
    while True:
        if any(core.shape[0] > core.shape[1] * core.shape[2] for core in cores):
            cores = right_orthogonalize(cores)
        elif any(core.shape[2] > core.shape[0] * core.shape[1] for core in cores):
            cores = left_orthogonalize(cores)
        else:
            return cores


class Basis(NamedTuple):
    """Orthonormal columns for a side of an unfolding; ||C - U U^T C||^2 and ||C||^2."""

    vectors: Tensor
    squared_miss: float
    squared_norm: float


def _truncate_cuts(folded: Folded, caps: Sequence[int], delta: float | None) -> tuple[list[Tensor], float]:
    """From both ends: an orthonormal basis of each unfolding is the core, the projection goes on.

    With caps alone, a cut that keeps all of an end takes no work: its basis is the identity, and its mode
    waits for the next one. Returns cores in float64, and the relative error before any of them is rounded.
    """
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    first, last = 0, len(folded.modes)
    missed, norm = 0.0, None
    sizes = tuple(mode.size for mode in folded.modes)

    for at, side in cut_order(sizes):
        cut = at - first
        keeps_all = caps[at] == prod(folded.shape(cut, side))
        if delta is None and keeps_all:
            continue

        basis = _basis(folded, cut, side, caps[at], delta)
        missed += basis.squared_miss
        # The first basis sees the whole tensor, later ones what is left of it.
        norm = basis.squared_norm if norm is None else norm
        shape, modes = folded.shape(cut, side), folded.modes
        folded = _projected(folded, cut, side, basis.vectors)

        if side == Side.LEFT:
            lefts += split(basis.vectors.reshape(*shape, -1), modes[:cut], cut - 1)
            first = at
        else:
            rights = split(basis.vectors.T.reshape(-1, *shape), modes[cut:], 0) + rights
            last = at

    # Modes that wait on the left of what remains are those whose cut keeps all of them.
    inner_cuts = range(first + 1, last)
    waiting = sum(caps[at] == prod(folded.shape(at - first, Side.LEFT)) for at in inner_cuts)
    middle = split(folded.values.double(), folded.modes, waiting)
    return lefts + middle + rights, _ratio(missed, norm or 0.0)


def _projected(folded: Folded, cut: int, side: Side, basis: Tensor) -> Folded:
    """Contract a side with its basis, in float64 where that takes no time to speak of."""
    work_dtype = _work_dtype(folded.values)
    is_small = folded.values.numel() <= SMALL
    factor = basis if is_small else basis.to(work_dtype)
    return folded.project(cut, side, factor, work_dtype)


def _short_side(folded: Folded, cut: int) -> Side:
    return min(Side, key=lambda side: prod(folded.shape(cut, side)))


def _basis(folded: Folded, cut: int, side: Side, cap: int, delta: float | None) -> Basis:
    """Find leading singular vectors of a side: at most `cap`, as few as leave out no more than `delta`."""
    if folded.values.dtype == torch.float64:
        unfolding = torch.cat(list(folded.blocks(cut, side, torch.float64)), dim=1)
        return _basis_by_qr(unfolding, cap, delta)

    short = _short_side(folded, cut)
    gram = folded.gram(cut, short)
    # An accuracy is met by looking at all singular values.
    values, vectors = _leading(gram, None if delta is not None else cap)
    count = _rank_within(values, cap, delta)
    kept: Tensor = vectors[:, :count]
    norm = float(gram.trace())
    missed = max(0.0, norm - float(values[:count].sum()))
    if short == side:
        return Basis(kept, missed, norm)

    # Dividing by small singular values would lose orthogonality; QR does not.
    image = folded.project(cut, short, kept, kept.dtype).values
    rows = image.flatten(0, 3) if side == Side.LEFT else image.flatten(1).T
    return Basis(torch.linalg.qr(rows).Q, missed, norm)


def _leading(gram: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """Find eigenvalues, descending, and their vectors: all, or the first `count` where that saves much."""
    size = len(gram)
    if count is None or size < KRYLOV_SIZE or count * KRYLOV_SHARE > size:
        values, vectors = solved_for_eigenvalues(gram, torch.linalg.eigh)
        return values.flip(0).clamp_(min=0), vectors.flip(1)

    space = _krylov_space(gram, count + 8)
    values, vectors = solved_for_eigenvalues(space.T @ gram @ space, torch.linalg.eigh)
    leading = vectors.flip(1)[:, :count]
    return values.flip(0)[:count].clamp_(min=0), space @ leading


def _krylov_space(gram: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis of a block Krylov space (Musco and Musco 2015, algorithm 2).

    It holds nearly as much of the matrix as exact eigenvectors do, also where eigenvalues lie close together.
    """
    # Drawn on the CPU, so that it is the same on every device.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), width, dtype=gram.dtype, generator=generator)

    blocks = [torch.linalg.qr(gram @ start.to(gram.device)).Q]
    for _ in range(KRYLOV_STEPS - 1):
        image = gram @ blocks[-1]
        blocks.append(torch.linalg.qr(image).Q)
    space: Tensor = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    return space


def solved_for_eigenvalues(gram: Tensor, solver: Callable[[Tensor], T]) -> T:
    """Solve for eigenvalues, with vectors or not; on the CPU where a GPU's solver gives up."""
    try:
        return solver(gram)
    except RuntimeError as error:
        if gram.device.type == "cpu":
            raise
        logger.warning("eigenvalues of a %d x %d matrix are computed on the CPU: %s", *gram.shape, error)
        found: Any = solver(gram.cpu())
        if isinstance(found, Tensor):
            return found.to(gram.device)  # type: ignore[return-value]
        return type(found)([each.to(gram.device) for each in found])  # type: ignore[no-any-return]


def _rank_within(squared_values: Tensor, cap: int, delta: float | None) -> int:
    if delta is None:
        return min(cap, len(squared_values))
    return rank_for(squared_values, delta, cap)


def _basis_by_qr(unfolding: Tensor, cap: int, delta: float | None) -> Basis:
    rows, columns = unfolding.shape
    if rows <= columns:
        vectors, values, _ = torch.linalg.svd(torch.linalg.qr(unfolding.T, mode="r").R.T)
    else:
        outer, inner = torch.linalg.qr(unfolding)
        vectors, values, _ = torch.linalg.svd(inner)
        vectors = outer @ vectors

    squares = values**2
    count = _rank_within(squares, cap, delta)
    missed = float(squares[count:].sum())
    return Basis(vectors[:, :count], missed, float(squares.sum()))


def spread_norm(cores: Sequence[Tensor], exponent: int = 0) -> list[Tensor]:
    """Give every core the same Frobenius norm and put 2^exponent back, so that no narrow type overflows."""
    norms = [float(core.norm()) for core in cores]
    if min(norms) == 0:
        return [torch.zeros_like(core) for core in cores]
    if len(cores) == 1:
        return [_rescaled(cores[0].clone(), exponent)]

    # The product of the norms may leave the range of float64, their logarithms do not.
    product = exponent + sum(map(log2, norms))
    each = 2.0 ** (product / len(cores))
    return [core * (each / norm) for core, norm in zip(cores, norms, strict=True)]


def _relative_error(folded: Folded, cores: Sequence[Tensor], exponent: int) -> float:
    """Measure ||A - B||_F / ||A||_F block by block; `folded` is A 2^-exponent."""
    pairs = zip(cores, folded.modes, strict=True)
    shaped = [core.reshape(len(core), *mode, -1) for core, mode in pairs]
    exact = _scaled_cores(shaped, -exponent)

    # B is a product of two matrices on a cut: the one where these are smallest together.
    def size(at: int) -> int:
        return cores[at].shape[0] * _perimeter(folded, at)

    cut = min(range(1, len(cores)), key=size, default=0)
    one = exact[0].new_ones(1, 1, 1, 1, 1)
    left = merge_all([one, *exact[:cut]])
    right = merge_all(exact[cut:])

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
