"""TT algebra against plain NumPy float64 on the full tensor, for random modes, TT-ranks and types."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.errors import ShapeError
from ttcompress.tt import arithmetic as tt

Full = NDArray[np.float64]
Cores = list[Tensor]

DTYPES = st.sampled_from([torch.float64, torch.float32])
few = settings(max_examples=60, deadline=None)


def make(modes: Sequence[tuple[int, ...]], ranks: Sequence[int], seed: int, dtype: torch.dtype) -> Cores:
    rng = np.random.default_rng(seed)
    shapes = [(left, *mode, right) for left, mode, right in zip(ranks, modes, ranks[1:], strict=False)]
    return [torch.tensor(rng.standard_normal(shape), dtype=dtype) for shape in shapes]


def ranks_for(draw: st.DrawFn, d: int) -> list[int]:
    return [1, *draw(st.lists(st.integers(1, 4), min_size=d - 1, max_size=d - 1)), 1]


@st.composite
def tt_pairs(draw: st.DrawFn, axes: int | None = None) -> tuple[Cores, Cores]:
    """Two TT-tensors of the same modes and type, with one to three modes a core."""
    d = draw(st.integers(1, 5))
    axes = axes or draw(st.integers(1, 3 if d < 4 else 1))
    top = 4 if axes == 1 else 3 if d < 4 else 2
    modes = draw(st.lists(st.tuples(*[st.integers(1, top)] * axes), min_size=d, max_size=d))
    dtype, seed = draw(DTYPES), draw(st.integers(0, 2**32 - 2))
    return make(modes, ranks_for(draw, d), seed, dtype), make(modes, ranks_for(draw, d), seed + 1, dtype)


def tt_tensors(axes: int | None = None) -> st.SearchStrategy[Cores]:
    return tt_pairs(axes).map(lambda pair: pair[0])


def full(cores: Sequence[Tensor]) -> Full:
    """The oracle: every entry as the product of core slices, in float64."""
    out: Full = np.ones((1,))
    for core in cores:
        out = np.tensordot(out, core.double().numpy(), axes=(-1, 0))
    return out[..., 0]


def tt_ranks(cores: Sequence[Tensor]) -> list[int]:
    return [1, *(core.shape[-1] for core in cores)]


def magnitude(*tensors: Sequence[Tensor]) -> float:
    """Norm of the tensors with absolute values for cores: the scale of the round-off of any evaluation."""
    return sum(float(np.linalg.norm(full([core.abs() for core in cores]))) for cores in tensors)


def tolerance(cores: Sequence[Tensor]) -> float:
    return 20 * torch.finfo(cores[0].dtype).eps


def assert_is(result: Sequence[Tensor], expected: Full, scale: float) -> None:
    assert np.linalg.norm(full(result) - expected) <= tolerance(result) * scale


def assert_pure(function: Callable[..., object], *arguments: Sequence[Tensor]) -> None:
    """Inputs keep every bit, the result keeps their type and has storage of its own."""
    before = [[core.clone() for core in cores] for cores in arguments]
    result = function(*arguments)
    for cores, copies in zip(arguments, before, strict=True):
        assert all(torch.equal(core, copy) for core, copy in zip(cores, copies, strict=True))
    if isinstance(result, float):
        return
    outputs = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    taken = {core.untyped_storage().data_ptr() for cores in arguments for core in cores}
    for output in outputs:
        assert output.dtype == arguments[0][0].dtype
        assert output.untyped_storage().data_ptr() not in taken


@few
@given(tt_pairs())
def test_sum_and_product_are_those_of_the_full_tensors(pair: tuple[Cores, Cores]) -> None:
    a, b = pair
    total_ranks = [x + y for x, y in zip(tt_ranks(a), tt_ranks(b), strict=True)][1:-1]
    assert tt_ranks(tt.add(a, b)) == [1, *total_ranks, 1]
    assert tt_ranks(tt.multiply(a, b)) == [x * y for x, y in zip(tt_ranks(a), tt_ranks(b), strict=True)]
    assert_is(tt.add(a, b), full(a) + full(b), magnitude(a, b))
    assert_is(tt.multiply(a, b), full(a) * full(b), magnitude(a) * magnitude(b))
    assert_pure(tt.add, a, b)
    assert_pure(tt.multiply, a, b)


@few
@given(tt_tensors(), st.sampled_from([-100.0, -1.0, 0.0, 0.03, 1.0, 7.0]))
def test_scaling_and_adding_a_constant_are_those_of_the_full_tensor(a: Cores, c: float) -> None:
    assert_is(tt.scale(a, c), c * full(a), abs(c) * magnitude(a))
    assert_is(tt.add_constant(a, c), full(a) + c, magnitude(a) + abs(c) * np.sqrt(full(a).size))
    assert_pure(lambda x: tt.scale(x, c), a)
    assert_pure(lambda x: tt.add_constant(x, c), a)


@few
@given(tt_pairs())
def test_total_inner_and_norm_are_those_of_the_full_tensors(pair: tuple[Cores, Cores]) -> None:
    a, b = pair
    scale = magnitude(a) * magnitude(b)
    assert tt.total(a) == pytest.approx(
        full(a).sum(), rel=1e-12, abs=1e-14 * magnitude(a) * np.sqrt(full(a).size)
    )
    assert tt.inner(a, b) == pytest.approx((full(a) * full(b)).sum(), rel=1e-12, abs=1e-14 * scale)
    assert tt.norm(a) == pytest.approx(np.linalg.norm(full(a)), rel=1e-12, abs=1e-14 * magnitude(a))
    for function, arguments in ((tt.total, [a]), (tt.inner, [a, b]), (tt.norm, [a])):
        assert_pure(function, *arguments)  # type: ignore[arg-type]


@few
@given(tt_tensors())
def test_a_tensor_less_itself_is_zero(a: Cores) -> None:
    difference = tt.add(a, tt.scale(a, -1))
    assert tt.norm(difference) <= 1e-14 * tt.norm(a)
    rounded = tt.round_tt(difference)
    assert tt.norm(rounded) <= 1e-14 * tt.norm(a)
    assert tt_ranks(rounded) == [1] * (len(a) + 1)


@few
@given(tt_tensors(), st.integers(0, 2**32 - 1))
def test_norm_of_a_small_difference_is_accurate(a: Cores, seed: int) -> None:
    # Where sqrt(<d, d>) would be nothing but round-off: it loses all below 1e-8.
    a = [core.double() for core in a]
    noise = make([tuple(core.shape[1:-1]) for core in a], [1] * (len(a) + 1), seed, torch.float64)
    small = tt.scale(noise, 1e-11 * magnitude(a) / magnitude(noise))
    difference = tt.add(tt.add(a, small), tt.scale(a, -1))
    assert tt.norm(difference) == pytest.approx(np.linalg.norm(full(small)), rel=1e-2)


def unfolded(core: Tensor, left: bool) -> Tensor:
    return core.reshape(-1, core.shape[-1]) if left else core.reshape(core.shape[0], -1).T


@few
@given(tt_tensors(), st.booleans())
def test_orthogonalization_keeps_the_tensor_and_gives_orthonormal_cores(a: Cores, left: bool) -> None:
    function = tt.left_orthogonalize if left else tt.right_orthogonalize
    result = function(a)
    assert_is(result, full(a), magnitude(a))
    for core in result[:-1] if left else result[1:]:
        matrix = unfolded(core, left)
        assert matrix.shape[1] <= matrix.shape[0]
        assert torch.dist(matrix.T @ matrix, torch.eye(matrix.shape[1], dtype=core.dtype)) <= tolerance(a)
    assert all(new <= old for new, old in zip(tt_ranks(result), tt_ranks(a), strict=True))
    assert [core.shape[1:-1] for core in result] == [core.shape[1:-1] for core in a]
    assert_pure(function, a)


@settings(max_examples=150, deadline=None)
@given(tt_tensors(), st.one_of(st.just(0.0), st.floats(1e-5, 1.5), st.sampled_from([1e-12, 1e-8, 3e-7])))
def test_rounding_keeps_its_word_for_every_eps(a: Cores, eps: float) -> None:
    result = tt.round_tt(a, eps)
    # An eps below round-off is held up to it, the cast included.
    bound = max(eps, (4 if a[0].dtype == torch.float32 else 200) * torch.finfo(a[0].dtype).eps)
    assert np.linalg.norm(full(result) - full(a)) <= bound * np.linalg.norm(full(a)) + 1e-15 * magnitude(a)
    assert all(new <= old for new, old in zip(tt_ranks(result), tt_ranks(a), strict=True))
    assert [core.shape[1:-1] for core in result] == [core.shape[1:-1] for core in a]
    assert_pure(lambda x: tt.round_tt(x, eps), a)


@few
@given(tt_tensors())
def test_rounding_removes_what_is_redundant(a: Cores) -> None:
    # The second tensor has the least TT-ranks there are, those of the unfoldings.
    doubled = tt.round_tt(tt.add(a, a))
    flat = full([core.flatten(1, -2) for core in a])
    least = [np.linalg.matrix_rank(flat.reshape(prod(flat.shape[:k]), -1)) for k in range(1, len(a))]
    assert tt_ranks(doubled) == [1, *least, 1]
    assert_is(doubled, 2 * full(a), 10 * magnitude(a))


def nearly_rank_one(d: int, size: float, dtype: torch.dtype) -> Cores:
    """e1 x ... x e1 plus, for each cut, `size` times e2 x e2 across it: every cut has singular values 1 and `size`."""
    e1, e2 = torch.eye(2, dtype=dtype)
    main = [e1.reshape(1, 2, 1)] * d
    a = main
    for k in range(d - 1):
        a = tt.add(a, [*main[:k], size * e2.reshape(1, 2, 1), e2.reshape(1, 2, 1), *main[k + 2 :]])
    return a


def test_the_error_of_all_cuts_together_stays_within_eps() -> None:
    a = nearly_rank_one(5, 0.01, torch.float64)
    norm = np.linalg.norm(full(a))
    for eps in (0.009, 0.011, 0.019):
        assert np.linalg.norm(full(tt.round_tt(a, eps)) - full(a)) <= eps * norm
    assert tt_ranks(tt.round_tt(a, 0.0201)) == [1] * 6


def test_the_cast_to_float32_is_within_eps_too() -> None:
    for seed in range(5):
        large, small = (make([(4,)] * 2, [1, 1, 1], seed + part, torch.float32) for part in (0, 100))
        a = tt.add(large, tt.scale(small, 1e-5))
        values = np.linalg.svd(full(a), compute_uv=False)
        eps = float(values[1] / np.linalg.norm(values)) * (1 + 1e-6)
        assert np.linalg.norm(full(tt.round_tt(a, eps)) - full(a)) <= eps * np.linalg.norm(full(a))


@pytest.mark.parametrize(("dtype", "rank"), [(torch.float64, 2), (torch.float32, 1)])
def test_what_is_redundant_depends_on_the_type(dtype: torch.dtype, rank: int) -> None:
    assert tt_ranks(tt.round_tt(nearly_rank_one(2, 1e-9, dtype))) == [1, rank, 1]


@pytest.mark.parametrize("seed", range(20))
def test_round_off_of_the_sweeps_is_no_rank(seed: int) -> None:
    a = make([(8,)] * 4, [1, 3, 3, 3, 1], seed, torch.float64)
    assert tt_ranks(tt.round_tt(tt.add(a, a))) == [1, 3, 3, 3, 1]


@few
@given(tt_tensors(), st.integers(1, 4))
def test_rounding_to_a_cap_is_quasi_optimal(a: Cores, cap: int) -> None:
    result = tt.round_tt(a, max_rank=cap)
    assert max(tt_ranks(result)) <= cap
    flat = full([core.flatten(1, -2) for core in a])
    spectra = [
        np.linalg.svd(flat.reshape(prod(flat.shape[:k]), -1), compute_uv=False) for k in range(1, len(a))
    ]
    bound = sum(float((values[cap:] ** 2).sum()) for values in spectra) ** 0.5
    assert np.linalg.norm(full(result) - full(a)) <= bound + 10 * tolerance(a) * magnitude(a)


def test_larger_eps_never_means_larger_ranks() -> None:
    a = make([(3,), (4,), (4,), (3,)], [1, 3, 4, 3, 1], 0, torch.float64)
    counts = [sum(core.numel() for core in tt.round_tt(a, eps)) for eps in (0, 0.1, 0.3, 0.5, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_zero_tensor_rounds_to_ranks_one(dtype: torch.dtype, zero: int) -> None:
    a = make([(2, 3)] * 3, [1, 3, 4, 1], 1, dtype)
    a[zero] = torch.zeros_like(a[zero])
    result = tt.round_tt(a, 1e-3)
    assert [tuple(core.shape) for core in result] == [(1, 2, 3, 1)] * 3
    assert not any(core.any() for core in result)
    assert {core.dtype for core in result} == {dtype}
    assert tt.norm(a) == tt.total(a) == tt.inner(a, a) == 0


EXTREMES = [
    (torch.float64, [1e250, 1e-250, 1.0]),
    (torch.float64, [1e-200, 1e-100, 1e290]),
    (torch.float64, [5e-324 * 2**20, 1e300, 1.0]),
    (torch.float32, [1e35, 1e35, 1e35]),
    (torch.float32, [1e-30, 1e-30, 1e-30]),
    (torch.float32, [1e-41, 1.0, 1.0]),
    (torch.float32, [1e-42, 1e-42, 1e-42]),
    (torch.float32, [3e38, 3e38, 3e38]),
]


def full_with_exponent(cores: Sequence[Tensor]) -> tuple[Full, int]:
    """The full tensor over 2^e, and e: float64 could not hold it."""
    exponents = [int(np.frexp(core.double().abs().max().item())[1]) for core in cores]
    scaled = [np.ldexp(core.double().numpy(), -e) for core, e in zip(cores, exponents, strict=True)]
    return full([torch.tensor(core) for core in scaled]), sum(exponents)


@pytest.mark.parametrize(("dtype", "factors"), EXTREMES)
@pytest.mark.parametrize("eps", [1e-5, 0.1, 0.5])
def test_huge_and_denormal_values_are_rounded_as_any_other(
    dtype: torch.dtype, factors: list[float], eps: float
) -> None:
    rng = np.random.default_rng(2)
    a = [
        torch.tensor(rng.uniform(-1, 1, shape) * factor).to(dtype)
        for shape, factor in zip([(1, 4, 3), (3, 5, 4), (4, 4, 1)], factors, strict=True)
    ]
    exact, exponent = full_with_exponent(a)
    rounded, rounded_exponent = full_with_exponent(tt.round_tt(a, eps))
    rounded = np.ldexp(rounded, rounded_exponent - exponent)
    assert np.linalg.norm(rounded - exact) <= eps * np.linalg.norm(exact)


@pytest.mark.parametrize("exponent", [-1000, -300, 300, 1000])
def test_scalars_leave_the_range_only_where_the_answer_does(exponent: int) -> None:
    a = make([(3,), (4,), (2,)], [1, 2, 3, 1], 3, torch.float64)
    far = [a[0] * 2.0**exponent, a[1] * 2.0**-exponent, a[2]]
    for function in (tt.norm, tt.total, lambda x: tt.inner(x, a)):
        assert function(far) == pytest.approx(function(a), rel=1e-12)  # type: ignore[operator]
    assert tt.norm([a[0] * 2.0**1000, a[1] * 2.0**1000, a[2]]) == inf


def test_parts_of_very_different_scale_both_count() -> None:
    huge_first = make([(3,), (4,)], [1, 1, 1], 4, torch.float64)
    huge_last = make([(3,), (4,)], [1, 1, 1], 5, torch.float64)
    far = tt.add(
        [huge_first[0] * 2.0**660, huge_first[1] * 2.0**-660],
        [huge_last[0] * 2.0**-660, huge_last[1] * 2.0**660],
    )
    expected = full(huge_first) + full(huge_last)
    assert tt.norm(far) == pytest.approx(np.linalg.norm(expected), rel=1e-12)
    assert_is(tt.round_tt(far, 1e-10), expected, 1e6 * float(np.linalg.norm(expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_in_float64(dtype: torch.dtype) -> None:
    a = make([(4,), (4,), (4,)], [1, 2, 2, 1], 6, dtype)
    result = tt.round_tt(tt.add(a, a), 0.05)
    assert tt_ranks(result) == [1, 2, 2, 1]
    assert np.linalg.norm(full(result) - 2 * full(a)) <= 0.05 * np.linalg.norm(2 * full(a))
    assert {core.dtype for core in result} == {dtype}


@few
@given(tt_tensors(axes=2), st.sampled_from([(), (1,), (3,), (2, 2), (0,)]), st.integers(0, 99))
def test_matvec_is_the_product_with_the_full_matrix(a: Cores, batch: tuple[int, ...], seed: int) -> None:
    d = len(a)
    matrix = full(a).transpose([*range(0, 2 * d, 2), *range(1, 2 * d, 2)])
    matrix = matrix.reshape(prod(core.shape[1] for core in a), prod(core.shape[2] for core in a))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, matrix.shape[1], generator=generator, dtype=a[0].dtype)
    y = tt.matvec(a, x)
    assert (y.shape, y.dtype) == ((*batch, matrix.shape[0]), x.dtype)
    missed = y.double().numpy() - x.double().numpy() @ matrix.T
    assert np.linalg.norm(missed) <= tolerance(a) * magnitude(a) * float(x.double().norm())
    assert np.linalg.norm(tt.to_matrix(a).double().numpy() - matrix) <= tolerance(a) * magnitude(a)
    assert_pure(lambda cores: tt.matvec(cores, x), a)
    assert_pure(tt.to_matrix, a)


@few
@given(tt_tensors(axes=2), st.data())
def test_matvec_tt_agrees_with_matvec(a: Cores, data: st.DataObject) -> None:
    vector_ranks = ranks_for(data.draw, len(a))
    b = make([tuple(core.shape[2:3]) for core in a], vector_ranks, 7, a[0].dtype)
    product = tt.matvec_tt(a, b)
    assert tt_ranks(product) == [x * y for x, y in zip(tt_ranks(a), vector_ranks, strict=True)]
    expected = tt.matvec([core.double() for core in a], torch.tensor(full(b).reshape(-1)))
    assert_is(product, expected.numpy().reshape([core.shape[1] for core in a]), magnitude(a) * magnitude(b))
    assert_pure(tt.matvec_tt, a, b)


@few
@given(tt_tensors())
def test_to_tensor_keeps_modes_in_core_order(a: Cores) -> None:
    tensor = tt.to_tensor(a)
    assert tuple(tensor.shape) == full(a).shape
    assert np.linalg.norm(tensor.double().numpy() - full(a)) <= tolerance(a) * magnitude(a)
    assert_pure(tt.to_tensor, a)


def test_parameters_are_taken_and_gradients_flow_through_the_products() -> None:
    a = [torch.nn.Parameter(core) for core in make([(2, 3), (3, 2)], [1, 2, 1], 8, torch.float64)]
    assert not any(core.requires_grad for core in tt.round_tt(a, 0.1))
    assert tt.norm(a) == pytest.approx(np.linalg.norm(full([core.detach() for core in a])))
    tt.matvec(a, torch.ones(6, dtype=torch.float64)).sum().backward()
    assert a[0].grad is not None
    assert a[0].grad[0, 0, 0].tolist() == pytest.approx(a[1].detach().sum(dim=(1, 2, 3)).tolist())


V = [torch.zeros(1, 2, 3), torch.zeros(3, 4, 1)]
M = [torch.zeros(1, 2, 3, 2), torch.zeros(2, 4, 5, 1)]
MISFITS: list[tuple[Callable[[], object], str]] = [
    (lambda: tt.norm([]), "left rank"),
    (lambda: tt.norm([torch.zeros(1, 1)]), "left rank"),
    (lambda: tt.norm([torch.zeros(1, 0, 1)]), "left rank"),
    (lambda: tt.to_tensor(V[:1]), "both ends are 1"),
    (lambda: tt.total([V[0], torch.zeros(2, 4, 1)]), "share their TT-rank"),
    (lambda: tt.add(V, V[:1]), "both ends are 1"),
    (lambda: tt.add(V, M), "modes of two TT-tensors differ: 2,4 and 2x3,4x5"),
    (lambda: tt.multiply(V, [V[0], torch.zeros(3, 5, 1)]), "differ: 2,4 and 2,5"),
    (lambda: tt.inner(V, M), "differ"),
    (lambda: tt.matvec(V, torch.zeros(8)), "four axes"),
    (lambda: tt.to_matrix(V), "four axes"),
    (lambda: tt.matvec(M, torch.zeros(15, 2)), r"length 15, not a tensor of shape \(15, 2\)"),
    (lambda: tt.matvec(M, torch.tensor(1.0)), "length 15"),
    (lambda: tt.matvec_tt(M, V), "takes modes 3,5, the TT-vector has 2,4"),
    (lambda: tt.round_tt(V, -0.1), "eps=-0.1"),
    (lambda: tt.round_tt(V, nan), "eps=nan"),
    (lambda: tt.round_tt(V, max_rank=0), "max_rank=0"),
    (lambda: tt.round_tt([V[0] + nan, V[1] + 1]), "NaN or Inf"),
    (lambda: tt.round_tt([V[0] + inf, V[1] + 1]), "NaN or Inf"),
    (lambda: tt.round_tt([V[0] + 3e38, V[1] + 3e38], max_rank=1), "leaves the range of torch.float32"),
    (lambda: tt.left_orthogonalize([V[0] + 3e38, V[1] + 3e38]), "beyond the range of torch.float32"),
]


@pytest.mark.parametrize(("call", "message"), MISFITS)
def test_what_does_not_fit_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
