"""Least-squares sweeps against plain NumPy float64: the error they lower, and the optima they are known to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oracles import weight_in_numpy
from torch import Tensor

from ttcompress.tt import fit, whiten
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.fit import Objective, fit_cores, output_error
from ttcompress.tt.shapes import Tensorization, feasible_ranks, tensorize_shape
from ttcompress.tt.whiten import Moments

Full = NDArray[np.float64]
Case = tuple[str, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]

LINEAR: list[Case] = [
    ("matrix", (8, 12), (2, 4), (3, 4)),
    ("matrix", (12, 8), (2, 2, 3), (2, 2, 2)),
    ("matrix", (2, 3), None, None),
    ("lowrank", (6, 9), None, None),
]
PADDED: list[Case] = [("matrix", (7, 11), (2, 4), (3, 4)), ("matrix", (5, 7, 1, 3), (2, 3), (2, 4))]
UNPADDED: list[Case] = [
    *LINEAR,
    ("matrix", (4, 4, 3, 2), (2, 2), (2, 2)),
    ("chain", (4, 3, 3, 2), None, None),
    ("naive", (4, 3, 2, 3), None, None),
    ("lowrank", (5, 3, 2, 2), None, None),
]
CASES = [*UNPADDED, *PADDED]
cases = pytest.mark.parametrize("case", CASES, ids=str)
unpadded = pytest.mark.parametrize("case", UNPADDED, ids=str)
weighted_or_not = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
SEEDS = st.integers(0, 2**31)
ENOUGH = 1000


def normal(seed: int, *shape: int) -> Full:
    return np.random.default_rng(seed).standard_normal(shape)


def moments(
    x: Full, t: Full | None = None, sketch: bool = False, dtype: torch.dtype = torch.float64
) -> Moments:
    with pytest.MonkeyPatch.context() as patch:
        if sketch:
            patch.setattr(whiten, "MATRIX_LIMIT", 0)
        made = Moments(len(x), t is not None)
        made.add(torch.tensor(x, dtype=dtype), None if t is None else torch.tensor(t, dtype=dtype))
    return made


class Layer:
    """A weight W, samples x of its inputs in the dense network and y in the compressed one, gradients g."""

    def __init__(
        self, case: Case, seed: int, count: int = 0, moved: float = 0.3, weighted: bool = True
    ) -> None:
        self.shape = case[1]
        self.tensorization: Tensorization = tensorize_shape(*case)
        self.weight = normal(seed, *self.shape)
        size, outs = prod(self.shape[1:]), self.shape[0]
        spread = np.eye(size) + 0.5 * normal(seed + 1, size, size) / np.sqrt(size)
        self.x = spread @ normal(seed + 2, size, count or 3 * size)
        self.y = self.x + moved * normal(seed + 3, *self.x.shape)
        self.g = normal(seed + 4, outs, 3 * outs) if weighted else np.eye(outs) * np.sqrt(outs)
        self.weighted = weighted

    @property
    def flat(self) -> Full:
        return self.weight.reshape(len(self.weight), -1)

    @property
    def metric(self) -> Full:
        return np.asarray(self.g @ self.g.T / self.g.shape[1])

    @property
    def ridge(self) -> float:
        return fit.RIDGE * float(np.square(self.y).mean())

    def objective(self) -> Objective:
        return output_error(
            torch.tensor(self.weight), moments(self.y, self.x), moments(self.g) if self.weighted else None
        )

    def error(self, flat: Full) -> float:
        """The oracle: E||W x - B y||^2_G / 2 + lam / 2 ||W - B||^2_G, sample by sample."""
        outputs = self.g.T @ (self.flat @ self.x - flat @ self.y)
        weights = self.g.T @ (self.flat - flat)
        ridge = self.ridge * np.square(weights).sum()
        return float((np.square(outputs).sum() / self.x.shape[1] + ridge) / 2 / self.g.shape[1])

    @property
    def constant(self) -> float:
        """What f leaves out: the error of the zero weight."""
        return self.error(np.zeros_like(self.flat))

    def best(self) -> Full:
        """(W (S_xy + lam I)) (S_yy + lam I)^-1, for any metric."""
        lam, count = self.ridge * np.eye(len(self.y)), self.y.shape[1]
        right = self.flat @ (self.x @ self.y.T / count + lam)
        return np.asarray(np.linalg.solve(self.y @ self.y.T / count + lam, right.T).T)

    def random_cores(self, seed: int, cap: int | None = None) -> list[Tensor]:
        caps = [cap or 10**6] * (len(self.tensorization.modes) + 1)
        ranks = feasible_ranks(self.tensorization.sizes, caps)
        shapes = self.tensorization.core_shapes(ranks)
        return [torch.tensor(normal(seed + k, *shape)) / 2 for k, shape in enumerate(shapes)]


def dense(cores: Sequence[Tensor], shape: Sequence[int]) -> Full:
    """The weight (out, in kh kw) that the cores stand for."""
    return weight_in_numpy(cores, shape).reshape(shape[0], -1)


def never_rises(values: Sequence[float], slack: float = 1e-9) -> bool:
    scale = max(map(abs, values))
    return all(after <= before + slack * scale for before, after in pairwise(values))


# ----------------------------------------------------------------------------------------------------------- objective


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    cap=st.integers(1, 4),
    count=st.integers(1, 30),
    weighted=st.booleans(),
    seed=SEEDS,
)
def test_the_objective_is_the_regularised_error_over_the_samples(
    case: Case, cap: int, count: int, weighted: bool, seed: int
) -> None:
    layer = Layer(case, seed, count, weighted=weighted)
    cores = layer.random_cores(seed, cap)
    value, expected = layer.objective().value(cores), layer.error(dense(cores, layer.shape))
    assert value + layer.constant == pytest.approx(
        expected, rel=1e-9, abs=1e-11 * (abs(value) + layer.constant)
    )


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(LINEAR), cap=st.integers(1, 4), count=st.integers(1, 30), seed=SEEDS)
def test_rows_have_the_same_objective_as_matrices(case: Case, cap: int, count: int, seed: int) -> None:
    layer = Layer(case, seed, count, weighted=False)
    weight, cores = torch.tensor(layer.weight), layer.random_cores(seed, cap)
    rows, matrix = (output_error(weight, moments(layer.y, layer.x, sketch)) for sketch in (True, False))
    for name in ("quadratic", "linear"):
        found, expected = (float(getattr(each, name)(cores)) for each in (rows, matrix))
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-11 * layer.constant)


@pytest.mark.parametrize("sketch", [False, True])
def test_it_is_homogeneous_in_every_core(sketch: bool) -> None:
    layer = Layer(("matrix", (12, 8), (2, 2, 3), (2, 2, 2)), 0)
    objective = output_error(torch.tensor(layer.weight), moments(layer.y, layer.x, sketch))
    cores = layer.random_cores(1, 3)
    for k in range(len(cores)):
        scaled = [-3 * core if k == j else core for j, core in enumerate(cores)]
        assert float(objective.quadratic(scaled)) == pytest.approx(
            9 * float(objective.quadratic(cores)), rel=1e-12
        )
        assert float(objective.linear(scaled)) == pytest.approx(
            -3 * float(objective.linear(cores)), rel=1e-12
        )


def test_gradients_of_outputs_that_are_rows_count_alike() -> None:
    layer = Layer(LINEAR[0], 0)
    weight, pairs, cores = torch.tensor(layer.weight), moments(layer.y, layer.x), layer.random_cores(1)
    rows = output_error(weight, pairs, moments(layer.g, sketch=True))
    assert rows.value(cores) == output_error(weight, pairs).value(cores)


# --------------------------------------------------------------------------------------------------------- every sweep


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES),
    cap=st.integers(1, 4),
    count=st.integers(1, 40),
    weighted=st.booleans(),
    sweeps=st.integers(0, 3),
    steps=st.sampled_from([1, 4, 12]),
    seed=SEEDS,
)
def test_no_sweep_raises_the_error_or_changes_the_shapes(
    case: Case, cap: int, count: int, weighted: bool, sweeps: int, steps: int, seed: int
) -> None:
    layer = Layer(case, seed, count, weighted=weighted)
    objective = replace(layer.objective(), steps=steps)
    cores = layer.random_cores(seed, cap)
    before = [core.clone() for core in cores]
    fitted, values = fit_cores(cores, objective, sweeps)
    assert len(values) == sweeps + 1
    assert never_rises(values)
    assert [core.shape for core in fitted] == [core.shape for core in cores]
    assert all(torch.equal(core, copy) for core, copy in zip(cores, before, strict=True))
    for value, each in ((values[0], cores), (values[-1], fitted)):
        expected = layer.error(dense(each, layer.shape))
        assert value + layer.constant == pytest.approx(
            expected, rel=1e-8, abs=1e-10 * (abs(value) + layer.constant)
        )


@settings(max_examples=20, deadline=None)
@given(
    case=st.sampled_from([*LINEAR, PADDED[0]]),
    cap=st.integers(1, 4),
    count=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=SEEDS,
)
def test_no_sweep_on_rows_raises_the_error(
    case: Case, cap: int, count: int, dtype: torch.dtype, seed: int
) -> None:
    layer = Layer(case, seed, count)
    weight = torch.tensor(layer.weight).to(dtype)
    objective = output_error(weight, moments(layer.y, layer.x, sketch=True, dtype=dtype))
    cores = layer.random_cores(seed, cap)
    fitted, values = fit_cores(cores, objective, 3)
    assert never_rises(values, 1e-9 if dtype == torch.float64 else 1e-5)
    assert values[-1] < values[0]
    assert {core.dtype for core in fitted} == {torch.float64}
    assert [core.shape for core in fitted] == [core.shape for core in cores]


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cores_of_any_type_are_fitted_in_float64(case: Case, dtype: torch.dtype) -> None:
    layer = Layer(case, 0)
    narrow = [core.to(dtype) for core in layer.random_cores(1, 2)]
    fitted, values = fit_cores(narrow, layer.objective(), 1)
    wide, others = fit_cores([core.double() for core in narrow], layer.objective(), 1)
    assert {core.dtype for core in fitted} == {torch.float64}
    assert values == others
    assert all(torch.equal(one, other) for one, other in zip(fitted, wide, strict=True))


# ------------------------------------------------------------------------------------------------------ known optima


@unpadded
@weighted_or_not
@pytest.mark.parametrize("start", ["random", "zeros", "the weight"])
def test_full_rank_reaches_the_least_squares_optimum(case: Case, weighted: bool, start: str) -> None:
    """One sweep is enough: between full orthogonal neighbours one core stands for the whole weight."""
    layer = Layer(case, 3, weighted=weighted)
    cores = layer.random_cores(4)
    if start == "zeros":
        cores = [torch.zeros_like(core) for core in cores]
    elif start == "the weight":
        cores = list(decompose_weight(torch.tensor(layer.weight), layer.tensorization).cores)
    fitted, values = fit_cores(cores, replace(layer.objective(), steps=ENOUGH), 1)
    best = layer.best()
    assert layer.error(best) < 0.9 * layer.error(layer.flat)
    assert values[-1] + layer.constant == pytest.approx(layer.error(best), rel=1e-8)
    np.testing.assert_allclose(dense(fitted, layer.shape), best, atol=1e-5)


@unpadded
@pytest.mark.parametrize("ridge", [0.0, 10.0])
def test_the_ridge_does_not_shrink_the_weight(
    case: Case, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same inputs in both networks the weight itself is best, however strong the ridge."""
    monkeypatch.setattr(fit, "RIDGE", ridge)
    layer = Layer(case, 5, moved=0.0)
    fitted, values = fit_cores(layer.random_cores(6), replace(layer.objective(), steps=ENOUGH), 1)
    assert values[-1] == pytest.approx(-layer.constant, rel=1e-9)
    np.testing.assert_allclose(dense(fitted, layer.shape), layer.flat, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    case=st.sampled_from([case for case in CASES if case[0] == "lowrank"]),
    rank=st.integers(1, 4),
    weighted=st.booleans(),
    moved=st.sampled_from([0.0, 0.5]),
    start=st.sampled_from(["random", "zeros"]),
    seed=SEEDS,
)
def test_two_modes_reach_reduced_rank_regression(
    case: Case, rank: int, weighted: bool, moved: float, start: str, seed: int
) -> None:
    """The optimum is the unrestricted one, truncated by an SVD in the metric of outputs and (regularised) inputs."""
    layer = Layer(case, seed, moved=moved, weighted=weighted)
    second = layer.y @ layer.y.T / layer.y.shape[1] + layer.ridge * np.eye(len(layer.y))
    left, right = np.linalg.cholesky(layer.metric).T, np.linalg.cholesky(second)
    # The weight gets a spectrum that halves from one value to the next: how fast sweeps converge hangs on it.
    u, _, v = np.linalg.svd(left @ layer.best() @ right, full_matrices=False)
    wanted = np.linalg.solve(left, u * 0.5 ** np.arange(u.shape[1]) @ v) @ np.linalg.inv(right)
    crossed = layer.x @ layer.y.T / layer.y.shape[1] + layer.ridge * np.eye(len(layer.y))
    layer.weight = (wanted @ second @ np.linalg.inv(crossed)).reshape(layer.shape)
    values = np.linalg.svd(left @ layer.best() @ right, compute_uv=False)
    least = layer.error(layer.best()) + np.square(values[rank:]).sum() / 2
    cores = [core if start == "random" else 0 * core for core in layer.random_cores(seed + 9, rank)]
    fitted, found = fit_cores(cores, replace(layer.objective(), steps=30), 10)
    assert found[-1] + layer.constant == pytest.approx(least, rel=1e-6, abs=1e-9 * layer.constant)
    assert np.linalg.matrix_rank(dense(fitted, layer.shape)) <= rank


