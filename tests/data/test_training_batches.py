"""Training batches from arrays and from image files: which images, in what order, moved, cut and normalised how."""

from __future__ import annotations

import re
import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ttcompress.data.augment import random_crop_box
from ttcompress.data.opening import open_data
from ttcompress.data.sets import Images
from ttcompress.data.training_batches import Stream
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

Pixels = NDArray[np.uint8]
Batches = list[tuple[Tensor, Tensor | None]]
AS_IT_IS = Preprocessing((0.0,) * 3, (1.0,) * 3)
COLOUR = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
COUNT = 40
SEEDS, EPOCHS = st.integers(0, 2**62), st.integers(0, 1000)
AUGMENTATIONS = st.sampled_from(["none", "shift", "flip"])
with_and_without_workers = pytest.mark.parametrize("workers", [0, 2])


def stream(images: Images, batch_size: int = 8, seed: int = 0, **options: Any) -> Stream:
    return Stream(images, options.pop("known", AS_IT_IS), batch_size, seed, torch.device("cpu"), **options)


def pixels_of(batch: Tensor) -> Pixels:
    """(N, H, W, C) as it was before the normalisation of `AS_IT_IS`."""
    return (batch * 255).round().byte().permute(0, 2, 3, 1).numpy()


def seen(batches: Batches) -> list[int]:
    return [int(label) for _, labels in batches if labels is not None for label in labels]


def same(one: Batches, other: Batches) -> bool:
    """Bit for bit; all have labels."""
    pairs = [(x, y) for each, like in zip(one, other, strict=True) for x, y in zip(each, like, strict=True)]
    return all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


def random_images(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return random_images(COUNT, 16, 24, 3)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, pixels: Pixels) -> Images:
    """In memory; the label of an image is its number."""
    file = tmp_path_factory.mktemp("arrays") / "numbered.npz"
    np.savez(file, images=pixels, labels=np.arange(COUNT))
    return open_data(f"npz:{file}")


