"""Batches of one length against a sort of all indices; lengths and cuts of masks against loops over their rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ttcompress.data.by_length import MASK, batches_of_one_length, cut_to, lengths_of

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_index_comes_once_with_its_equals(lengths: list[int], most: int, shuffled: object) -> None:
    indices = list(range(len(lengths)))
    shuffled.shuffle(indices)  # type: ignore[attr-defined]

    batches = list(batches_of_one_length(indices, lengths, most))

    assert sorted(index for batch in batches for index in batch) == sorted(indices)
    assert all(len({lengths[index] for index in batch}) == 1 for batch in batches)
    assert all(len(batch) <= most for batch in batches)
    for length in set(lengths):
        of_length = [batch for batch in batches if lengths[batch[0]] == length]
        # Only the last batch of a length may have room, and the order within a length is the order given.
        assert all(len(batch) == most for batch in of_length[:-1])
        wanted = [index for index in indices if lengths[index] == length]
        assert [index for batch in of_length for index in batch] == wanted


@given(LENGTHS, st.integers(1, 5))
def test_batches_come_in_the_order_of_their_first_index(lengths: list[int], most: int) -> None:
    indices = list(range(len(lengths)))[::-1]
    place = {index: number for number, index in enumerate(indices)}
    firsts = [place[batch[0]] for batch in batches_of_one_length(indices, lengths, most)]
    assert firsts == sorted(firsts)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 7))
def test_equal_lengths_are_plain_slices(indices: list[int], most: int) -> None:
    slices = [indices[start : start + most] for start in range(0, len(indices), most)]
    assert list(batches_of_one_length(indices, [8] * 100, most)) == slices


def test_the_size_may_depend_on_the_length() -> None:
    batches = list(
        batches_of_one_length(range(6), [1, 9, 1, 9, 1, 9], lambda length: 3 if length == 1 else 1)
    )
    assert batches == [[0, 2, 4], [1], [3], [5]]


@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_lengths_are_those_of_rows_of_ones_then_zeros(rows: list[list[int]]) -> None:
    right_padded = all(row[0] == 1 and row == sorted(row, reverse=True) for row in rows)
    assert lengths_of(torch.tensor(rows)) == ([sum(row) for row in rows] if right_padded else None)
    assert lengths_of(torch.tensor(rows, dtype=torch.float32)) == lengths_of(torch.tensor(rows))
    assert lengths_of(torch.tensor(rows) == 1) == lengths_of(torch.tensor(rows))


def test_other_masks_have_no_lengths() -> None:
    assert lengths_of(torch.ones(2, 1, 4, 4)) is None
    assert lengths_of(torch.tensor([[1.0, 0.5, 0.0]])) is None
    # Additive masks: 0 where attention goes.
    assert lengths_of(torch.tensor([[0.0, -1e9]])) is None
    assert lengths_of(torch.ones(0, 4)) is None


def test_a_cut_leaves_no_padding() -> None:
    batch = {
        "input_ids": torch.arange(12).reshape(2, 6),
        MASK: torch.tensor([[1, 1, 0, 0, 0, 0]] * 2),
        "inputs_embeds": torch.zeros(2, 6, 5),
        "weights": torch.zeros(2),
        "other": torch.zeros(2, 5),
        "flag": True,
    }
    cut = cut_to(batch, 2)
    assert cut["input_ids"].tolist() == [[0, 1], [6, 7]]
    assert cut[MASK].tolist() == [[1, 1], [1, 1]]
    assert cut["inputs_embeds"].shape == (2, 2, 5)
    for untouched in ("weights", "other", "flag"):
        assert cut[untouched] is batch[untouched]
