"""TT-SVD against NumPy float64: the accuracy it promises, the error it reports, the ranks it keeps to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf, nan, prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import weight_in_numpy
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt import unfolding
from ttcompress.tt.decompose import TTSVD, _feasible, decompose_weight, squared_spectra, tensorize, tt_svd
from ttcompress.tt.shapes import Tensorization, feasible_ranks, tensorize_shape

Full = NDArray[np.float64]

SMALLEST = {torch.float32: 1e-6, torch.float64: 1e-12}
SCALES = {torch.float32: [1.0, 1e30, 1e-30, 1e-42], torch.float64: [1.0, 1e300, 1e-300, 1e-318]}
ROUND_OFF = {torch.float32: 1e-6, torch.float64: 5e-13}
KINDS = ["normal", "zeros", "low rank", "decaying", "one entry", "constant", "wide range"]

WORK_TYPES = st.sampled_from([torch.float32, torch.float64])


def exponent_of(tensor: Tensor) -> int:
    return int(np.frexp(np.abs(tensor.double().numpy()).max())[1])


def full(cores: Sequence[Tensor], exponent: int = 0) -> Full:
    """The oracle: the tensor times 2^exponent, every entry as the product of core slices in float64."""
    arrays = [core.double().numpy() for core in cores]
    out = np.ldexp(arrays[0], exponent)
    for array in arrays[1:]:
        out = np.tensordot(out, array, axes=(-1, 0))
    return np.asarray(out[0, ..., 0])


def true_error(tensor: Tensor, cores: Sequence[Tensor]) -> float:
    """||A - B|| / ||A||, both scaled by the same power of two so that nothing leaves the range of float64."""
    exponent = exponent_of(tensor)
    exact = np.ldexp(tensor.double().numpy(), -exponent)
    norm = np.linalg.norm(exact)
    missed = np.linalg.norm(exact - full(cores, -exponent).reshape(exact.shape))
    return float(missed / norm) if norm else float(missed)


def sample(kind: str, shape: Sequence[int], seed: int) -> Full:
    rng = np.random.default_rng(seed)
    if kind == "zeros":
        return np.zeros(shape)
    if kind == "one entry":
        out = np.zeros(shape)
        out.reshape(-1)[rng.integers(out.size)] = 1.0
        return out
    if kind == "constant":
        return np.full(shape, -0.7)
    if kind == "wide range":
        return np.asarray(rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 0, shape))
    if kind == "normal":
        return rng.standard_normal(shape)
    rank = 1 if kind == "low rank" else 3
    out = np.zeros(shape)
    for term in range(rank):
        vectors = [rng.standard_normal(size) for size in shape]
        piece = vectors[0]
        for vector in vectors[1:]:
            piece = np.multiply.outer(piece, vector)
        out += piece * 10.0 ** (-3 * term)
    return np.asarray(out + 1e-9 * rng.standard_normal(shape))


def tensor_of(values: Full, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return torch.tensor(values / max(1.0, np.abs(values).max()), dtype=torch.float64).mul(scale).to(dtype)


@st.composite
def shapes(draw: st.DrawFn, most: int = 6) -> tuple[int, ...]:
    """One to `most` modes; now and then very skewed."""
    count = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(1, 6 if count < 5 else 4), min_size=count, max_size=count))
    if count < 4 and draw(st.booleans()):
        sizes[draw(st.integers(0, count - 1))] = draw(st.sampled_from([64, 301]))
    return tuple(sizes)


@st.composite
def tensors(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = WORK_TYPES, most: int = 6) -> Tensor:
    dtype = draw(dtypes)
    values = sample(draw(st.sampled_from(KINDS)), draw(shapes(most)), draw(st.integers(0, 2**31)))
    return tensor_of(values, dtype, draw(st.sampled_from(SCALES[dtype])))


@st.composite
def tensors_and_eps(draw: st.DrawFn) -> tuple[Tensor, float]:
    tensor = draw(tensors())
    smallest = SMALLEST[tensor.dtype]
    return tensor, max(smallest, 10.0 ** draw(st.floats(np.log10(smallest), np.log10(0.9))))


@settings(max_examples=300, deadline=None)
@given(case=tensors_and_eps())
def test_the_error_is_at_most_eps(case: tuple[Tensor, float]) -> None:
    tensor, eps = case
    result = tt_svd(tensor, eps=eps)
    assert true_error(tensor, result.cores) <= eps
    assert feasible_ranks(tensor.shape, result.tt_ranks) == result.tt_ranks


@settings(max_examples=100, deadline=None)
@given(case=tensors_and_eps())
def test_a_cap_that_does_not_bind_leaves_eps_kept(case: tuple[Tensor, float]) -> None:
    tensor, eps = case
    assert true_error(tensor, tt_svd(tensor, max_rank=10**6, eps=eps).cores) <= eps


@settings(max_examples=200, deadline=None)
@given(
    tensor=tensors(),
    max_rank=st.one_of(st.none(), st.integers(1, 8)),
    dtype=st.sampled_from([None, torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_the_reported_error_is_the_true_one_after_the_cast(
    tensor: Tensor, max_rank: int | None, dtype: torch.dtype | None
) -> None:
    if dtype not in (None, torch.float64) and not 1e-30 <= float(tensor.abs().max()) <= 1e30:
        tensor = tensor_of(sample("normal", tensor.shape, 0), tensor.dtype)
    if dtype == torch.float16:
        tensor = tensor / tensor.abs().max()
    result = tt_svd(tensor, max_rank, dtype=dtype)
    assert {core.dtype for core in result.cores} == {dtype or tensor.dtype}
    assert result.relative_error == pytest.approx(true_error(tensor, result.cores), rel=1e-6, abs=1e-14)


@settings(max_examples=150, deadline=None)
@given(tensor=tensors())
def test_full_rank_reproduces_the_tensor(tensor: Tensor) -> None:
    assert true_error(tensor, tt_svd(tensor).cores) <= ROUND_OFF[tensor.dtype]


@settings(max_examples=150, deadline=None)
@given(tensor=tensors(), seed=st.integers(0, 2**31))
def test_rank_caps_are_kept_and_infeasible_ones_clipped(tensor: Tensor, seed: int) -> None:
    rng = np.random.default_rng(seed)
    caps = (1, *(int(cap) for cap in rng.integers(1, 9, tensor.dim() - 1)), 1)
    result = tt_svd(tensor, caps)
    assert result.tt_ranks == feasible_ranks(tensor.shape, caps)
    assert result.clipped == (result.tt_ranks != caps)
    assert [core.shape for core in result.cores] == [
        (left, size, right)
        for left, size, right in zip(result.tt_ranks[:-1], tensor.shape, result.tt_ranks[1:], strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(tensor=tensors(), max_rank=st.integers(1, 6))
def test_the_error_lies_between_the_largest_tail_and_the_root_of_all_tails(
    tensor: Tensor, max_rank: int
) -> None:
    """Oseledets 2011, theorem 2.2, and Eckart and Young: no TT of these ranks can beat any one unfolding's tail."""
    result = tt_svd(tensor, max_rank)
    exact = np.ldexp(tensor.double().numpy(), -exponent_of(tensor))
    tails = [0.0]
    for k in range(1, exact.ndim):
        values = np.linalg.svd(exact.reshape(prod(exact.shape[:k]), -1), compute_uv=False) ** 2
        tails.append(float(values[result.tt_ranks[k] :].sum() / max(values.sum(), 1e-300)))
    error, slack = true_error(tensor, result.cores), ROUND_OFF[tensor.dtype]
    assert sqrt(max(tails)) - slack <= error <= sqrt(sum(tails)) + slack


