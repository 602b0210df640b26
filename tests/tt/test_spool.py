"""Tensors laid aside come back bit for bit, from memory or from a file."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import Moments

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TYPES)), max_size=8),
    st.integers(0, 300),
)
def test_all_come_back_as_they_were(shapes: list[tuple[list[int], torch.dtype]], in_memory: int) -> None:
    spool = Spool(in_memory)
    tensors = [(torch.randn(shape) * 100).to(dtype) for shape, dtype in shapes]
    fetched = [spool.lay(each) for each in tensors]
    for tensor, fetch in reversed(list(zip(tensors, fetched, strict=True))):
        for _ in range(2):
            found = fetch()
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_views_are_laid_aside_alone() -> None:
    whole = torch.randn(6, 6)
    fetch = Spool(0).lay(whole.T[1:4])
    wanted = whole.T[1:4].clone()
    whole.zero_()
    assert torch.equal(fetch(), wanted)


def test_what_is_beyond_the_limit_takes_no_memory() -> None:
    spool = Spool(100)
    inside, outside = torch.randn(20), torch.randn(20)
    kept, written = spool.lay(inside), spool.lay(outside)
    assert kept() is inside
    assert written() is not outside
    assert os.fstat(spool._file.fileno()).st_size == 80


@pytest.mark.parametrize("kind", ["matrix", "sketch", "diagonal", "paired"])
def test_moments_laid_aside_are_the_same(kind: str) -> None:
    size = 5000 if kind == "sketch" else 12

    def made() -> Moments:
        moments = Moments(size, paired=kind == "paired", is_diagonal=kind == "diagonal")
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            x = torch.randn(size, 7, generator=generator)
            moments.add(x, 2 * x if kind == "paired" else None, weight=3.0)
        return moments

    wanted, found = made(), made()
    scaled = wanted.scaled(2.5)
    found.lay_aside(Spool(0).lay)
    # Once more changes nothing.
    found.lay_aside(Spool(0).lay)
    assert torch.equal(found.own, wanted.own)
    assert torch.equal(found.means[0], wanted.means[0])
    assert torch.equal(found.scaled(2.5).own, scaled.own)
    assert torch.equal(found.blended(0.2).own, wanted.blended(0.2).own)
    assert found.trace == wanted.trace
    if kind == "paired":
        assert torch.equal(found.crossed, wanted.crossed)
        assert torch.equal(found.centred().own, wanted.centred().own)


def test_nothing_is_added_to_moments_that_are_laid_aside() -> None:
    """It would be lost without a word."""
    moments = Moments(3)
    moments.add(torch.ones(3, 2))
    moments.lay_aside(Spool().lay)
    with pytest.raises(ValueError, match="take nothing more"):
        moments.add(torch.ones(3, 2))
