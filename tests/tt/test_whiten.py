"""Moments, the metric they make and TT-SVD in it, against plain NumPy float64 on explicit samples."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from math import prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from ttcompress.tt import whiten
from ttcompress.tt.decompose import decompose_weight, tensorize
from ttcompress.tt.fit import output_error
from ttcompress.tt.shapes import Tensorization, tensorize_shape
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import ModeMetric, Moments, mode_metrics, output_cost, whitened, whitened_svd

Full = NDArray[np.float64]
Case = tuple[str, tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]

CASES: list[Case] = [
    ("matrix", (8, 12), (2, 4), (3, 4)),
    ("matrix", (12, 8), (2, 2, 3), (2, 2, 2)),
    ("matrix", (7, 11), (2, 4), (3, 4)),
    ("matrix", (17, 19), None, None),
    ("matrix", (2, 3), None, None),
    ("matrix", (4, 6, 3, 2), (2, 2), (2, 3)),
    ("matrix", (5, 7, 2, 3), (2, 3), (2, 4)),
    ("chain", (7, 5, 3, 2), None, None),
    ("naive", (7, 5, 3, 2), None, None),
    ("naive", (6, 5, 1, 3), None, None),
    ("lowrank", (7, 5, 3, 2), None, None),
    ("lowrank", (7, 9), None, None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Full:
    return np.random.default_rng(seed).standard_normal(shape)


def moments(
    x: Full, t: Full | None = None, batches: Sequence[tuple[int, float]] = (), sketch: int = 0, seed: int = 0
) -> Moments:
    """Moments of the columns of x and t in batches of (columns, weight); with `sketch` rows rather than a matrix."""
    with pytest.MonkeyPatch.context() as patch:
        if sketch:
            patch.setattr(whiten, "MATRIX_LIMIT", 0)
            patch.setattr(whiten, "SKETCH_ROWS", sketch)
        made, start = Moments(len(x), t is not None, seed), 0
        for count, weight in batches or [(x.shape[1], 1.0)]:
            part = slice(start, start + count)
            made.add(torch.tensor(x[:, part]), None if t is None else torch.tensor(t[:, part]), weight)
            start += count
    return made


def averaged(left: Full, right: Full, batches: Sequence[tuple[int, float]]) -> Full:
    """The oracle: sum_b weight_b mean over batch b of left right^T, over all weights."""
    each = np.repeat([weight / count for count, weight in batches], [count for count, _ in batches])
    return np.asarray(np.einsum("ic,jc,c->ij", left, right, each) / sum(weight for _, weight in batches))


def moments_with(second: Full, sketch: int = 0) -> Moments:
    """Moments whose E[x x^T] is this matrix."""
    values, vectors = np.linalg.eigh(second)
    return moments(vectors * np.sqrt(values.clip(min=0) * len(second)), sketch=sketch)


def cost_in_numpy(difference: Full, inputs: Full, outputs: Full) -> float:
    """trace(G D S D^T)."""
    flat = difference.reshape(len(difference), -1)
    return float(np.einsum("oi,ij,pj,op->", flat, inputs, flat, outputs))


def second(samples: Full) -> Full:
    return np.asarray(samples @ samples.T / samples.shape[1])


def full(cores: Sequence[Tensor]) -> Full:
    """Cores multiplied out to the d-way tensor (s_1, ..., s_d), padding and all."""
    out: Full = np.ones(1)
    for core in cores:
        array = core.double().numpy()
        out = np.tensordot(out, array.reshape(len(array), -1, array.shape[-1]), axes=1)
    return out[..., 0]


def matrix(factor: Tensor) -> Full:
    """A factor of a metric, which is a vector where it is diagonal."""
    return np.asarray(factor.diag().numpy() if factor.dim() == 1 else factor.numpy())


def in_metric(tensor: Full, metrics: Sequence[ModeMetric]) -> Full:
    """Every mode of a d-way tensor multiplied by the Kronecker product of both factors of its metric."""
    for k, metric in enumerate(metrics):
        whole = np.kron(matrix(metric.out), matrix(metric.inp))
        tensor = np.moveaxis(np.tensordot(whole, tensor, axes=(1, k)), 0, k)
    return tensor


def weight_case(case: Case, seed: int = 0) -> tuple[Tensor, Tensorization]:
    return torch.tensor(normal(seed, *case[1])), tensorize_shape(*case)


def layer_moments(shape: Sequence[int], seed: int, count: int = 0) -> tuple[Moments, Moments]:
    """Of inputs and outputs of a weight of this shape, with entries of different sizes that go together."""
    made = []
    for size in (prod(shape[1:]), shape[0]):
        spread = np.diag(np.exp(normal(seed, size))) + 0.5 * normal(seed + 1, size, size)
        made.append(moments(spread @ normal(seed + 2, size, count or 2 * size)))
    return made[0], made[1]


# ------------------------------------------------------------------------------------------------------------- moments

BATCHES = st.lists(st.tuples(st.integers(1, 5), st.floats(0.1, 10)), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(batches=BATCHES, size=st.integers(1, 5), sketch=st.sampled_from([0, 20]), seed=SEEDS)
def test_moments_are_weighted_means_over_batches(
    batches: list[tuple[int, float]], size: int, sketch: int, seed: int
) -> None:
    """A sketch has the same products: exactly, for the at most 20 columns have a row each, and in pairs."""
    count = sum(columns for columns, _ in batches)
    x, t, one = normal(seed, size, count) + 0.3, normal(seed + 1, size, count) - 0.7, np.ones((1, count))
    pairs = moments(x, t, batches, sketch)
    own, crossed = pairs.own.numpy(), pairs.crossed.numpy()
    if sketch:
        own, crossed = own.T @ own, crossed.T @ own
    np.testing.assert_allclose(own, averaged(x, x, batches), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(crossed, averaged(t, x, batches), rtol=1e-11, atol=1e-13)
    for mean, samples in zip(pairs.means, (x, t), strict=True):
        np.testing.assert_allclose(
            mean.numpy(), averaged(samples, one, batches)[:, 0], rtol=1e-11, atol=1e-13
        )


@pytest.mark.parametrize("sketch", [0, 4, 20])
def test_without_partners_vectors_are_their_own(sketch: int) -> None:
    x = normal(0, 3, 10)
    alone, paired = moments(x, sketch=sketch), moments(x, x, sketch=sketch)
    assert torch.equal(alone.crossed, alone.own)
    assert torch.equal(alone.means[1], alone.means[0])
    for one, other in zip((alone.own, *alone.means), (paired.crossed, *paired.means), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0.0)


def test_float32_batches_add_up_in_float64() -> None:
    """In float32 the thousand ones would be lost beside 2^24."""
    made = Moments(1)
    for value in (4096.0, *[1.0] * 1000):
        made.add(torch.tensor([[value]]))
    assert made.own.dtype == torch.float64
    assert float(made.own) == pytest.approx((4096.0**2 + 1000) / 1001, rel=1e-13)


@pytest.mark.parametrize("sketch", [0, 20])
def test_moments_share_no_storage_with_the_vectors(sketch: int) -> None:
    x = normal(0, 3, 10)
    vectors = torch.tensor(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whiten, "MATRIX_LIMIT", 0 if sketch else 3)
        made = Moments(3)
        made.add(vectors)
    for view in (vectors, made.own, *made.means):
        view.fill_(9.0)
    own = made.own.numpy()
    np.testing.assert_allclose(own.T @ own if sketch else own, second(x), rtol=1e-12)
    np.testing.assert_allclose(made.means[0].numpy(), x.mean(1), rtol=1e-12)


def test_of_pairs_one_product_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of wide layers each takes much memory."""
    alive = weakref.WeakSet[Tensor]()
    most = []

    def watched(vectors: Sequence[Tensor], share: float) -> Iterator[Tensor]:
        for part in products(vectors, share):
            alive.add(part)
            most.append(len(alive))
            yield part
            del part

    moments = Moments(6, paired=True)
    moments.add(torch.ones(6, 3), torch.ones(6, 3))
    products = whiten._products
    monkeypatch.setattr(whiten, "_products", watched)
    moments.add(torch.ones(6, 3), 2 * torch.ones(6, 3))
    assert most == [1, 1]
    assert torch.equal(moments.crossed, torch.full((6, 6), 1.5).double())


