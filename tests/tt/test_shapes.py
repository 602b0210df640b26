"""Tensorizations against brute force over the integers, and TT-rank bounds against ranks that NumPy finds."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttcompress.errors import ShapeError
from ttcompress.tt.shapes import Mode, Tensorization, auto_modes, feasible_ranks, tensorize_shape

FC6 = ((4096, 25088), (4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4))
FC7 = ((4096, 4096), (4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4, 4))
DIMS = [
    1,
    2,
    3,
    7,
    10,
    13,
    16,
    17,
    31,
    60,
    64,
    97,
    100,
    121,
    127,
    210,
    257,
    512,
    1000,
    1001,
    2309,
    4096,
    10007,
    25088,
]

dims = st.one_of(st.sampled_from(DIMS), st.integers(1, 3000))


def smallest_balanced(dim: int, count: int) -> int:
    """The least number from `dim` on with `count` factors of at most twice its count-th root, rounded up."""
    root = next(root for root in range(1, dim + 1) if root**count >= dim)
    reachable = {1}
    for _ in range(count):
        products = {value * factor for value in reachable for factor in range(1, 2 * root + 1)}
        reachable = {value for value in products if value <= root**count}
    return min(value for value in reachable if value >= dim)


@settings(max_examples=60, deadline=None)
@given(out_dim=dims, in_dim=dims)
def test_automatic_modes_cover_the_dimensions_with_the_least_padding(out_dim: int, in_dim: int) -> None:
    pairs = auto_modes(out_dim, in_dim)
    outs, ins = prod(m for m, _ in pairs), prod(n for _, n in pairs)
    assert len(pairs) <= 6
    if len(pairs) == 1:
        assert pairs == [(out_dim, in_dim)]
    else:
        assert all(m * n >= 16 for m, n in pairs)
        assert outs == smallest_balanced(out_dim, len(pairs))
        assert ins == smallest_balanced(in_dim, len(pairs))
    assert out_dim <= outs < 2 * out_dim
    assert in_dim <= ins < 2 * in_dim


@pytest.mark.parametrize("dim", [64, 100, 257, 512, 1000, 4096])
def test_mode_products_are_even(dim: int) -> None:
    """The largest m_k n_k of a square matrix is at most four times the least, and 16 stops the splitting."""
    products = [m * n for m, n in auto_modes(dim, dim)]
    assert max(products) <= 4 * min(products)
    assert len(products) == 6 or min(products) < 16**2


@pytest.mark.parametrize(("max_rank", "params"), [(4, 2016), (2, 528), (1, 144)])
def test_fc6_in_the_modes_of_novikov_et_al_table_2(max_rank: int, params: int) -> None:
    shape, outs, ins = FC6
    paper = tensorize_shape("matrix", shape, outs, ins)
    assert paper.num_params(paper.expand_ranks(max_rank)) == params
    assert (paper.out_modes, paper.in_modes) == (outs, ins)


def test_fc6_and_fc7_at_rank_4_have_3168_parameters() -> None:
    whole = [tensorize_shape("matrix", *layer) for layer in (FC6, FC7)]
    assert sum(each.num_params(each.expand_ranks(4)) for each in whole) == 3168


@pytest.mark.parametrize("max_rank", [1, 2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("layer", [FC6, FC7], ids=["fc6", "fc7"])
def test_automatic_modes_never_cost_more_than_the_papers(
    layer: tuple[tuple[int, ...], ...], max_rank: int
) -> None:
    paper, ours = tensorize_shape("matrix", *layer), tensorize_shape("matrix", layer[0])
    params = [
        each.num_params(feasible_ranks(each.sizes, each.expand_ranks(max_rank))) for each in (ours, paper)
    ]
    assert params[0] <= params[1]


@pytest.mark.parametrize(
    ("weight_format", "kernel", "expected"),
    [
        ("chain", (3, 3), [(1, 6, 1), (1, 1, 9), (8, 1, 1)]),
        ("chain", (1, 3), [(1, 6, 1), (1, 1, 3), (8, 1, 1)]),
        ("chain", (1, 1), [(1, 6, 1), (8, 1, 1)]),
        ("naive", (3, 5), [(1, 1, 3), (1, 1, 5), (1, 6, 1), (8, 1, 1)]),
        ("naive", (1, 3), [(1, 1, 3), (1, 6, 1), (8, 1, 1)]),
        ("naive", (3, 1), [(1, 1, 3), (1, 6, 1), (8, 1, 1)]),
        ("naive", (1, 1), [(1, 6, 1), (8, 1, 1)]),
        ("lowrank", (3, 3), [(1, 6, 9), (8, 1, 1)]),
        ("lowrank", (1, 1), [(1, 6, 1), (8, 1, 1)]),
        ("lowrank", (), [(1, 6, 1), (8, 1, 1)]),
        ("chain", (), [(1, 6, 1), (8, 1, 1)]),
    ],
)
def test_formats_on_each_kernel(
    weight_format: str, kernel: tuple[int, ...], expected: list[tuple[int, int, int]]
) -> None:
    assert [tuple(mode) for mode in tensorize_shape(weight_format, (8, 6, *kernel)).modes] == expected


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (3, 3), (5, 2)])
def test_matrix_format_has_the_window_first_and_drops_a_1x1_one(kernel: tuple[int, int]) -> None:
    modes = tensorize_shape("matrix", (8, 6, *kernel), (2, 4), (2, 3)).modes
    window = [(1, 1, prod(kernel))] if kernel != (1, 1) else []
    assert [tuple(mode) for mode in modes] == [*window, (2, 2, 1), (4, 3, 1)]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    wanted=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_feasible_ranks_are_the_ranks_of_a_random_tensor(
    sizes: list[int], wanted: list[int], seed: int
) -> None:
    """Cores drawn at the wanted TT-ranks make a tensor whose unfoldings have exactly the feasible ones."""
    asked = (1, *wanted[: len(sizes) - 1], 1)
    rng = np.random.default_rng(seed)
    full = np.ones((1,))
    for left, size, right in zip(asked[:-1], sizes, asked[1:], strict=True):
        full = np.tensordot(full, rng.standard_normal((left, size, right)), axes=(-1, 0))
    full = full[..., 0]
    inner = [
        int(np.linalg.matrix_rank(full.reshape(prod(sizes[:k]), -1), tol=1e-7)) for k in range(1, len(sizes))
    ]
    assert feasible_ranks(sizes, asked) == (1, *inner, 1)


def test_max_ranks_are_those_of_a_dense_random_tensor() -> None:
    tensorization = Tensorization("matrix", (Mode(2, 1, 1), Mode(1, 3, 1), Mode(2, 2, 1), Mode(1, 1, 2)))
    full = np.random.default_rng(0).standard_normal(tensorization.sizes)
    ranks = [int(np.linalg.matrix_rank(full.reshape(prod(full.shape[:k]), -1))) for k in range(1, 4)]
    assert tensorization.max_ranks() == (1, *ranks, 1)


@pytest.mark.parametrize("ranks", [3, (3, 3), (1, 3, 3, 1)])
def test_ranks_may_be_one_number_the_inner_ones_or_all(ranks: int | tuple[int, ...]) -> None:
    assert tensorize_shape("chain", (8, 6, 3, 3)).expand_ranks(ranks) == (1, 3, 3, 1)


def test_parameters_are_the_entries_of_the_cores() -> None:
    tensorization = tensorize_shape("matrix", (8, 6, 3, 3), (2, 4), (2, 3))
    for ranks in product(range(1, 5), repeat=2):
        arrays = [np.empty(shape) for shape in tensorization.core_shapes((1, *ranks, 1))]
        assert tensorization.num_params((1, *ranks, 1)) == sum(array.size for array in arrays)


@pytest.mark.parametrize(
    "ranks", [0, -1, (3,), (3, 3, 3), (2, 3, 3, 1), (1, 3, 3, 2), (3, 0), (1, 0, 3, 1), ()]
)
def test_bad_ranks(ranks: int | tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="TT-ranks"):
        tensorize_shape("chain", (8, 6, 3, 3)).expand_ranks(ranks)


def test_rank_zero_is_refused_where_there_is_no_cut() -> None:
    with pytest.raises(ShapeError, match="at least 1"):
        Tensorization("matrix", (Mode(2, 3, 1),)).expand_ranks(0)


@pytest.mark.parametrize(
    ("weight_format", "shape", "outs", "ins", "message"),
    [
        ("tucker", (8, 6), None, None, "unknown format"),
        ("tucker", (8, 6, 3, 3), None, None, "unknown format"),
        ("chain", (8, 6, 3, 3), (2, 4), (2, 3), "belong to format matrix"),
        ("lowrank", (8, 6), (2, 4), (2, 3), "belong to format matrix"),
        ("matrix", (8, 6), (2, 4), None, "given together"),
        ("matrix", (8, 6), None, (2, 3), "given together"),
        ("matrix", (8, 6), (2, 4), (2, 3, 1), "differ in length"),
        ("matrix", (8, 6), (2, 3), (2, 3), "out_modes 2,3 multiply to 6"),
        ("matrix", (8, 6), (2, 4), (2, 2), "in_modes 2,2 multiply to 4"),
        ("matrix", (8, 6), (4, 4), (2, 3), "out_modes 4,4 multiply to 16"),
        ("matrix", (8, 6), (-2, -4), (2, 3), "out_modes -2,-4"),
        ("matrix", (8, 6), (), (), "multiply to 1"),
        ("matrix", (8,), None, None, "a weight is"),
        ("matrix", (0, 6), None, None, "at least 1"),
        ("matrix", (8, 0), None, None, "at least 1"),
        ("chain", (8, 6, 0, 3), None, None, "at least 1"),
    ],
)
def test_bad_tensorizations(
    weight_format: str,
    shape: tuple[int, ...],
    outs: tuple[int, ...] | None,
    ins: tuple[int, ...] | None,
    message: str,
) -> None:
    with pytest.raises(ShapeError, match=message):
        tensorize_shape(weight_format, shape, outs, ins)


@pytest.mark.parametrize("modes", [(), (Mode(0, 1, 1),), (Mode(2, -1, 1),), (Mode(2, 2.5, 1),)])  # type: ignore[arg-type]
def test_modes_are_positive_whole_numbers(modes: tuple[Mode, ...]) -> None:
    with pytest.raises(ShapeError, match="positive whole numbers"):
        Tensorization("matrix", modes)