@pytest.mark.parametrize("case", LINEAR, ids=str)
@pytest.mark.parametrize("start", ["random", "zeros"])
def test_full_rank_on_rows_reaches_the_optimum(case: Case, start: str) -> None:
    layer = Layer(case, 7, weighted=False)
    objective = output_error(torch.tensor(layer.weight), moments(layer.y, layer.x, sketch=True))
    cores = [core if start == "random" else 0 * core for core in layer.random_cores(8)]
    fitted, _ = fit_cores(cores, replace(objective, steps=ENOUGH), 1)
    np.testing.assert_allclose(dense(fitted, layer.shape), layer.best(), atol=1e-5)


# --------------------------------------------------------------------------------------------------- degenerate cases


@cases
@pytest.mark.parametrize("start", ["random", "zeros"])
def test_one_image_leaves_most_directions_open(case: Case, start: str) -> None:
    layer = Layer(case, 9, count=1)
    cores = [core if start == "random" else 0 * core for core in layer.random_cores(10, 2)]
    fitted, values = fit_cores(cores, layer.objective(), 3)
    assert all(bool(core.isfinite().all()) for core in fitted)
    assert never_rises(values)
    assert values[-1] < -0.5 * layer.constant
    assert values[-1] + layer.constant == pytest.approx(
        layer.error(dense(fitted, layer.shape)), abs=1e-10 * layer.constant
    )


@pytest.mark.parametrize(
    ("case", "sketch"), [*((case, False) for case in CASES), *((case, True) for case in LINEAR)], ids=str
)
def test_inputs_that_are_always_zero_leave_the_weight_as_it_is(case: Case, sketch: bool) -> None:
    layer = Layer(case, 11)
    zeros = moments(0 * layer.x, 0 * layer.x, sketch)
    cores = layer.random_cores(12, 2)
    fitted, values = fit_cores(cores, output_error(torch.tensor(layer.weight), zeros), 2)
    assert values == [0, 0, 0]
    np.testing.assert_allclose(dense(fitted, layer.shape), dense(cores, layer.shape), atol=1e-12)
