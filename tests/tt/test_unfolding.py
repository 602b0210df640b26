"""Blocks of unfoldings against NumPy: Gram matrices, projections, differences, whatever the layout and the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.tt import unfolding
from ttcompress.tt.shapes import Mode
from ttcompress.tt.unfolding import Folded, Side, cut_order, interleave, split

Full = NDArray[np.float64]
ENTRIES = 1 << 11
"""Of a drawn tensor, at most."""


@pytest.fixture(autouse=True, params=[3, 50, 1 << 18])
def block(request: pytest.FixtureRequest) -> Iterator[None]:
    before, unfolding.BLOCK = unfolding.BLOCK, request.param
    yield
    unfolding.BLOCK = before


@st.composite
def folded(draw: st.DrawFn) -> tuple[Folded, int]:
    """Two to four modes, ranks at both ends, and a cut."""
    count = draw(st.integers(2, 4))
    factors: list[int] = []
    for _ in range(3 * count + 2):
        # A side has as many rows as there are entries, at most, and its Gram matrix the square of that.
        factors.append(draw(st.integers(1, max(1, min(3, ENTRIES // prod(factors))))))
    first, last, *rest = draw(st.permutations(factors))
    modes = tuple(Mode(*rest[3 * k : 3 * k + 3]) for k in range(count))
    shape = (first, *(prod(each) for each in zip(*modes, strict=True)), last)
    values = torch.tensor(np.random.default_rng(draw(st.integers(0, 2**31))).standard_normal(shape))
    return Folded(values, modes, draw(st.booleans())), draw(st.integers(1, len(modes) - 1))


def by_modes(values: Tensor, modes: tuple[Mode, ...]) -> Full:
    """The oracle: (a, s_1, ..., s_d, b), entry by entry."""
    array = values.double().numpy()
    out = np.zeros((array.shape[0], *(mode.size for mode in modes), array.shape[-1]))
    for at in np.ndindex(*out.shape[1:-1]):
        parts = [np.unravel_index(index, mode) for index, mode in zip(at, modes, strict=True)]
        where = [
            int(np.ravel_multi_index([part[j] for part in parts], [mode[j] for mode in modes]))
            for j in range(3)
        ]
        out[(slice(None), *at)] = array[:, where[0], where[1], where[2]]
    return out


def side_matrix(case: Folded, cut: int, side: Side) -> Full:
    """The side as rows; each side in the order (a, M, N, W) or (M, N, W, b) that cores of several modes have."""
    full = case.values.double().numpy()
    shape, modes = full.shape, case.modes
    sizes = [
        size for factors in zip(*modes, strict=True) for size in (prod(factors[:cut]), prod(factors[cut:]))
    ]
    view = full.reshape(shape[0], *sizes, shape[-1])
    left = view.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(shape[0] * sizes[0] * sizes[2] * sizes[4], -1)
    return left if side == Side.LEFT else left.T


@settings(max_examples=40, deadline=None)
@given(given_case=folded(), side=st.sampled_from(Side))
def test_gram_matrices(given_case: tuple[Folded, int], side: Side) -> None:
    case, cut = given_case
    matrix = side_matrix(case, cut, side)
    np.testing.assert_allclose(case.gram(cut, side).numpy(), matrix @ matrix.T, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(given_case=folded(), side=st.sampled_from(Side), rank=st.integers(1, 4))
def test_projections_also_in_place(given_case: tuple[Folded, int], side: Side, rank: int) -> None:
    case, cut = given_case
    before = case.values.clone()
    matrix = side_matrix(case, cut, side)
    basis = torch.tensor(np.random.default_rng(0).standard_normal((len(matrix), rank)))
    expected = basis.numpy().T @ matrix
    result = case.project(cut, side, basis, case.values.dtype)
    found = result.values.double().numpy()
    flat = found.reshape(rank, -1) if side == Side.LEFT else found.reshape(-1, rank).T
    np.testing.assert_allclose(flat, expected, atol=1e-12)
    assert case.is_owned or torch.equal(case.values, before)
    assert result.modes == (case.modes[cut:] if side == Side.LEFT else case.modes[:cut])


def test_what_fits_takes_no_new_memory() -> None:
    modes = (Mode(3, 2, 1), Mode(2, 4, 1))
    values = torch.arange(48.0).reshape(1, 6, 8, 1, 1)
    ours, theirs = (Folded(values.clone(), modes, is_owned) for is_owned in (True, False))
    basis = torch.eye(6)[:, :3]
    for case in (ours, theirs):
        stays = (
            case.project(1, Side.LEFT, basis, values.dtype).values.untyped_storage().data_ptr()
            == case.values.data_ptr()
        )
        assert stays == case.is_owned


@settings(max_examples=40, deadline=None)
@given(given_case=folded(), rank=st.integers(1, 3))
def test_squared_differences(given_case: tuple[Folded, int], rank: int) -> None:
    case, cut = given_case
    rng = np.random.default_rng(1)
    left = torch.tensor(rng.standard_normal((*case.shape(cut, Side.LEFT), rank)))
    right = torch.tensor(rng.standard_normal((rank, *case.shape(cut, Side.RIGHT))))
    exact = side_matrix(case, cut, Side.LEFT)
    product = left.flatten(0, 3).numpy() @ right.flatten(1).numpy()
    missed, squared = case.squared_difference(cut, left, right)
    assert missed == pytest.approx(np.square(exact - product).sum())
    assert squared == pytest.approx(np.square(exact).sum())


@settings(max_examples=40, deadline=None)
@given(given_case=folded(), data=st.data())
def test_splitting_is_exact(given_case: tuple[Folded, int], data: st.DataObject) -> None:
    case, _ = given_case
    centre = data.draw(st.integers(0, len(case.modes) - 1))
    expected = by_modes(case.values, case.modes)
    product = np.eye(len(case.values)).reshape(len(case.values), len(case.values))
    for core in split(case.values, case.modes, centre):
        product = np.tensordot(product, core.double().numpy(), axes=(-1, 0))
    np.testing.assert_allclose(product, expected, atol=1e-12)
    np.testing.assert_array_equal(interleave(case.values, case.modes).double().numpy(), expected.reshape(-1))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_the_sweep_takes_every_cut_once_from_the_ends_inwards(sizes: list[int]) -> None:
    first, last = 0, len(sizes)
    for cut, side in cut_order(tuple(sizes)):
        assert cut == (first + 1 if side == Side.LEFT else last - 1)
        first, last = (cut, last) if side == Side.LEFT else (first, cut)
    assert last - first == 1


def test_the_sweep_begins_where_most_falls_away() -> None:
    """VGG's fc6 at rank 4: a quarter is left after the last mode (16), a half after the first (8)."""
    assert cut_order((8, 28, 32, 32, 28, 16))[0] == (5, Side.RIGHT)
