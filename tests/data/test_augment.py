"""Random numbers of augmentation against splitmix64 in whole numbers; flips, shifts and crops against NumPy slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ttcompress.data.augment import (
    NUMBERS_PER_IMAGE,
    flipped,
    random_crop_box,
    random_numbers,
    shifted,
    shifts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 2**64
GOLDEN = 0x9E3779B97F4A7C15
LAST = 1 - 2**-53
SEEDS, EPOCHS, INDICES = st.integers(0, WORDS - 1), st.integers(0, 10**4), st.integers(0, 2**40)
SIZES = st.integers(1, 12)
NUMBERS = st.one_of(st.sampled_from([0.0, LAST]), st.floats(0, 1, exclude_max=True))
FOUR = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS)


def splitmix64(state: int) -> int:
    """The oracle: the first output from this state, in whole numbers."""
    z = (state + GOLDEN) % WORDS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORDS
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORDS
    return z ^ z >> 31


def number(seed: int, epoch: int, index: int, column: int) -> float:
    """One by one: seed, then epoch, then index go into the state, and every column takes one more step."""
    state = splitmix64((splitmix64((splitmix64(seed) + epoch) % WORDS) + index) % WORDS)
    return (splitmix64((state + (column + 1) * GOLDEN) % WORDS) >> 11) / 2**53


# ------------------------------------------------------------------------------------------------------ random numbers


def test_the_oracle_is_splitmix64() -> None:
    """The outputs that implementations of it are commonly checked by, for the state 1234567."""
    known = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64((1234567 + step * GOLDEN) % WORDS) for step in range(5)] == known


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, epoch=EPOCHS, indices=st.lists(INDICES, max_size=6))
@example(seed=WORDS - 1, epoch=0, indices=[0, 1])
def test_numbers_are_the_hash_of_seed_epoch_and_index(seed: int, epoch: int, indices: list[int]) -> None:
    found = random_numbers(seed, epoch, indices)
    assert (found.dtype, found.shape) == (torch.float64, (len(indices), NUMBERS_PER_IMAGE))
    assert found.tolist() == [
        [number(seed, epoch, index, column) for column in range(NUMBERS_PER_IMAGE)] for index in indices
    ]


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, epoch=EPOCHS, indices=st.lists(INDICES, min_size=2, max_size=12), data=st.data())
def test_numbers_do_not_hang_on_order_or_grouping(
    seed: int, epoch: int, indices: list[int], data: Any
) -> None:
    whole = dict(zip(indices, random_numbers(seed, epoch, indices).tolist(), strict=True))
    other = data.draw(st.permutations(indices))
    at = data.draw(st.integers(0, len(other)))
    random_numbers(seed + 1 if seed < 9 else 0, epoch + 1, indices)
    for part in (other[:at], other[at:], np.array(other)):
        assert random_numbers(seed, epoch, part).tolist() == [whole[int(index)] for index in part]


@settings(max_examples=60, deadline=None)
@given(first=st.tuples(SEEDS, EPOCHS, INDICES), second=st.tuples(SEEDS, EPOCHS, INDICES))
@example(first=(0, 1, 0), second=(0, 0, 1))
@example(first=(1, 0, 0), second=(0, 1, 0))
@example(first=(1, 0, 0), second=(0, 0, 1))
@example(first=(2**53, 0, 0), second=(2**53 + 1, 0, 0))
def test_numbers_hang_on_seed_epoch_and_index(
    first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    one, other = (
        random_numbers(seed, epoch, [index]).flatten().tolist() for seed, epoch, index in (first, second)
    )
    assert (set(one) & set(other) == set()) == (first != second)
    assert len(set(one)) == NUMBERS_PER_IMAGE


MANY = 20_000


def columns(seed: int, epoch: int) -> NDArray[np.float64]:
    return np.asarray(random_numbers(seed, epoch, range(MANY)).T.numpy())


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**40, 299)])
def test_numbers_are_uniform_and_their_columns_independent(seed: int, epoch: int) -> None:
    """The bounds are about five standard deviations away."""
    found = columns(seed, epoch)
    assert found.min() >= 0
    assert found.max() < 1
    for bins, left in ((20, found), (7, found * 2**20 % 1)):
        counts = np.stack([np.bincount((bins * each).astype(int), minlength=bins) for each in left])
        assert (((counts - MANY / bins) ** 2).sum(1) * bins / MANY).max() < bins + 5 * (2 * bins) ** 0.5
    for i in range(NUMBERS_PER_IMAGE):
        for j in range(i):
            pairs = np.histogram2d(found[i], found[j], 5, [[0, 1], [0, 1]])[0]
            assert ((pairs - MANY / 25) ** 2).sum() * 25 / MANY < 25 + 5 * 50**0.5


def test_numbers_of_neighbours_are_independent() -> None:
    """Of one image and the next, of one epoch and the next, of one seed and the next, in any columns."""
    one = columns(0, 0)
    for other in (np.roll(one, 1, axis=1), columns(0, 1), columns(1, 0)):
        crossed = np.corrcoef(one, other)[:NUMBERS_PER_IMAGE, NUMBERS_PER_IMAGE:]
        assert np.abs(crossed).max() < 5 / MANY**0.5


# ----------------------------------------------------------------------------------------------------- flips and shifts

DTYPES = st.sampled_from([np.uint8, np.float32, np.float64])
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 3), SIZES, SIZES)


def images(shape: Sequence[int], dtype: type[Any]) -> NDArray[Any]:
    """No pixel is 0, as those are that move in."""
    return np.random.default_rng(0).integers(1, 256, shape).astype(dtype)


def batch_of(x: NDArray[Any], channels_last: bool) -> torch.Tensor:
    """The same values, stored channels first or, as image files are, channels last."""
    return (
        torch.from_numpy(x.transpose(0, 2, 3, 1).copy()).permute(0, 3, 1, 2)
        if channels_last
        else torch.tensor(x)
    )


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, channels_last=st.booleans(), data=st.data())
def test_chosen_images_are_mirrored(
    shape: tuple[int, ...], dtype: type[Any], channels_last: bool, data: Any
) -> None:
    which = data.draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]))
    x = images(shape, dtype)
    batch = batch_of(x, channels_last)
    found = flipped(batch, torch.tensor(which, dtype=torch.bool)).numpy()
    assert found.dtype == dtype
    assert found.shape == shape
    for image, mirrored, out in zip(x, which, found, strict=True):
        np.testing.assert_array_equal(out, image[..., ::-1] if mirrored else image)
    np.testing.assert_array_equal(batch.numpy(), x)


def moved(x: NDArray[Any], down: int, right: int) -> NDArray[Any]:
    """The oracle: one image (C, H, W) by slices."""
    height, width = x.shape[1:]
    out = np.zeros_like(x)
    if abs(down) < height and abs(right) < width:
        kept = x[:, max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)]
        out[:, max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = kept
    return out


@settings(max_examples=100, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, channels_last=st.booleans(), data=st.data())
def test_images_move_and_zeros_move_in(
    shape: tuple[int, ...], dtype: type[Any], channels_last: bool, data: Any
) -> None:
    steps = st.lists(st.integers(-14, 14), min_size=shape[0], max_size=shape[0])
    down, right = data.draw(steps), data.draw(steps)
    x = images(shape, dtype)
    batch = batch_of(x, channels_last)
    found = shifted(
        batch, torch.tensor(down, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)
    ).numpy()
    assert found.dtype == dtype
    assert found.shape == shape
    for image, rows, cols, out in zip(x, down, right, found, strict=True):
        np.testing.assert_array_equal(out, moved(image, rows, cols))
    np.testing.assert_array_equal(batch.numpy(), x)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), each=st.integers(1, 4))
def test_all_shifts_are_alike(size: int, each: int) -> None:
    """Evenly spaced numbers, `each` a value, go to each of -size/8 ... size/8."""
    reach = size // 8
    count = each * (2 * reach + 1)
    values, counts = np.unique(
        shifts((torch.arange(count).double() + 0.5) / count, size).numpy(), return_counts=True
    )
    assert values.tolist() == [*range(-reach, reach + 1)]
    assert set(counts.tolist()) == {each}
    assert shifts(torch.tensor([0.0, LAST], dtype=torch.float64), size).tolist() == [-reach, reach]


@given(size=st.integers(1, 7), number=NUMBERS)
def test_small_images_do_not_move(size: int, number: float) -> None:
    assert shifts(torch.tensor([number], dtype=torch.float64), size).tolist() == [0]


# --------------------------------------------------------------------------------------------------------------- crops

SIDES = st.one_of(st.integers(1, 6), st.integers(1, 700))


def asked(numbers: Sequence[float]) -> tuple[float, float]:
    """Share of the area, 0.2 ... 1, and width over height, 3/4 ... 4/3, evenly on a logarithmic scale."""
    return 0.2 + 0.8 * numbers[0], float(np.exp(np.log(3 / 4) + numbers[1] * np.log(16 / 9)))


@settings(max_examples=150, deadline=None)
@given(numbers=FOUR, height=SIDES, width=SIDES)
def test_a_cut_lies_inside_and_is_what_the_numbers_ask_for(
    numbers: tuple[float, float, float, float], height: int, width: int
) -> None:
    top, left, tall, wide = random_crop_box(numbers, height, width)
    assert {type(value) for value in (top, left, tall, wide)} == {int}
    assert 0 <= top <= top + 1 <= top + tall <= height
    assert 0 <= left <= left + 1 <= left + wide <= width
    share, aspect = asked(numbers)
    sides = (height * width * share / aspect) ** 0.5, (height * width * share * aspect) ** 0.5
    for found, side, limit in ((tall, sides[0], height), (wide, sides[1], width)):
        assert found in (1, limit) or abs(found - side) <= 0.5 + 1e-9 * side
        assert found == limit or side < limit + 0.5
        assert found == 1 or side > 0.5


@settings(max_examples=150, deadline=None)
@given(numbers=FOUR, height=SIDES, width=SIDES)
def test_area_and_aspect_are_within_their_bounds_up_to_rounding(
    numbers: tuple[float, float, float, float], height: int, width: int
) -> None:
    """The aspect of an image that is longer than 4/3 by itself can come out with longer parts, never longer than it."""
    _, _, tall, wide = random_crop_box(numbers, height, width)
    own = width / height
    least = min(0.2, 0.75 * min(own, 1 / own))
    assert (tall + 0.5) * (wide + 0.5) >= (1 - 1e-9) * least * height * width
    assert (wide + 0.5) / (tall - 0.5) >= (1 - 1e-9) * min(3 / 4, own)
    assert (wide - 0.5) / (tall + 0.5) <= (1 + 1e-9) * max(4 / 3, own)


def test_the_extremes_of_the_numbers() -> None:
    assert random_crop_box([0.0] * 4, 120, 160) == (0, 0, round(71.55), round(53.67))
    assert random_crop_box([LAST] * 4, 120, 160) == (0, 0, 120, 160)
    assert random_crop_box([0.0, 0.0, LAST, LAST], 120, 160) == (120 - 72, 160 - 54, 72, 54)
    assert random_crop_box([LAST, 0.5, LAST, 0.0], 50, 50) == (0, 0, 50, 50)


@given(numbers=FOUR, length=st.integers(1, 50))
def test_of_a_line_a_line_remains(numbers: tuple[float, float, float, float], length: int) -> None:
    assert random_crop_box(numbers, 1, 1) == (0, 0, 1, 1)
    assert random_crop_box(numbers, 1, length)[::2] == (0, 1)
    assert random_crop_box(numbers, length, 1)[1::2] == (0, 1)


@settings(max_examples=30, deadline=None)
@given(numbers=FOUR, height=st.integers(1, 80), width=st.integers(1, 80))
def test_all_places_are_alike(numbers: tuple[float, float, float, float], height: int, width: int) -> None:
    _, _, tall, wide = random_crop_box(numbers, height, width)
    for axis, places in enumerate((height - tall + 1, width - wide + 1)):
        spots = [(place + 0.5) / (2 * places) for place in range(2 * places)]
        found = [
            random_crop_box([*numbers[:2], *[(spot, 0.5), (0.5, spot)][axis]], height, width)[axis]
            for spot in spots
        ]
        assert found == [place // 2 for place in range(2 * places)]