@settings(max_examples=60, deadline=None)
@given(tensor=tensors(most=3))
def test_more_rank_never_means_more_error(tensor: Tensor) -> None:
    top = max(tt_svd(tensor).tt_ranks)
    errors = [true_error(tensor, tt_svd(tensor, rank).cores) for rank in range(1, min(top, 12) + 1)]
    slack = ROUND_OFF[tensor.dtype]
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))


@pytest.mark.parametrize("shape", [(4, 5, 3, 4), (3, 4, 2, 3, 4), (3, 3, 3, 3, 3, 3)])
@pytest.mark.parametrize("kind", ["normal", "decaying", "wide range"])
def test_more_rank_never_means_more_error_with_many_modes(shape: tuple[int, ...], kind: str) -> None:
    tensor = tensor_of(sample(kind, shape, 7), torch.float64)
    errors = [true_error(tensor, tt_svd(tensor, rank).cores) for rank in range(1, 28)]
    assert all(later <= earlier + 1e-13 for earlier, later in pairwise(errors))


@settings(max_examples=60, deadline=None)
@given(tensor=tensors())
def test_all_cores_have_the_same_norm(tensor: Tensor) -> None:
    arrays = [core.double().numpy() for core in tt_svd(tensor, 3).cores]
    peaks = [float(np.abs(array).max()) or 1.0 for array in arrays]
    norms = [peak * float(np.linalg.norm(array / peak)) for array, peak in zip(arrays, peaks, strict=True)]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (3, 4, 5)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-14])