@pytest.mark.parametrize(
    "batches", [[(11, 1.0)], [(2, 1.0), (5, 3.0), (4, 0.5)]], ids=["one batch", "batches"]
)
def test_a_sketch_is_unbiased_when_its_rows_are_used_up(batches: list[tuple[int, float]]) -> None:
    x, t = normal(0, 3, 11) + 0.5, normal(1, 3, 11)
    own, crossed = [], []
    for seed in range(1000):
        pairs = moments(x, t, batches, sketch=4, seed=seed)
        rows, partners = pairs.own.numpy(), pairs.crossed.numpy()
        own.append(rows.T @ rows)
        crossed.append(partners.T @ rows)
    for found, expected in ((own, averaged(x, x, batches)), (crossed, averaged(t, x, batches))):
        deviation = np.std(found, axis=0) / sqrt(len(found))
        assert deviation.min() > 0
        assert np.all(np.abs(np.mean(found, axis=0) - expected) <= 4.5 * deviation)


def test_a_sketch_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whiten, "MATRIX_LIMIT", 5)
    monkeypatch.setattr(whiten, "SKETCH_ROWS", 8)
    for size, shape in ((5, (5, 5)), (6, (8, 6))):
        pairs = Moments(size, paired=True)
        assert pairs.is_sketch == (size == 6)
        for count in (8, 1, 30, 17):
            x = torch.tensor(normal(count, size, count), dtype=torch.float32)
            pairs.add(x, -x)
            assert pairs.own.shape == pairs.crossed.shape == shape
            assert pairs.own.nbytes + pairs.crossed.nbytes == pairs.num_bytes
            torch.testing.assert_close(pairs.crossed, -pairs.own)


