"""Modes of dimensions so large that their factors are not searched for."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest

from ttcompress.tt.shapes import LARGEST_SEARCHED, auto_modes


@pytest.mark.parametrize("dim", [LARGEST_SEARCHED + 1, 10**9 + 7, 2**40 + 15, 10**15 + 37, 2**61 - 1])
def test_large_dimensions_have_even_factors_at_once(dim: int) -> None:
    outs = sorted(m for m, _ in auto_modes(dim, 6))
    assert dim <= prod(outs) < 2 * dim
    assert outs[-1] - outs[0] <= 1
    # One less somewhere would not do.
    assert (outs[-1] - 1) * prod(outs[:-1]) < dim
    assert all(b - a <= 1 for a, b in pairwise(outs))