def test_nothing_is_shared_with_the_input_which_stays_as_it_was(
    shape: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    tensor = tensor_of(sample("normal", shape, 1), dtype, scale).requires_grad_()
    before = tensor.detach().clone()
    cores = tt_svd(tensor).cores
    assert not any(core.requires_grad for core in cores)
    for core in cores:
        core.fill_(9.0)
    assert torch.equal(tensor.detach(), before)
    assert len({core.untyped_storage().data_ptr() for core in cores}) == len(cores)


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)])
def test_strides_do_not_matter(shape: tuple[int, ...]) -> None:
    tensor = tensor_of(sample("normal", shape, 2), torch.float32)
    strided = tensor.mT.contiguous().mT
    assert strided.stride() != tensor.stride()
    expanded = tensor[:1].expand(shape)
    np.testing.assert_allclose(full(tt_svd(strided, 2).cores), full(tt_svd(tensor, 2).cores), atol=1e-6)
    assert true_error(expanded, tt_svd(expanded, eps=1e-5).cores) <= 1e-5


def test_zeros_take_rank_one_at_any_eps() -> None:
    result = tt_svd(torch.zeros(4, 4, 4), eps=0.1)
    assert result.tt_ranks == (1, 1, 1, 1)
    assert not full(result.cores).any()
    assert result.relative_error == 0.0


@pytest.mark.parametrize("kind", ["low rank", "constant", "one entry"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eps_finds_the_rank_of_a_rank_one_tensor(kind: str, dtype: torch.dtype) -> None:
    tensor = tensor_of(sample(kind, (5, 4, 3, 6), 3), dtype)
    assert tt_svd(tensor, eps=1e-4).tt_ranks == (1, 1, 1, 1, 1)


def test_float16_weights_whose_products_leave_its_range() -> None:
    """sqrt(sum A^2) is far beyond 65,504; every core stays inside."""
    tensor = tensor_of(sample("normal", (32, 16, 32), 4), torch.float16, 60000.0)
    result = tt_svd(tensor)
    assert all(bool(core.isfinite().all()) for core in result.cores)
    assert true_error(tensor, result.cores) < 2e-3
    assert result.relative_error == pytest.approx(true_error(tensor, result.cores), rel=1e-6)


def test_values_beyond_the_storage_type_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"range of torch\.float16"):
        tt_svd(torch.full((4, 4), 1e12), dtype=torch.float16)
    with pytest.raises(ShapeError, match=r"range of torch\.float32"):
        tt_svd(torch.full((4,), 1e300, dtype=torch.float64), dtype=torch.float32)


def test_bfloat16_weights_at_the_edge_of_their_range() -> None:
    tensor = tensor_of(sample("normal", (8, 6, 8), 5), torch.bfloat16, 3e38)
    result = tt_svd(tensor, eps=0.3)
    assert result.relative_error == pytest.approx(true_error(tensor, result.cores), rel=1e-6)
    assert result.relative_error < 0.31


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1.0, nan]]),
        torch.tensor([[1.0, inf]]),
        torch.tensor([[-inf, 1.0]], dtype=torch.float64),
        torch.zeros(0),
        torch.zeros(3, 0, 2),
        torch.tensor(1.0),
        torch.ones(3, 3, dtype=torch.int64),
        torch.ones(3, 3, dtype=torch.bool),
        torch.ones(3, 3, dtype=torch.complex64),
    ],
    ids=["nan", "inf", "-inf", "empty", "empty mode", "no modes", "integer", "bool", "complex"],
)
def test_tensors_that_have_no_tt_svd(tensor: Tensor) -> None:
    with pytest.raises(ShapeError, match="TT-SVD takes"):
        tt_svd(tensor)
    with pytest.raises(ShapeError, match="TT-SVD takes"):
        squared_spectra(tensor)


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [
        *((torch.float32, eps) for eps in (0.0, -0.1, 1.0, 1.5, nan, inf, 0.9e-6)),
        *((torch.float16, eps) for eps in (0.9e-6, 1.0)),
        *((torch.float64, eps) for eps in (0.0, 1.0, nan, 0.9e-12)),
    ],
)
def test_eps_out_of_range(dtype: torch.dtype, eps: float) -> None:
    with pytest.raises(ShapeError, match="eps must lie in"):
        tt_svd(torch.ones(3, 3, dtype=dtype), eps=eps)


