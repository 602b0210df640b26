"""The TT algebra as it is handed on: its names, the examples of docstrings and page, and a whole expression."""

from __future__ import annotations

import doctest
import subprocess
import sys
from importlib import import_module
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ttcompress import tt

PAGE = Path(tt.__file__).parents[2] / "docs" / "algebra.md"
RECORDS = {"Mode", "TTSVD"}
"""Names that raise nothing: plain records."""


def test_the_page_runs_as_it_stands() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted >= 20
    assert result.failed == 0


def test_the_page_has_every_operation() -> None:
    page = PAGE.read_text()
    operations = set(tt.__all__) & set(vars(import_module("ttcompress.tt.arithmetic")))
    operations -= {"left_orthogonalize", "right_orthogonalize", "Mode"}
    assert len(operations) == 12
    assert {name for name in operations if f"tt.{name}(" not in page} == set()


@pytest.mark.parametrize("name", sorted(tt.__all__))
def test_every_name_has_an_example_that_runs(name: str) -> None:
    handed_on = getattr(tt, name)
    home = import_module(handed_on.__module__)
    (example, *_) = doctest.DocTestFinder(recurse=False).find(handed_on, name, globs=dict(vars(home)))
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", sorted(set(tt.__all__) - RECORDS))
def test_every_name_has_its_source_and_what_it_raises(name: str) -> None:
    text = getattr(tt, name).__doc__
    assert "et al" in text or "Oseledets 2011" in text
    assert name == "feasible_ranks" or "Raises:" in text


def test_names_are_listed_and_no_others_resolve() -> None:
    assert dir(tt) == sorted(tt.__all__)
    assert tt.norm is import_module("ttcompress.tt.arithmetic").norm
    with pytest.raises(AttributeError, match=r"'ttcompress\.tt' has no attribute 'no_such_name'"):
        _ = tt.no_such_name


def test_the_package_and_its_integers_come_without_torch() -> None:
    code = (
        "import sys; from ttcompress import tt; dir(tt); tt.tensorize_shape('chain', (4, 3, 3, 3));"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "False"]


@st.composite
def matrices_and_vector(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Two TT-matrices of the same modes, float64, and a vector that they take."""
    count = draw(st.integers(1, 4))
    modes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=count, max_size=count))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inner_ranks = st.lists(st.integers(1, 3), min_size=count - 1, max_size=count - 1)

    def cores() -> list[Tensor]:
        ranks = [1, *draw(inner_ranks), 1]
        return [
            torch.tensor(rng.standard_normal((ranks[k], m, n, ranks[k + 1])))
            for k, (m, n) in enumerate(modes)
        ]

    return cores(), cores(), torch.tensor(rng.standard_normal(prod(n for _, n in modes)))


def full_matrix(cores: list[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The oracle, in NumPy: the matrix of cores (r_{k-1}, m_k, n_k, r_k)."""
    whole = np.ones((1, 1, 1))
    for core in cores:
        whole = np.einsum("mna,aijb->minjb", whole, core.numpy())
        m, i, n, j, b = whole.shape
        whole = whole.reshape(m * i, n * j, b)
    return whole[..., 0]


@settings(max_examples=60, deadline=None)
@given(case=matrices_and_vector(), factor=st.floats(-3, 3), constant=st.floats(-3, 3))
def test_a_whole_expression_is_that_of_the_full_matrices(
    case: tuple[list[Tensor], list[Tensor], Tensor], factor: float, constant: float
) -> None:
    a, b, x = case
    exact_a, exact_b = full_matrix(a), full_matrix(b)
    exact = (factor * exact_a + constant) * exact_b - exact_a
    size = max(1.0, float(np.linalg.norm(exact_a))) * max(1.0, float(np.linalg.norm(exact_b))) * 10

    result = tt.add(tt.multiply(tt.add_constant(tt.scale(a, factor), constant), b), tt.scale(a, -1))
    rounded = tt.round_tt(result)

    np.testing.assert_allclose(tt.to_matrix(rounded).numpy(), exact, atol=1e-11 * size)
    np.testing.assert_allclose(tt.matvec(rounded, x), exact @ x.numpy(), atol=1e-11 * size * float(x.norm()))
    assert tt.norm(rounded) == pytest.approx(np.linalg.norm(exact), abs=1e-11 * size)
    assert tt.total(result) == pytest.approx(exact.sum(), abs=1e-10 * size)
    assert tt.inner(result, b) == pytest.approx((exact * exact_b).sum(), abs=1e-10 * size**2)
