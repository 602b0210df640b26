"""Confidence intervals against tables, defining equations, SciPy, and the shares of draws that they cover."""

from __future__ import annotations

from math import comb, inf, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr

from ttcompress.measure.intervals import (
    Z,
    correlation_interval,
    interval_around,
    paired_interval,
    spearman,
    spearman_influences,
    wilson_interval,
)
from ttcompress.measure.perplexity import Surprise

VALUES = st.lists(st.integers(0, 4), min_size=3, max_size=30)


# Newcombe 1998, table I, Wilson score method without continuity correction, to the four digits printed there.
@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilson_interval_against_newcombe_1998(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=0.006)


@given(n=st.integers(1, 10**6), share=st.floats(0, 1))
def test_wilson_interval_bounds_solve_its_defining_equation(n: int, share: float) -> None:
    """Both bounds p0 satisfy |p - p0| = z sqrt(p0 (1 - p0) / n): the score test that the interval inverts."""
    right = round(share * n)
    low, high = wilson_interval(right, n)
    assert 0 <= low <= 100 * (right / n) <= high <= 100
    for bound in (low / 100, high / 100):
        assert abs(right / n - bound) == pytest.approx(
            1.959964 * sqrt(max(0, bound * (1 - bound)) / n), abs=1e-6
        )


def test_published_resnet20_interval() -> None:
    """91.73 % of 10,000, from p +- z sqrt(p (1 - p) / n), which at this n differs in the third digit only."""
    half = 100 * 1.96 * sqrt(0.9173 * 0.0827 / 10_000)
    assert wilson_interval(9173, 10_000) == pytest.approx((91.73 - half, 91.73 + half), abs=0.02)


@pytest.mark.parametrize(("lose", "win"), [(0.0, 0.0), (0.02, 0.01), (0.1, 0.1), (0.3, 0.02)])
@pytest.mark.parametrize("n", [20, 100])
def test_paired_interval_covers_the_true_fall(lose: float, win: float, n: int) -> None:
    """Over all outcomes, each with its multinomial probability: at least 94 % hold the fall of the population."""
    covered = 0.0
    for lost in range(n + 1):
        for won in range(n + 1 - lost):
            low, high = paired_interval(lost, won, n)
            assert low <= 100 * (lost - won) / n <= high
            ways = comb(n, lost) * comb(n - lost, won)
            probability = ways * lose**lost * win**won * (1 - lose - win) ** (n - lost - won)
            covered += probability * (low <= 100 * (lose - win) <= high)
    assert covered >= 0.94


@given(
    lost=st.integers(0, 3000),
    won=st.integers(0, 3000),
    agreed=st.integers(1, 10**6),
)
def test_paired_interval_is_mirrored_and_within_100(lost: int, won: int, agreed: int) -> None:
    n = lost + won + agreed
    low, high = paired_interval(lost, won, n)
    assert -100 <= low <= high <= 100
    assert paired_interval(won, lost, n) == pytest.approx((-high, -low))


def test_paired_interval_of_many_inputs_is_that_of_the_mean_of_their_changes() -> None:
    changes = np.repeat([1.0, -1.0, 0.0], [300, 100, 9600])
    low, high = interval_around(2.0, 100 * changes) or (inf, -inf)
    assert paired_interval(300, 100, 10_000) == pytest.approx((low, high), abs=0.02)


def test_z_holds_95_percent() -> None:
    assert pytest.approx(norm.ppf(0.975), abs=1e-12) == Z


def test_no_interval_of_one_input_or_beyond_all_numbers() -> None:
    assert interval_around(1.0, [3.0]) is None
    assert interval_around(inf, [1.0, 2.0]) is None
    assert interval_around(1.0, [1e308, -1e308]) is None


@given(VALUES, st.randoms(use_true_random=False))
def test_spearman_is_that_of_scipy(values: list[int], random: Any) -> None:
    other = values[:]
    random.shuffle(other)
    wanted = spearmanr(values, other).statistic if len(set(values)) > 1 else 0.0
    assert spearman(values, other) == pytest.approx(wanted)
    low, high = correlation_interval(spearman(values, other), len(values))
    assert low <= spearman(values, other) <= high


@pytest.mark.parametrize("levels", [5, 10**9])
def test_influences_are_what_a_heavier_pair_does(levels: int) -> None:
    """With and without ties: the derivative by the weight of a pair, here that of a copy among thirty of all pairs."""
    random = np.random.default_rng(0)
    x = random.integers(0, levels, 60)
    y = (x + random.normal(size=60) * levels / 3).round()
    influences = spearman_influences(x, y)
    assert influences.sum() == pytest.approx(0, abs=1e-9)
    copies = 200
    for place in range(0, 60, 7):
        heavier = [np.append(np.tile(each, copies), each[place]) for each in (x, y)]
        moved = (spearman(*heavier) - spearman(x, y)) * (60 * copies + 1)
        assert moved == pytest.approx(influences[place], abs=2e-3)


def test_nothing_moves_a_correlation_with_equal_values() -> None:
    assert spearman_influences([1, 1, 1], [1, 2, 3]).tolist() == [0, 0, 0]


def test_loss_of_correlation_is_covered() -> None:
    """Of two noisy copies of scores, drawn 400 times: the interval holds the fall of a million pairs in 92 to 98 %."""
    random = np.random.default_rng(0)

    def drawn(n: int) -> list[Any]:
        scores = random.normal(size=n)
        dense = scores + 0.5 * random.normal(size=n)
        return [scores.round(1), dense, dense + 0.15 * random.normal(size=n)]

    scores, dense, compressed = drawn(10**6)
    truth = spearman(dense, scores) - spearman(compressed, scores)
    covered = widths = 0.0
    for _ in range(400):
        scores, dense, compressed = drawn(200)
        fall = spearman(dense, scores) - spearman(compressed, scores)
        influences = spearman_influences(dense, scores) - spearman_influences(compressed, scores)
        low, high = interval_around(fall, influences) or (inf, -inf)
        covered += (low <= truth <= high) / 400
        widths += (high - low) / 400
    assert 0.92 <= covered <= 0.98
    low, high = correlation_interval(spearman(dense, scores), 200)
    assert widths < (high - low) / 2


def test_rise_of_perplexity_is_covered() -> None:
    """Samples of unequal lengths, surprises that hang together: drawn 400 times, 92 to 98 % hold the true rise."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> tuple[Surprise, Surprise]:
        counts = torch.randint(5, 40, (n,), generator=generator).double()
        means = 2 + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        rises = 0.1 + 0.05 * torch.randn(n, generator=generator, dtype=torch.float64)
        return Surprise(means * counts, counts), Surprise((means + rises) * counts, counts)

    dense, compressed = drawn(10**6)
    truth = compressed.perplexity - dense.perplexity
    covered = 0.0
    for _ in range(400):
        dense, compressed = drawn(100)
        low, high = compressed.rise_interval(dense) or (inf, -inf)
        assert low < compressed.perplexity - dense.perplexity < high
        covered += (low <= truth <= high) / 400
    assert 0.92 <= covered <= 0.98


def test_a_text_of_one_sample_has_no_interval() -> None:
    one = Surprise(torch.tensor([3.0]), torch.tensor([2.0]))
    assert one.rise_interval(one) is None
    assert one.interval[0] == 0