@pytest.mark.parametrize("max_rank", [0, -1, (2,), (2, 2, 2), (2, 2, 2, 1), (1, 0, 2, 1)])
def test_ranks_that_do_not_fit(max_rank: int | tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="TT-ranks"):
        tt_svd(torch.ones(3, 3, 3), max_rank)


@pytest.mark.parametrize("kind", ["normal", "decaying"])
@pytest.mark.parametrize("shape", [(600, 700), (24, 25, 24, 25)])
def test_a_few_of_many_singular_vectors_hold_as_much_as_the_exact_ones(
    kind: str, shape: tuple[int, ...]
) -> None:
    """Of 600 equal-looking directions a Krylov space finds those 20 that hold most, but for a thousandth."""
    tensor = tensor_of(sample(kind, shape, 8), torch.float32)
    exact, result = tt_svd(tensor.double(), 20), tt_svd(tensor, 20)
    assert result.tt_ranks == exact.tt_ranks
    assert result.relative_error == pytest.approx(true_error(tensor, result.cores), rel=1e-6)
    assert result.relative_error <= max(1.001 * exact.relative_error, 1e-6)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small blocks the same comes out as in one piece."""
    weight, tensorization = weight_case("matrix", (64, 96), (4, 4, 4), (4, 4, 6))
    whole = decompose_weight(weight.float(), tensorization, 3)
    monkeypatch.setattr(unfolding, "BLOCK", 100)
    parts = decompose_weight(weight.float(), tensorization, 3)
    found, expected = (weight_in_numpy(each.cores, (64, 96)) for each in (parts, whole))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-6)


@settings(max_examples=80, deadline=None)
@given(
    tensor=tensors(st.sampled_from([torch.float16, torch.float32, torch.float64]).filter(SCALES.__contains__))
)
def test_squared_spectra_are_those_of_numpy(tensor: Tensor) -> None:
    exact = np.ldexp(tensor.double().numpy(), -exponent_of(tensor))
    spectra = squared_spectra(tensor)
    assert len(spectra) == tensor.dim() - 1
    for k, spectrum in enumerate(spectra, start=1):
        values = np.linalg.svd(exact.reshape(prod(exact.shape[:k]), -1), compute_uv=False) ** 2
        expected = values / max(values.sum(), 1e-300)
        np.testing.assert_allclose(spectrum.numpy(), expected, rtol=1e-9, atol=1e-14)
        assert bool((spectrum[1:] <= spectrum[:-1]).all())


WEIGHTS = [
    ("matrix", (16, 30), (4, 4), (5, 6)),
    ("matrix", (37, 41), None, None),
    ("matrix", (16, 9, 3, 3), (4, 4), (3, 3)),
    ("matrix", (17, 19, 3, 2), None, None),
    ("matrix", (2, 3), None, None),
    ("chain", (7, 5, 3, 2), None, None),
    ("naive", (7, 5, 3, 2), None, None),
    ("lowrank", (7, 5, 3, 2), None, None),
    ("lowrank", (7, 5), None, None),
]


def weight_case(
    weight_format: str, shape: tuple[int, ...], outs: tuple[int, ...] | None, ins: tuple[int, ...] | None
) -> tuple[Tensor, Tensorization]:
    weight = tensor_of(sample("normal", shape, 6), torch.float64)
    return weight, tensorize_shape(weight_format, shape, outs, ins)


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_full_rank_reproduces_the_weight(case: tuple[str, tuple[int, ...], None, None]) -> None:
    weight, tensorization = weight_case(*case)
    result = decompose_weight(weight, tensorization)
    assert [core.shape for core in result.cores] == tensorization.core_shapes(result.tt_ranks)
    np.testing.assert_allclose(weight_in_numpy(result.cores, weight.shape), weight.numpy(), atol=1e-13)


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e300, 1e-300])
def test_the_error_of_a_weight_is_measured_without_its_padding(
    case: tuple[str, tuple[int, ...], None, None], scale: float
) -> None:
    weight, tensorization = weight_case(*case)
    weight = weight * scale
    result = decompose_weight(weight, tensorization, max_rank=2)
    exact, found = weight.numpy() / scale, weight_in_numpy(result.cores, weight.shape) / scale
    expected = np.linalg.norm(exact - found) / np.linalg.norm(exact)
    assert result.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_tensorize_puts_zeros_only_at_the_end(case: tuple[str, tuple[int, ...], None, None]) -> None:
    weight, tensorization = weight_case(*case)
    modes = tensorization.modes
    viewed = tensorize(weight, tensorization).numpy().reshape([factor for mode in modes for factor in mode])
    axes = [3 * k + axis for axis in range(3) for k in range(len(modes))]
    sizes = [prod(mode[axis] for mode in modes) for axis in range(3)]
    back = viewed.transpose(axes).reshape(sizes)
    expected = np.zeros(sizes)
    expected[: weight.shape[0], : weight.shape[1]] = weight.numpy().reshape(*weight.shape[:2], -1)
    np.testing.assert_array_equal(back, expected)


@pytest.mark.slow
def test_vgg_fc6_of_exact_rank_4_comes_back() -> None:
    """25088 x 4096 in Novikov's modes, some 15 s: built from random cores and compared in blocks of rows."""
    outs, ins = (4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4)
    rng = np.random.default_rng(0)
    ranks = (1, 4, 4, 4, 4, 4, 1)
    made = [
        torch.tensor(rng.standard_normal((ranks[k], outs[k], ins[k], 1, ranks[k + 1])) / 4)
        for k in range(len(outs))
    ]
    weight = torch.tensor(np.concatenate(list(rows_of(made))), dtype=torch.float32)
    result: TTSVD = decompose_weight(weight, tensorize_shape("matrix", (4096, 25088), outs, ins), max_rank=4)
    assert result.tt_ranks == ranks
    missed = norm = 0.0
    for index, rows in enumerate(rows_of(result.cores)):
        exact = weight[64 * index : 64 * (index + 1)].double().numpy()
        missed += float(np.square(exact - rows).sum())
        norm += float(np.square(exact).sum())
    assert sqrt(missed / norm) < 1e-6
    assert result.relative_error == pytest.approx(sqrt(missed / norm), rel=1e-4)


def rows_of(cores: Sequence[Tensor]) -> list[Full]:
    """The 4096 x 25088 weight in 64 blocks of 64 rows: the first three cores are one factor, the last three another."""
    a, b, c, d, e, f = (core[:, :, :, 0].double().numpy() for core in cores)
    left = np.einsum("zaip,pbjq,qckr->abcijkr", a, b, c).reshape(64, 112, 4)
    right = np.einsum("paiq,qbjr,rckz->pabcijk", d, e, f).reshape(4, 64 * 224)
    return [(block @ right).reshape(112, 64, 224).swapaxes(0, 1).reshape(64, 25088) for block in left]


def test_a_rank_that_one_side_cannot_carry_is_not_kept() -> None:
    """Between modes of size 1 lie cuts of one and the same unfolding, which may be cut at different ranks."""
    wide = [torch.randn(1, 4, 2), torch.randn(2, 1, 3), torch.randn(3, 4, 1)]
    narrow = _feasible(wide)
    assert [core.shape[0] for core in narrow] == [1, 2, 2]
    torch.testing.assert_close(dense_of(narrow), dense_of(wide))


def dense_of(cores: list[Tensor]) -> Tensor:
    return torch.einsum("aib,bjc,ckd->ijk", *cores)