@pytest.mark.parametrize("paired", [False, True])
def test_centred_moments_are_covariances(paired: bool) -> None:
    batches = [(4, 4.0), (9, 9.0)]
    x = normal(0, 4, 13) + 5 * normal(1, 4, 1)
    t = normal(2, 4, 13) + 0.5 * x
    found = moments(x, t if paired else None, batches).centred()
    both = np.cov(t, x, bias=True)
    np.testing.assert_allclose(found.own.numpy(), both[4:, 4:], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        found.crossed.numpy(), both[:4, 4:] if paired else both[4:, 4:], rtol=1e-10, atol=1e-10
    )
    assert not any(mean.any() for mean in found.means)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 6), count=st.integers(1, 8), share=st.floats(0, 1), seed=SEEDS)
def test_blended_moments_keep_trace_and_directions(size: int, count: int, share: float, seed: int) -> None:
    before = moments(normal(seed, size, count))
    after = before.blended(share).own.numpy()
    values = np.linalg.eigvalsh(before.own.numpy())
    np.testing.assert_allclose(after, after.T, atol=1e-14 * values.max())
    np.testing.assert_allclose(
        np.linalg.eigvalsh(after), (1 - share) * values + share * values.mean(), atol=1e-13 * values.max()
    )
    assert np.trace(after) == pytest.approx(values.sum(), rel=1e-12)
    even = before.blended(1.0).own.numpy()
    np.testing.assert_allclose(even, values.mean() * np.eye(size), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 6), share=st.floats(0, 1), seed=SEEDS)
def test_blended_pairs_are_their_own_partners_in_what_is_added(size: int, share: float, seed: int) -> None:
    before = Moments(size, paired=True)
    before.add(torch.tensor(normal(seed, size, 9)), torch.tensor(normal(seed + 1, size, 9)))
    after = before.blended(share)
    np.testing.assert_allclose(
        (after.own - (1 - share) * before.own).numpy(),
        (after.crossed - (1 - share) * before.crossed).numpy(),
        atol=1e-12,
    )
    alone = moments(normal(seed, size, 9))
    np.testing.assert_allclose(after.own.numpy(), alone.blended(share).own.numpy(), atol=1e-12)