def write_folder(folder: Path, pixels: Pixels) -> Path:
    for index, each in enumerate(pixels):
        (folder / "abc"[index % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(folder / "abc"[index % 3] / f"{index:03}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 PNGs in three classes, so small that in memory they would not be shifted either; read only."""
    return write_folder(tmp_path_factory.mktemp("images"), random_images(17, 6, 7, 3))


@pytest.fixture(scope="module")
def copied(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """The same in memory, in the folder's order."""
    batches = [*open_data(f"imagefolder:{folder}").batches(AS_IT_IS, 17)]
    file = tmp_path_factory.mktemp("copied") / "copied.npz"
    np.savez(file, images=pixels_of(batches[0][0]), labels=np.array(seen(batches)))
    return open_data(f"npz:{file}")


# --------------------------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, COUNT), batch_size=st.integers(1, 50), seed=SEEDS, epoch=EPOCHS)
def test_an_epoch_visits_each_image_at_most_once(
    numbered: Images, pixels: Pixels, count: int, batch_size: int, seed: int, epoch: int
) -> None:
    """Full batches only, but for a set smaller than one, which is one."""
    some = stream(numbered.chosen(range(count)), batch_size, seed, augmentation="none")
    batches = [*some.epoch(epoch)]
    assert len(batches) == some.steps == max(1, count // batch_size)
    assert {len(batch) for batch, _ in batches} == {min(count, batch_size)}
    assert len(set(seen(batches))) == some.steps * min(count, batch_size)
    assert set(seen(batches)) <= set(range(count))
    found = np.concatenate([pixels_of(batch) for batch, _ in batches])
    np.testing.assert_array_equal(found, pixels[seen(batches)])


def test_the_order_is_another_in_every_epoch_and_for_every_seed(numbered: Images) -> None:
    orders = [
        tuple(seen([*stream(numbered, seed=seed).epoch(epoch)])) for seed in range(5) for epoch in range(5)
    ]
    assert len({*orders, tuple(range(COUNT))}) == 26
    assert orders[7] == tuple(seen([*stream(numbered, seed=1).epoch(2)]))


def test_every_image_gets_its_turn_at_every_place(numbered: Images) -> None:
    """Also those that filled no batch in another epoch."""
    some = stream(numbered.chosen(range(12)), 5, augmentation="none")
    counts = np.zeros((10, 12))
    for epoch in range(200):
        counts[range(10), seen([*some.epoch(epoch)])] += 1
    assert 0 < counts.min() <= counts.max() < 50


@pytest.mark.parametrize("seed", [2**53, 2**63])
def test_large_seeds_are_not_rounded(numbered: Images, seed: int) -> None:
    one, other = ([*stream(numbered, seed=each).epoch(0)] for each in (seed, seed + 1))
    assert seen(one) != seen(other)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 12), size=st.integers(1, 3), seed=SEEDS, epoch=EPOCHS, augmentation=AUGMENTATIONS)
def test_an_epoch_goes_on_anywhere_bit_for_bit(
    numbered: Images, start: int, size: int, seed: int, epoch: int, augmentation: str
) -> None:
    some = stream(numbered, 4, seed, augmentation=augmentation, rank=size - 1, size=size, known=COLOUR)
    tail = [*some.epoch(epoch)][start:]
    assert same([*some.epoch(epoch, start)], tail)
    assert len(tail) == max(0, 10 - start)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, COUNT), batch_size=st.integers(1, 12), size=st.integers(1, 5), kind=AUGMENTATIONS)
def test_the_shards_of_all_processes_are_the_global_batch(
    numbered: Images, count: int, batch_size: int, size: int, kind: str
) -> None:
    """Shares differ by one image at most."""
    size = min(size, count, batch_size)
    images = numbered.chosen(range(count))
    ranks = [
        stream(images, batch_size, augmentation=kind, rank=rank, size=size).epoch(3) for rank in range(size)
    ]
    alone = stream(images, batch_size, augmentation=kind).epoch(3)
    for (whole, labels), *shards in zip(alone, *ranks, strict=True):
        assert labels is not None
        assert max(len(x) for x, _ in shards) - min(len(x) for x, _ in shards) <= 1
        together = np.argsort(seen(shards))
        assert torch.equal(torch.cat([x for x, _ in shards])[together], whole[labels.argsort()])
        assert sorted(seen(shards)) == sorted(labels.tolist())


# -------------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize("kind", ["none", "shift", "flip"])
def test_images_in_memory_move_by_an_eighth_and_are_mirrored(
    numbered: Images, pixels: Pixels, kind: str
) -> None:
    """The oracle finds what was done to each image among all that may be done: 5 rows, 7 columns, mirrored or not."""
    ways = [*product(range(-2, 3), range(-3, 4), (1, -1))]
    sides = {turn: np.pad(pixels[:, :, ::turn], ((0, 0), (2, 2), (3, 3), (0, 0))) for turn in (1, -1)}
    candidates = [sides[turn][:, 2 - down : 18 - down, 3 - right : 27 - right] for down, right, turn in ways]
    found = []
    for epoch in range(12):
        batches = [*stream(numbered, augmentation=kind).epoch(epoch)]
        images, labels = np.concatenate([pixels_of(x) for x, _ in batches]), seen(batches)
        fits = np.array([(each[labels] == images).all((1, 2, 3)) for each in candidates])
        assert (fits.sum(0) == 1).all()
        found += [ways[way] for way in fits.argmax(0)]
    turns = [turn for _, _, turn in found]
    assert {way[:2] for way in found} == ({(0, 0)} if kind == "none" else {way[:2] for way in ways})
    assert abs(np.mean(turns)) < 0.2 if kind == "flip" else set(turns) == {1}
    if kind == "flip":
        assert np.abs(np.corrcoef(np.array(found).T) - np.eye(3)).max() < 0.2


def test_images_are_normalised_as_plain_numpy_does(numbered: Images, pixels: Pixels) -> None:
    """Zeros that move in are black, not the mean."""
    for kind in ("none", "flip"):
        plain, normal = (
            next(stream(numbered, COUNT, augmentation=kind, known=known).epoch(0))
            for known in (AS_IT_IS, COLOUR)
        )
        before = pixels_of(plain[0]) / 255
        assert (before.min() == 0) == (kind == "flip")
        expected = (before - np.array(COLOUR.mean)) / np.array(COLOUR.std)
        np.testing.assert_allclose(normal[0].permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
        assert (normal[0].dtype, normal[0].shape) == (torch.float32, (COUNT, 3, 16, 24))
        assert normal[1] is not None
        assert normal[1].dtype == torch.int64


# ------------------------------------------------------------------------------------------------------------ folders


@with_and_without_workers
@pytest.mark.parametrize("kind", ["none", "flip"])
def test_files_give_the_same_as_memory(folder: Path, copied: Images, workers: int, kind: str) -> None:
    options: dict[str, Any] = {
        "batch_size": 3,
        "seed": 5,
        "augmentation": kind,
        "known": COLOUR,
        "size": 2,
        "rank": 1,
    }
    files = stream(open_data(f"imagefolder:{folder}"), workers=workers, **options)
    memory = stream(copied, **options)
    assert files.steps == memory.steps == 5
    assert same([*files.epoch(2)], [*memory.epoch(2)])
    assert same([*files.epoch(2, 3)], [*memory.epoch(2)][3:])
    assert [*files.epoch(2, 5)] == []


@with_and_without_workers
def test_crops_are_those_of_pillow(folder: Path, copied: Images, workers: int) -> None:
    ((whole, labels),) = copied.training_batches(AS_IT_IS, [(np.arange(17), torch.zeros(17, 5))])
    known_labels = seen([(whole, labels)])
    known = Preprocessing(COLOUR.mean, COLOUR.std, (3, 5, 4))
    parts = [(np.array([3, 16]), torch.full((2, 5), 0.3)), (np.array([0]), torch.full((1, 5), 0.9))]
    batches = [*open_data(f"imagefolder:{folder}").training_batches(known, parts, workers)]
    assert [batch.dtype for batch, _ in batches] == [torch.uint8] * 2
    for (at, numbers), (batch, labels) in zip(parts, batches, strict=True):
        top, left, tall, wide = random_crop_box(numbers[0].tolist(), 6, 7)
        for index, found in zip(at, batch, strict=True):
            image = Image.fromarray(whole[index].permute(1, 2, 0).numpy())
            cut = image.crop((left, top, left + wide, top + tall)).resize((4, 5), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(cut))
        assert seen([(batch, labels)]) == [known_labels[index] for index in at]


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Red is twice the column, green twice the row: of a part one sees where it lies, how large, how turned."""
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 2 * np.arange(64), 2 * np.arange(64)[:, None]
    folder = write_folder(tmp_path_factory.mktemp("ramps"), np.stack([ramp] * 60))
    return open_data(f"imagefolder:{folder}")


def crops(ramps: Images, kind: str) -> NDArray[np.float64]:
    """Rows of area, aspect, middle row, middle column and mirrored, over 300 parts."""
    known, rows = Preprocessing((0.0,) * 3, (1.0,) * 3, (3, 16, 16)), []
    for epoch in range(5):
        for batch, _ in stream(ramps, 20, augmentation=kind, known=known).epoch(epoch):
            red, green = (batch[:, channel].double().numpy() * 255 for channel in range(2))
            # The outermost pixels are averages over fewer than the others.
            wide = (red[:, 8, 14] - red[:, 8, 1]) * 8 / 13
            tall = (green[:, 14, 8] - green[:, 1, 8]) * 8 / 13
            area, aspect = np.abs(wide * tall) / 64**2, np.abs(wide) / tall
            rows += [
                *np.stack([area, aspect, green.mean((1, 2)) / 2, red.mean((1, 2)) / 2, wide < 0], axis=1)
            ]
    return np.array(rows)


@pytest.mark.parametrize("kind", ["shift", "flip"])
def test_parts_of_files_are_of_all_sizes_aspects_and_places(ramps: Images, kind: str) -> None:
    found = crops(ramps, kind)
    assert len(found) == 300
    for column, least, most in ((0, 0.2, 1), (1, 3 / 4, 4 / 3)):
        assert 0.9 * least < found[:, column].min() < 1.1 * least
        assert 0.9 * most < found[:, column].max() < 1.1 * most
    assert (np.ptp(found[:, 2:4], axis=0) > 25).all()
    assert found[:, 4].mean() == 0 if kind == "shift" else abs(found[:, 4].mean() - 0.5) < 0.12
    crossed = np.corrcoef(found[:, :4].T)
    assert np.abs(crossed - np.eye(4)).max() < 0.3


def test_which_parts_are_mirrored_does_not_hang_on_their_size(ramps: Images) -> None:
    found = crops(ramps, "flip")
    assert np.abs(np.corrcoef(found.T)[4, :4]).max() < 0.25


def test_without_augmentation_files_are_not_cut_at_random(folder: Path) -> None:
    """Nothing is on: the same centre crop as where accuracy is measured."""
    images = open_data(f"imagefolder:{folder}")
    known = Preprocessing(COLOUR.mean, COLOUR.std, (3, 4, 4), 5)
    (expected, _), *_ = images.batches(known, 17)
    (found, _), *_ = stream(images, 17, augmentation="none", known=known).epoch(0)
    apart = found.flatten(1)[None] - expected.flatten(1)[:, None]
    assert apart.abs().amax(2).amin(0).max() < 1e-5


def test_unlabelled_images_have_no_labels(folder: Path, pixels: Pixels, tmp_path: Path) -> None:
    np.savez(tmp_path / "plain.npz", images=pixels)
    for reference in (f"npz:{tmp_path / 'plain.npz'}", f"images:{folder / 'a'}"):
        batches = [*stream(open_data(reference), 2).epoch(0)]
        assert {(len(batch), labels) for batch, labels in batches} == {(2, None)}


def test_more_processes_than_images_are_refused(numbered: Images) -> None:
    with pytest.raises(DataError, match="4 processes cannot share 2 images"):
        stream(numbered.chosen([0, 1]), 4, size=4)


# ----------------------------------------------------------------------------------------------------------- refusals


def refuses(complaint: str, some: Stream) -> None:
    """Without `pytest.raises`: what it keeps would hold the workers until some other test collects them."""
    message = ""
    try:
        [*some.epoch(0)]
    except DataError as error:
        message = str(error)
    assert re.search(complaint, message)
    assert "\n" not in message


def test_channels_have_to_match(numbered: Images, folder: Path) -> None:
    grey, pair = Preprocessing((0.5,), (0.5,)), Preprocessing((0.5,) * 2, (0.5,) * 2)
    refuses(r"numbered\.npz .* with 3 channels, the normalisation is for 1", stream(numbered, known=grey))
    refuses(
        r"1 or 3 channels, the normalisation is for 2",
        stream(open_data(f"images:{folder / 'a'}"), known=pair),
    )


@pytest.mark.parametrize("count", [1, 2])
def test_mean_and_std_need_one_value_a_channel_each(numbered: Images, count: int) -> None:
    refuses("one value a channel", stream(numbered, known=Preprocessing((0.5,) * 3, (0.5,) * count)))


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60,000 x 60,000 pixels large."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    packed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@with_and_without_workers
@pytest.mark.parametrize("damage", ["empty", "head", "half", "text", "gone", "bomb"])
def test_an_unreadable_file_is_one_line(tmp_path: Path, workers: int, damage: str) -> None:
    write_folder(tmp_path, random_images(5, 9, 8, 3))
    images = open_data(f"imagefolder:{tmp_path}")
    bad = tmp_path / "b" / "001.png"
    content = bad.read_bytes()
    bad.unlink()
    if damage != "gone":
        broken = {
            "empty": b"",
            "head": content[:20],
            "half": content[: len(content) // 2],
            "text": b"no image\n",
        }
        bad.write_bytes({**broken, "bomb": bomb()}[damage])
    refuses(r"001\.png is not a readable image", stream(images, 5, workers=workers))
