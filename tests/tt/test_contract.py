"""Contraction of random cores against one NumPy einsum in float64."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.tt import contract as contract_module
from ttcompress.tt.contract import contract, dense_weight, merge_all, merge_cores, pad_features
from ttcompress.tt.cost import contraction_plan

Full = NDArray[np.float64]
Modes = list[tuple[int, int, int]]


def make(modes: Modes, ranks: Sequence[int], seed: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    shapes = [(left, *mode, right) for left, mode, right in zip(ranks[:-1], modes, ranks[1:], strict=True)]
    return [torch.tensor(rng.standard_normal(shape)) for shape in shapes]


def oracle(cores: Sequence[Tensor]) -> Full:
    """(r_0, M, N, W, r_d): one einsum over all cores, output factors brought together, then inputs, then windows."""
    count = len(cores)
    operands: list[object] = []
    for k, core in enumerate(cores):
        operands += [core.numpy(), [k, 10 + k, 20 + k, 30 + k, k + 1]]
    order = [0, *(base + k for base in (10, 20, 30) for k in range(count)), count]
    full = np.einsum(*operands, order)  # type: ignore[call-overload]
    sizes = [prod(core.shape[axis] for core in cores) for axis in (1, 2, 3)]
    return np.asarray(full.reshape(cores[0].shape[0], *sizes, cores[-1].shape[-1]))


@st.composite
def tensor_trains(draw: st.DrawFn, windows: bool = True, ends: int = 3) -> list[Tensor]:
    count = draw(st.integers(1, 4))
    factor = st.integers(1, 3 if count < 4 else 2)
    modes = [(draw(factor), draw(factor), draw(factor) if windows else 1) for _ in range(count)]
    inner = [draw(st.integers(1, 4)) for _ in range(count - 1)]
    return make(modes, [draw(st.integers(1, ends)), *inner, 1], draw(st.integers(0, 2**31)))


@settings(max_examples=80, deadline=None)
@given(cores=tensor_trains())
def test_merge_all_is_the_einsum_of_all_cores(cores: list[Tensor]) -> None:
    np.testing.assert_allclose(merge_all(cores).numpy(), oracle(cores), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cores=tensor_trains(ends=1))
def test_the_dense_weight_is_cut_from_the_padded_one(cores: list[Tensor]) -> None:
    full = oracle(cores)[0, ..., 0]
    outs, ins, window = full.shape
    shape = (max(1, outs - 1), max(1, ins - 2), window, 1)
    expected = full[: shape[0], : shape[1]].reshape(shape)
    np.testing.assert_allclose(dense_weight(cores, shape).numpy(), expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(cores=tensor_trains(windows=False), rows=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_sweep_applies_the_matrix(cores: list[Tensor], rows: int, seed: int) -> None:
    full = oracle(cores)[:, :, :, 0, 0]
    x = np.random.default_rng(seed).standard_normal((rows, full.shape[2]))
    expected = np.einsum("amn,bn->bam", full, x).reshape(rows, full.shape[0] * full.shape[1])
    np.testing.assert_allclose(contract(cores, torch.tensor(x)).numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "modes", [[(1, 90, 1), (70, 1, 1)], [(70, 1, 1), (1, 90, 1)]], ids=["in first", "out first"]
)
def test_sweep_starts_where_it_is_cheaper(modes: Modes) -> None:
    """Two factors of a matrix cost (N + M) r multiply-adds a row in either order, never N M r."""
    cores = make(modes, [1, 5, 1], 0)
    x = np.random.default_rng(1).standard_normal((3, 90))
    cost = contraction_plan(tuple(tuple(core.shape) for core in cores)).cost(3)
    assert cost.multiply_adds == 3 * 5 * (90 + 70)
    expected = x @ oracle(cores)[0, :, :, 0, 0].T
    np.testing.assert_allclose(contract(cores, torch.tensor(x)).numpy(), expected, rtol=1e-11, atol=1e-11)


def test_merge_order_does_not_matter() -> None:
    a, b, c = make([(2, 3, 1), (1, 2, 3), (3, 1, 2)], [2, 3, 2, 1], 5)
    left, right = merge_cores(merge_cores(a, b), c), merge_cores(a, merge_cores(b, c))
    np.testing.assert_allclose(left.numpy(), oracle([a, b, c]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(right.numpy(), oracle([a, b, c]), rtol=1e-12, atol=1e-12)


def test_padding_is_zeros_at_the_end() -> None:
    x = np.random.default_rng(3).standard_normal((2, 5))
    np.testing.assert_array_equal(pad_features(torch.tensor(x), 8).numpy(), np.pad(x, ((0, 0), (0, 3))))
    np.testing.assert_array_equal(pad_features(torch.tensor(x), 5).numpy(), x)


def test_the_gradient_of_a_large_product_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of first and second order, forward and by samples, as torch has it of the product that it knows."""
    monkeypatch.setattr(contract_module, "LARGE_ENTRIES", 1)
    torch.manual_seed(0)
    matrix = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 4, 2, dtype=torch.float64, requires_grad=True)
    assert contract_module._is_worth_own_gradient(matrix, z)
    apply = contract_module._apply
    torch.testing.assert_close(apply(matrix, z), matrix @ z)
    assert torch.autograd.gradcheck(apply, (matrix, z), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(apply, (matrix, z))
    per_sample = torch.func.vmap(torch.func.grad(lambda m, x: apply(m, x[None]).pow(2).sum()), (None, 0))
    wanted = torch.func.vmap(torch.func.grad(lambda m, x: (m @ x).pow(2).sum()), (None, 0))
    torch.testing.assert_close(per_sample(matrix, z), wanted(matrix, z))


def test_large_products_of_a_layer_train_as_small_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cores = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 8, 32, 1, 4), (4, 32, 64, 1, 1))
    ]
    x = torch.randn(6, 32 * 64, dtype=torch.float64, requires_grad=True)
    gradients = []
    for least in (1, 10**9):
        monkeypatch.setattr(contract_module, "LARGE_ENTRIES", least)
        y = contract(cores, x)
        gradients.append(torch.autograd.grad(y.pow(2).sum(), (x, *cores)))
    for own, usual in zip(*gradients, strict=True):
        torch.testing.assert_close(own, usual)