@pytest.mark.parametrize("in_memory", [None, 0, 1 << 20])
@pytest.mark.parametrize("paired", [False, True])
def test_what_is_made_of_moments_leaves_them_as_they_are(paired: bool, in_memory: int | None) -> None:
    """They are changed in place on the way; at a weight of one nothing is scaled."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 9, generator=generator)
    moments = Moments(4, paired)
    moments.add(x, t if paired else None, weight=1.0)
    if in_memory is not None:
        moments.lay_aside(Spool(in_memory).lay)
    before = [each.clone() for each in (moments.own, moments.crossed, *moments.means)]

    moments.centred()
    moments.blended(0.3)
    Moments.total([moments, moments])
    output_error(torch.randn(4, 4, generator=generator), moments, moments)
    mode_metrics(tensorize_shape("matrix", (4, 4), (2, 2), (2, 2)), moments, moments)
    assert all(map(torch.equal, before, [moments.own, moments.crossed, *moments.means]))


def test_a_sketch_is_neither_centred_nor_blended() -> None:
    rows = moments(normal(0, 3, 9), sketch=5)
    assert torch.equal(rows.centred().own, rows.own)
    assert torch.equal(rows.blended(0.5).own, rows.own)


# -------------------------------------------------------------------------------------------------------- output error


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(4, 5), (1, 3), (5, 1), (3, 2, 3, 2)]),
    sketch=st.sampled_from([0, 40]),
    count=st.integers(1, 40),
    weighted=st.booleans(),
    seed=SEEDS,
)
def test_output_cost_is_the_mean_over_the_samples(
    shape: tuple[int, ...], sketch: int, count: int, weighted: bool, seed: int
) -> None:
    difference, x, g = (
        normal(seed, *shape),
        normal(seed + 1, prod(shape[1:]), count),
        normal(seed + 2, shape[0], 7),
    )
    missed = difference.reshape(len(difference), -1) @ x
    expected = np.square(g.T @ missed).sum() / 7 / count if weighted else np.square(missed).sum() / count
    found = output_cost(torch.tensor(difference), moments(x, sketch=sketch), moments(g) if weighted else None)
    assert found == pytest.approx(expected, rel=1e-10)
    assert output_cost(torch.zeros(shape), moments(x, sketch=sketch), moments(g)) == 0


# --------------------------------------------------------------------------------------------------------- the metric


def kronecker(dim: int, sizes: Sequence[int], windows: Sequence[int], seed: int) -> Full:
    """A second moment over (dim, window) that is a Kronecker product of one random factor a mode.

    The padding has none: the first mode that can do without leaves out the indices whose blocks have some.
    """
    rng = np.random.default_rng(seed)
    whole: Full = np.ones((1, 1, 1, 1))
    is_padded = prod(sizes) > dim
    for k, (size, window) in enumerate(zip(sizes, windows, strict=True)):
        root = rng.standard_normal((size, window, size * window + 1))
        if is_padded and size > 1:
            root[dim // prod(sizes[k + 1 :]) :] = 0
            is_padded = False
        factor = np.einsum("awc,bvc->awbv", root, root)
        shape = [left * right for left, right in zip(whole.shape, factor.shape, strict=True)]
        whole = np.einsum("awbv,cxdy->acwxbdvy", whole, factor).reshape(shape)
    return whole[:dim, :, :dim].reshape(dim * prod(windows), -1)


@cases
@pytest.mark.parametrize("sketch", [0, 80])
@pytest.mark.parametrize("given_moments", ["inputs", "outputs", "both"])
def test_for_kronecker_moments_squared_norms_are_output_costs(
    case: Case, sketch: int, given_moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whiten, "DAMPING", 0.0)
    weight, tensorization = weight_case(case)
    s = kronecker(case[1][1], tensorization.in_modes, tensorization.window_modes, seed=1)
    g = kronecker(case[1][0], tensorization.out_modes, [1] * len(tensorization.modes), seed=2)
    assert min(np.trace(s), np.trace(g)) > 0
    inputs = moments_with(s, sketch) if given_moments != "outputs" else None
    outputs = moments_with(g, sketch) if given_moments != "inputs" else None
    metrics = mode_metrics(tensorization, inputs, outputs)
    expected = cost_in_numpy(
        weight.numpy(), np.eye(len(s)) if inputs is None else s, np.eye(len(g)) if outputs is None else g
    )
    found = float(whitened(weight, tensorization, metrics).square().sum())
    assert found == pytest.approx(expected, rel=1e-9)
    if inputs is not None:
        alone = None if outputs is None else moments_with(g)
        assert output_cost(weight, inputs, alone) == pytest.approx(expected, rel=1e-9)


@cases
@pytest.mark.parametrize("sketch", [0, 30])
@pytest.mark.parametrize("diagonal", [False, True])
def test_metrics_are_the_damped_partial_traces_of_the_samples(
    case: Case, sketch: int, diagonal: bool
) -> None:
    _, shape, *_ = case
    tensorization = tensorize_shape(*case)
    ins, windows, outs = tensorization.in_modes, tensorization.window_modes, tensorization.out_modes
    x, g = normal(3, prod(shape[1:]), 30), normal(4, shape[0], 20)
    metrics = mode_metrics(tensorization, moments(x, sketch=sketch), moments(g, sketch=sketch), diagonal)
    images = np.zeros((prod(ins), prod(windows), 30))
    images[: shape[1]] = x.reshape(shape[1], -1, 30)
    gradients = np.zeros((prod(outs), 1, 20))
    gradients[: shape[0], 0] = g
    for side, samples, sizes in ((1, images, (*ins, *windows)), (0, gradients, (*outs, *[1] * len(outs)))):
        tensor, count = samples.reshape(*sizes, -1), len(metrics)
        power = np.square(samples).sum() / samples.shape[-1]
        for k, metric in enumerate(metrics):
            flat = np.moveaxis(tensor, (k, count + k), (0, 1)).reshape(sizes[k] * sizes[count + k], -1)
            factor = flat @ flat.T / samples.shape[-1] / (1 if k == 0 else power)
            factor += whiten.DAMPING * np.trace(factor) / len(factor) * np.eye(len(factor))
            root = matrix((metric.out, metric.inp)[side])
            expected = np.diag(factor.diagonal()) if diagonal else factor
            assert np.linalg.svd(root, compute_uv=False).min() > 0
            np.testing.assert_allclose(root.T @ root, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("below", [0.0, -1e-3, -0.4])
def test_a_moment_that_round_off_left_below_zero_has_a_root(below: float) -> None:
    turn = np.linalg.qr(normal(1, 5, 5))[0]
    values = np.array([4.0, 2.0, 1.0, 0.0, below])
    root = whiten._root(torch.from_numpy(turn * values @ turn.T)).numpy()
    damping = whiten.DAMPING * values.mean()
    found = np.linalg.eigvalsh(root.T @ root)
    # Where damping makes up for it, it stays what it is.
    least = below + damping if below + damping > 0 else damping
    np.testing.assert_allclose(found.max(), 4 + damping, rtol=1e-9)
    np.testing.assert_allclose(found.min(), least, rtol=1e-6)


@cases
def test_metrics_of_large_modes_and_of_none_are_diagonal(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorization = tensorize_shape(*case)
    given_moments = layer_moments(case[1], 6)
    full, diagonal = (mode_metrics(tensorization, *given_moments, only) for only in (False, True))
    monkeypatch.setattr(whiten, "MATRIX_LIMIT", 4)
    mixed = mode_metrics(tensorization, *given_moments)
    for mode, found, large, small in zip(tensorization.modes, mixed, diagonal, full, strict=True):
        assert torch.equal(found.out, (large if mode.out > 4 else small).out)
        assert torch.equal(found.inp, (large if mode.inp * mode.window > 4 else small).inp)
        assert large.out.dim() == large.inp.dim() == 1
    for mode, none in zip(tensorization.modes, mode_metrics(tensorization, None, None), strict=True):
        np.testing.assert_array_equal(matrix(none.out), np.eye(mode.out))
        np.testing.assert_array_equal(matrix(none.inp), np.eye(mode.inp * mode.window))


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 4),
    n=st.integers(1, 4),
    w=st.integers(1, 3),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    diagonal=st.tuples(st.booleans(), st.booleans()),
    seed=SEEDS,
)
def test_a_metric_multiplies_by_both_factors_and_its_inverse_undoes_it(
    m: int, n: int, w: int, ranks: tuple[int, int], diagonal: tuple[bool, bool], seed: int
) -> None:
    factors = [torch.tensor(second(normal(seed, size, size + 2)) + 0.1 * np.eye(size)) for size in (m, n * w)]
    metric = ModeMetric(*(f.diagonal() if only else f for f, only in zip(factors, diagonal, strict=True)))
    core = torch.tensor(normal(seed + 1, ranks[0], m, n, w, ranks[1]))
    moved = metric.apply(core)
    flat = core.numpy().reshape(ranks[0], m * n * w, ranks[1])
    expected = np.einsum("st,atb->asb", np.kron(matrix(metric.out), matrix(metric.inp)), flat)
    np.testing.assert_allclose(moved.numpy().reshape(flat.shape), expected, rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(metric.apply(torch.tensor(flat)).numpy(), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(metric.inverse().apply(moved), core, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(metric.squared().apply(core), metric.apply(moved), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- TT-SVD in the metric


@cases
@pytest.mark.parametrize("images", [0, 1, 3], ids=["many images", "one image", "three images"])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_full_rank_reproduces_the_weight_in_any_metric(case: Case, images: int, scale: float) -> None:
    weight, tensorization = weight_case(case)
    metrics = mode_metrics(tensorization, *layer_moments(case[1], 2, images))
    metrics = [ModeMetric(metrics[0].out * scale, metrics[0].inp), *metrics[1:]]
    before = weight.clone()
    cores = whitened_svd(weight, tensorization, tensorization.max_ranks(), metrics)
    assert [tuple(core.shape) for core in cores] == tensorization.core_shapes(tensorization.max_ranks())
    assert {core.dtype for core in cores} == {torch.float64}
    np.testing.assert_allclose(full(cores), tensorize(weight, tensorization).numpy(), atol=1e-10)
    assert torch.equal(weight, before)


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(CASES),
    images=st.integers(1, 40),
    cap=st.integers(1, 6),
    diagonal=st.booleans(),
    seed=SEEDS,
)
def test_the_error_in_the_metric_is_quasi_optimal(
    case: Case, images: int, cap: int, diagonal: bool, seed: int
) -> None:
    """Oseledets 2011, corollary 2.4: at most sqrt(d - 1) times the best, of which plain TT-SVD is no better."""
    weight, tensorization = weight_case(case, seed)
    metrics = mode_metrics(tensorization, *layer_moments(case[1], seed, images), diagonal)
    ranks = tensorization.expand_ranks(cap)
    exact = tensorize(weight, tensorization).numpy()
    plain = decompose_weight(weight, tensorization, ranks)
    cores = whitened_svd(weight, tensorization, ranks, metrics)
    assert [core.shape for core in cores] == [core.shape for core in plain.cores]
    norm = float(np.linalg.norm(in_metric(exact, metrics)))
    np.testing.assert_allclose(
        whitened(weight, tensorization, metrics).numpy(),
        in_metric(exact, metrics),
        rtol=1e-9,
        atol=1e-10 * norm,
    )
    error = np.linalg.norm(in_metric(exact - full(cores), metrics))
    other = np.linalg.norm(in_metric(exact - full(plain.cores), metrics))
    assert error <= sqrt(max(1, len(metrics) - 1)) * other * (1 + 1e-9) + 1e-10 * norm


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(7, 9), (9, 4), (6, 5, 1, 1), (5, 3, 2, 2)]),
    rank=st.integers(1, 5),
    images=st.integers(20, 40),
    seed=SEEDS,
)
def test_two_modes_have_the_least_output_error_of_all_weights_of_the_rank(
    shape: tuple[int, ...], rank: int, images: int, seed: int
) -> None:
    """With `lowrank` the metric is exact but for its damping; without that the error is Eckart and Young's."""
    weight = torch.tensor(normal(seed, *shape))
    tensorization = tensorize_shape("lowrank", shape)
    inputs, outputs = layer_moments(shape, seed + 1, images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whiten, "DAMPING", 0.0)
        cores = whitened_svd(
            weight, tensorization, (1, rank, 1), mode_metrics(tensorization, inputs, outputs)
        )
    plain = decompose_weight(weight, tensorization, (1, rank, 1)).cores
    cost, other = (
        output_cost(weight - torch.tensor(full(each).T.reshape(shape)), inputs, outputs)
        for each in (cores, plain)
    )
    whole = output_cost(weight, inputs, outputs)
    left, right = (np.linalg.cholesky(each.own.numpy()) for each in (outputs, inputs))
    values = np.linalg.svd(left.T @ weight.numpy().reshape(shape[0], -1) @ right, compute_uv=False)
    assert cost <= other * (1 + 1e-9) + 1e-12 * whole
    assert cost == pytest.approx(np.square(values[rank:]).sum(), rel=1e-6, abs=1e-12 * whole)


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_whitened_in_float32(case: Case, dtype: torch.dtype) -> None:
    weight, tensorization = weight_case(case)
    narrow = weight.to(dtype)
    metrics = mode_metrics(tensorization, *layer_moments(case[1], 2))
    assert whitened(narrow, tensorization, metrics).dtype == torch.float32
    ranks = tensorization.max_ranks()
    cores = whitened_svd(narrow, tensorization, ranks, metrics)
    assert {core.dtype for core in cores} == {torch.float64}
    np.testing.assert_allclose(full(cores), tensorize(narrow, tensorization).double().numpy(), atol=1e-4)


@cases
@pytest.mark.parametrize("cap", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_moments_it_is_plain_tt_svd(case: Case, cap: int, dtype: torch.dtype) -> None:
    weight, tensorization = weight_case(case)
    weight = weight.to(dtype)
    metrics = mode_metrics(tensorization, None, None)
    assert torch.equal(whitened(weight, tensorization, metrics), tensorize(weight, tensorization))
    plain = decompose_weight(weight, tensorization, cap).cores
    cores = whitened_svd(weight, tensorization, tensorization.expand_ranks(cap), metrics)
    np.testing.assert_allclose(full(cores), full(plain), atol=1e-12 if dtype == torch.float64 else 1e-5)
