from __future__ import annotations

import os
import re
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

from ttcompress.calibrate.calibration import draw_calibration
from ttcompress.data.augment import random_numbers
from ttcompress.data.opening import open_data
from ttcompress.data.sets import Images
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing

COLOUR = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
GREY = Preprocessing((0.5,), (0.25,))


def random_images(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | list[int] | None = None) -> Path:
    np.savez(file, images=images, **({} if labels is None else {"labels": np.asarray(labels)}))
    return file


def all_of(
    images: Images, preprocessing: Preprocessing, batch_size: int = 4, **options: int
) -> tuple[torch.Tensor, list]:
    batches = list(images.batches(preprocessing, batch_size, **options))
    labels = [None if label is None else label.tolist() for _, label in batches]
    return torch.cat([batch for batch, _ in batches]), list(chain(*labels)) if images.labelled else labels


def refuses(complaint: str, reference: str) -> None:
    with pytest.raises(DataError, match=complaint) as error:
        open_data(reference)
    assert "\n" not in str(error.value)


def test_npz_is_normalised_as_plain_numpy_does(tmp_path: Path) -> None:
    pixels = random_images(10, 5, 6, 3)
    images = open_data(f"npz:{save(tmp_path / 'some.npz', pixels, list(range(10)))}")
    assert (images.name, len(images), images.num_classes, images.image_size) == (
        "npz:some.npz",
        10,
        10,
        (3, 5, 6),
    )
    batch, labels = all_of(images, COLOUR)
    expected = (pixels / 255 - np.array(COLOUR.mean)) / np.array(COLOUR.std)
    np.testing.assert_allclose(batch.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert labels == list(range(10))


def test_batches_and_limit(tmp_path: Path) -> None:
    images = open_data(f"npz:{save(tmp_path / 'a.npz', random_images(10, 4, 4), [1] * 10)}")
    assert [len(batch) for batch, _ in images.batches(GREY, 4)] == [4, 4, 2]
    assert [len(batch) for batch, _ in images.batches(GREY, 4, limit=5)] == [4, 1]
    assert [len(batch) for batch, _ in images.batches(GREY, 4, limit=99)] == [4, 4, 2]
    whole, _ = all_of(images, GREY)
    first, _ = all_of(images, GREY, limit=5)
    assert torch.equal(first, whole[:5])
    _, labels = next(images.batches(GREY, 4))
    assert labels is not None
    assert labels.dtype == torch.int64


def test_npz_without_labels(tmp_path: Path) -> None:
    images = open_data(f"npz:{save(tmp_path / 'a.npz', random_images(3, 4, 4))}")
    assert not images.labelled
    assert images.num_classes is None
    assert next(images.batches(GREY, 2))[1] is None
    with pytest.raises(DataError, match=r"npz:a\.npz has no labels"):
        images.require_labels()


def test_path_may_hold_at_and_colon(tmp_path: Path) -> None:
    odd = tmp_path / "user@host:x@train"
    odd.mkdir()
    save(odd / "a@b:c.npz", random_images(3, 4, 4))
    assert open_data(f"npz:{odd / 'a@b:c.npz'}").name == "npz:a@b:c.npz"
    save(odd / "cifar10-test.npz", random_images(3, 32, 32, 3))
    assert len(open_data(f"cifar10:{odd}@test")) == 3


def test_statistics_are_those_of_the_training_split(tmp_path: Path) -> None:
    train = random_images(20, 32, 32, 3) // 2
    save(tmp_path / "cifar10-train.npz", train, [0] * 20)
    save(tmp_path / "cifar10-test.npz", random_images(7, 32, 32, 3, seed=1), [0] * 7)
    test = open_data(f"cifar10:{tmp_path}")
    assert (test.name, len(test)) == ("cifar10@test", 7)
    scaled = train.astype(np.float64) / 255
    for images in (test, open_data(f"cifar10:{tmp_path}", "train"), open_data(f"cifar10:{tmp_path}@train")):
        known = images.statistics()
        np.testing.assert_allclose(known.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(known.std, scaled.std((0, 1, 2)), rtol=1e-12)
        assert known.input_size == (3, 32, 32)


def test_constant_channel_has_no_statistics(tmp_path: Path) -> None:
    images = open_data(f"npz:{save(tmp_path / 'a.npz', np.zeros((3, 4, 4), np.uint8))}")
    with pytest.raises(DataError, match=r"cannot be normalised: give --mean"):
        images.statistics()


def test_split_in_the_reference_beats_the_default(tmp_path: Path) -> None:
    save(tmp_path / "cifar10-train.npz", random_images(5, 32, 32, 3), [0] * 5)
    save(tmp_path / "cifar10-test.npz", random_images(7, 32, 32, 3), [0] * 7)
    assert len(open_data(f"cifar10:{tmp_path}", "train")) == 5
    assert open_data(f"cifar10:{tmp_path}@test", "train").name == "cifar10@test"


def test_digits() -> None:
    train, test = open_data("digits@train"), open_data("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert (train.name, test.name) == ("digits@train", "digits@test")
    assert test.image_size == (1, 8, 8)
    assert test.num_classes == 10
    batch, labels = all_of(test, Preprocessing((0.0,), (1.0,)), 360)
    assert batch.max() == 1
    assert batch.min() == 0
    from sklearn.datasets import load_digits

    source = load_digits()
    np.testing.assert_allclose(batch[:, 0].numpy(), source.images[1437:] / 16, atol=0.5 / 255 + 1e-6)
    assert labels == source.target[1437:].tolist()
    assert open_data("digits", "train").name == "digits@train"


def test_mnist(mnist_root: Path) -> None:
    images = open_data(f"mnist:{mnist_root}")
    assert (images.name, len(images), images.image_size) == ("mnist@test", 10_000, (1, 28, 28))
    known = images.statistics()
    # The statistics that every MNIST example quotes.
    assert known.mean == pytest.approx((0.1307,), abs=5e-5)
    assert known.std == pytest.approx((0.3081,), abs=5e-5)


@pytest.mark.slow
def test_cifar10(cifar10_root: Path) -> None:
    images = open_data(f"cifar10:{cifar10_root}")
    assert (len(images), images.num_classes) == (10_000, 10)
    known = images.statistics()
    assert known.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=1e-4)
    assert known.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=1e-4)


def make_folder(folder: Path, sizes: dict[str, tuple[int, int]], mode: str = "RGB") -> Path:
    for index, (name, (height, width)) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_images(height, width, 3, seed=index)).convert(mode).save(folder / name)
    return folder


def test_imagefolder_matches_the_transforms_of_torchvision(tmp_path: Path) -> None:
    make_folder(tmp_path, {"val/a/0.png": (300, 400), "val/b/1.png": (280, 260), "train/a/0.png": (8, 8)})
    images = open_data(f"imagefolder:{tmp_path}")
    assert (images.name, len(images), images.num_classes, images.image_size) == (
        "imagefolder@val",
        2,
        2,
        None,
    )
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    known = Preprocessing(tuple(transforms.mean), tuple(transforms.std), (3, 224, 224), 256)
    batch, labels = all_of(images, known)
    expected = [transforms(Image.open(tmp_path / f"val/{'ab'[label]}/{label}.png")) for label in labels]
    torch.testing.assert_close(batch, torch.stack(expected))
    assert sorted(labels) == [0, 1]


def test_imagefolder_order_is_fixed_and_mixes_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {f"{label}/{index}.png": (8, 8) for label in "ab" for index in range(20)})
    images = open_data(f"imagefolder:{tmp_path}")
    assert images.name == "imagefolder"
    state = torch.get_rng_state()
    alone, labels = all_of(images, COLOUR)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(labels[:10]) == {0, 1}
    with_workers, same = all_of(open_data(f"imagefolder:{tmp_path}"), COLOUR, workers=2)
    assert torch.equal(alone, with_workers)
    assert labels == same
    first, _ = all_of(images, COLOUR, limit=6, workers=1)
    assert torch.equal(first, alone[:6])


def test_imagefolder_splits(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train/a/0.png": (8, 8), "my val/a/0.png": (8, 8), "my val/b/0.png": (8, 8)})
    assert open_data(f"imagefolder:{tmp_path}", "train").name == "imagefolder@train"
    assert len(open_data(f"imagefolder:{tmp_path}@my val")) == 2
    refuses(r"has no test split but train: choose it, as in .*@train", f"imagefolder:{tmp_path}")
    refuses(r"no folder .*@test, and no subfolder test in", f"imagefolder:{tmp_path}@test")


def test_images_are_unlabelled_and_sorted_out(tmp_path: Path) -> None:
    make_folder(tmp_path, {"b.png": (8, 8), "a.png": (8, 8)})
    (tmp_path / "notes.txt").write_text("not an image")
    images = open_data(f"images:{tmp_path}")
    assert (images.name, len(images), images.labelled) == ("images", 2, False)
    batch, labels = all_of(images, COLOUR)
    assert batch.shape == (2, 3, 8, 8)
    assert labels == [None]
    with pytest.raises(
        DataError, match=r"a folder, whose statistics are not computed: give --mean and --std"
    ):
        images.statistics()


def test_files_are_read_with_the_channels_of_the_normalisation(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a.png": (28, 28)}, mode="L")
    images = open_data(f"images:{tmp_path}")
    grey, _ = all_of(images, GREY)
    expected = (np.asarray(Image.open(tmp_path / "a.png")) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(grey[0, 0].numpy(), expected, atol=1e-6)
    colour, _ = all_of(images, COLOUR)
    assert colour.shape == (1, 3, 28, 28)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_one_line(tmp_path: Path, workers: int) -> None:
    make_folder(tmp_path, {"a.png": (8, 8)})
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png is not a readable image") as error:
        all_of(open_data(f"images:{tmp_path}"), COLOUR, workers=workers)
    assert "\n" not in str(error.value)


def test_several_sizes_need_an_input_size(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a.png": (8, 8), "b.png": (9, 8)})
    images = open_data(f"images:{tmp_path}")
    with pytest.raises(DataError, match=r"images of several sizes, \(8, 8\), \(9, 8\)"):
        all_of(images, COLOUR)
    batch, _ = all_of(images, Preprocessing(COLOUR.mean, COLOUR.std, (3, 8, 6)))
    assert batch.shape == (2, 3, 8, 6)


def test_channels_have_to_match(tmp_path: Path) -> None:
    grey = open_data(f"npz:{save(tmp_path / 'grey.npz', random_images(3, 4, 4))}")
    colour = open_data(f"npz:{save(tmp_path / 'colour.npz', random_images(3, 4, 4, 3))}")
    with pytest.raises(DataError, match=r"grey\.npz .* with 1 channels, the normalisation is for 3"):
        grey.batches(COLOUR, 2)
    with pytest.raises(DataError, match=r"colour\.npz .* with 3 channels, the normalisation is for 1"):
        colour.batches(GREY, 2)
    with pytest.raises(DataError, match=r"one value a channel"):
        colour.batches(Preprocessing((0.5, 0.5, 0.5), (0.5,)), 2)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"labels": np.zeros(3, int)}, r"has no array 'images'"),
        ({"images": np.zeros((3, 4, 4))}, r"images are float64 of shape \(3, 4, 4\)"),
        ({"images": np.zeros((3, 4), np.uint8)}, r"images are uint8 of shape \(3, 4\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, r"holds no images"),
        (
            {"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(2, int)},
            r"for 3 images they have to be",
        ),
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(3)}, r"labels are float64"),
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.array([0, -1, 2])}, r"the smallest is -1"),
        ({"images": np.array([None, "pickle"])}, r"not a readable npz file of plain arrays"),
    ],
)
def test_bad_npz(tmp_path: Path, content: dict[str, NDArray], complaint: str) -> None:
    np.savez(tmp_path / "bad.npz", **content)
    refuses(r"bad\.npz.*" + complaint, f"npz:{tmp_path / 'bad.npz'}")


@pytest.mark.parametrize("cut", [0, 10, 100, 200])
def test_damaged_npz(tmp_path: Path, cut: int) -> None:
    file = save(tmp_path / "cut.npz", random_images(3, 4, 4))
    file.write_bytes(file.read_bytes()[:cut])
    refuses(r"cut\.npz is not a readable npz file", f"npz:{file}")


def test_missing_places(tmp_path: Path) -> None:
    refuses(r"no file .*absent\.npz", f"npz:{tmp_path / 'absent.npz'}")
    refuses(r"no CIFAR-10 in .*neither cifar10-test\.npz nor", f"cifar10:{tmp_path}")
    refuses(r"no MNIST in", f"mnist:{tmp_path}")
    refuses(r"no folder .*absent", f"imagefolder:{tmp_path / 'absent'}")
    refuses(r"is not a folder of classes", f"imagefolder:{tmp_path}")
    refuses(r"no folder .*absent", f"images:{tmp_path / 'absent'}")
    refuses(r"holds no images", f"images:{tmp_path}")


def test_one_split_only(tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", random_images(3, 4, 4))
    refuses(r"@train cannot be chosen", f"npz:{file}@train")
    refuses(r"@test cannot be chosen", f"images:{tmp_path}@test")


@pytest.mark.parametrize(
    ("reference", "complaint"),
    [
        ("data.npz", r"unknown kind of data 'data\.npz': it is one of npz:FILE, cifar10:ROOT"),
        ("svhn:/x", r"unknown kind"),
        ("cifar10", r"'cifar10' names no place: write cifar10:PATH"),
        ("npz:", r"names no place"),
        ("digits:/x", r"take no path"),
        ("digits@val", r"take no path"),
    ],
)
def test_bad_references(reference: str, complaint: str) -> None:
    refuses(complaint, reference)


def test_default_split_is_train_or_test() -> None:
    with pytest.raises(DataError, match="unknown split 'val': it is one of train, test"):
        open_data("digits", "val")


def test_names_hold_no_path(tmp_path: Path) -> None:
    make_folder(tmp_path, {"secret/a/0.png": (8, 8)})
    folder = tmp_path / "secret"
    save(folder / "x.npz", random_images(3, 4, 4))
    save(folder / "cifar10-test.npz", random_images(3, 32, 32, 3))
    references = ("npz:{}/x.npz", "cifar10:{}", "imagefolder:{}", "images:{}/a")
    names = [open_data(reference.format(folder)).name for reference in references]
    assert not [name for name in names if re.search(r"[/\\]|secret", name)]


# ----------------------------------------------------------------------------------------------- data that lies


def idx(values: NDArray, kind: int = 8) -> bytes:
    header = struct.pack(">I", kind * 256 + values.ndim) + b"".join(
        struct.pack(">I", size) for size in values.shape
    )
    return header + values.tobytes()


def save_mnist(root: Path, images: bytes, labels: bytes) -> str:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    return f"mnist:{root}"


DIGITS, CLASSES = random_images(20, 8, 8), (np.arange(20) % 10).astype(np.uint8)


def test_small_mnist(tmp_path: Path) -> None:
    images = open_data(save_mnist(tmp_path, idx(DIGITS), idx(CLASSES)))
    pixels, labels = all_of(images, GREY)
    np.testing.assert_allclose(pixels[:, 0].numpy(), (DIGITS / 255 - 0.5) / 0.25, atol=1e-6)
    assert labels == CLASSES.tolist()


@pytest.mark.parametrize("labels", [CLASSES[:9], CLASSES[:19], np.tile(CLASSES, 2), CLASSES[:1], CLASSES[:0]])
def test_mnist_with_another_number_of_labels(tmp_path: Path, labels: NDArray) -> None:
    refuses(r"labels are|no MNIST in", save_mnist(tmp_path, idx(DIGITS), idx(labels)))


@pytest.mark.parametrize(
    "images",
    [
        b"", b"\xff" * 99, struct.pack(">I", 2048), struct.pack(">IIII", 2051, 2**31 - 1, 8, 8), idx(DIGITS)[:-9],
        idx(DIGITS) + b"\0", idx(DIGITS, 0), idx(DIGITS, 13), idx(DIGITS.astype(">f4"), 13), idx(DIGITS[:0]),
        b"PK\x03\x04", b"<!DOCTYPE html>",
    ],
)  # fmt: skip
def test_broken_mnist(tmp_path: Path, images: bytes) -> None:
    refuses(str(tmp_path), save_mnist(tmp_path, images, idx(CLASSES)))
    refuses(str(tmp_path), save_mnist(tmp_path, idx(DIGITS), images))


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(20) / 2, np.arange(20.0), np.arange(20) > 3, np.arange(20).astype(complex), np.arange(20).astype(str),
        np.arange(20) - 1, np.arange(20) + 10**15, np.arange(20).astype(np.uint64) + np.uint64(2**63), np.arange(21),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["npz", "cifar10"])
def test_labels_that_are_no_classes(tmp_path: Path, labels: NDArray, kind: str) -> None:
    np.savez(tmp_path / "cifar10-test.npz", images=random_images(20, 32, 32, 3), labels=labels)
    place = tmp_path / "cifar10-test.npz" if kind == "npz" else tmp_path
    refuses(r"labels (are|count)", f"{kind}:{place}")


def test_damaged_cifar10(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for content in (b"", b"\x80\x04N.", b"text"):
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
            (folder / name).write_bytes(content)
        refuses(r"no CIFAR-10 in", f"cifar10:{tmp_path}")


# ------------------------------------------------------------------------------------- places that are no files


@pytest.mark.parametrize("kind", ["npz", "cifar10", "mnist", "images", "imagefolder"])
@pytest.mark.parametrize("name", ["x" * 300, "~nouser/x", "a\0b", "."])
def test_paths_that_no_data_can_have(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(r".", f"{kind}:{name}")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in (
        "a.npz",
        "cifar10-test.npz",
        "MNIST/raw/x",
        "set/class/x.png",
        "cifar/cifar-10-batches-py/test_batch",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tmp_path / name)
    refuses("no ordinary file", f"npz:{tmp_path / 'a.npz'}")
    refuses("no ordinary file", f"cifar10:{tmp_path}")
    refuses("no ordinary file", f"cifar10:{tmp_path / 'cifar'}")
    refuses("no ordinary file", f"mnist:{tmp_path}")
    for images in (
        open_data(f"imagefolder:{tmp_path / 'set'}"),
        open_data(f"images:{tmp_path / 'set' / 'class'}"),
    ):
        with pytest.raises(DataError, match=r"x.png is not a readable image: it is no ordinary file"):
            next(iter(images.batches(GREY, 4)))
        images.digest()


# ----------------------------------------------------------------------------------------------- image formats


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff"])
@pytest.mark.parametrize(
    "start", ["%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "%PDF-1.4\n", "GIF89a"]
)
def test_other_formats_are_refused_whatever_they_are_called(
    tmp_path: Path, suffix: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    (tmp_path / f"a.{suffix}").write_text(start)
    with pytest.raises(DataError, match="not a readable image: cannot identify"):
        next(iter(open_data(f"images:{tmp_path}").batches(COLOUR, 4)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm"])
def test_usual_formats_are_read(tmp_path: Path, suffix: str) -> None:
    make_folder(tmp_path, {f"a.{suffix}": (8, 8)})
    assert len(all_of(open_data(f"images:{tmp_path}"), COLOUR)[0]) == 1


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_the_same_grey_as_eight(tmp_path: Path, suffix: str) -> None:
    pixels = random_images(9, 9)
    for bits, values in ((8, pixels), (16, pixels.astype(np.uint16) * 257)):
        (tmp_path / str(bits)).mkdir()
        Image.fromarray(values).save(tmp_path / str(bits) / f"a.{suffix}")
    for preprocessing in (GREY, COLOUR):
        few, many = (all_of(open_data(f"images:{tmp_path / bits}"), preprocessing)[0] for bits in ("8", "16"))
        assert torch.equal(few, many)


def test_grey_without_a_range_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="convert it to 8 bits"):
        next(iter(open_data(f"images:{tmp_path}").batches(GREY, 4)))


# ------------------------------------------------------------------------------------------------------- others


def test_digests_tell_images_of_the_same_name_apart(tmp_path: Path) -> None:
    pixels, labels = random_images(30, 4, 4), [*range(30)]
    digests = {open_data(f"npz:{save(tmp_path / 'a.npz', pixels, labels)}").digest() for _ in range(2)}
    assert len(digests) == 1
    for at in range(0, 30, 7):
        other = pixels.copy()
        other[at, 0, 0] ^= 1
        digests.add(open_data(f"npz:{save(tmp_path / 'a.npz', other, labels)}").digest())
    digests.add(open_data(f"npz:{save(tmp_path / 'a.npz', pixels, labels[::-1])}").digest())
    digests.add(open_data(f"npz:{save(tmp_path / 'a.npz', pixels)}").digest())
    digests.add(open_data(f"npz:{save(tmp_path / 'a.npz', pixels.reshape(30, 2, 8), labels)}").digest())
    assert len(digests) == 9


def test_digests_of_folders_are_of_names_and_sizes(tmp_path: Path) -> None:
    digests = set()
    for number, files in enumerate(
        (
            {"a/0.png": (8, 8)},
            {"a/1.png": (8, 8)},
            {"b/0.png": (8, 8)},
            {"a/0.png": (9, 9)},
            {"a/0.png": (8, 8)},
        )
    ):
        make_folder(tmp_path / str(number), files)
        digests.add(open_data(f"imagefolder:{tmp_path / str(number)}").digest())
    assert len(digests) == 4


@pytest.mark.parametrize("batch_size", [10**9, 2**62, 10**30])
def test_batches_larger_than_any_set(tmp_path: Path, batch_size: int) -> None:
    make_folder(tmp_path, {"a/0.png": (8, 8), "a/1.png": (8, 8)})
    file = save(tmp_path / "a.npz", random_images(5, 4, 4))
    for reference, count in ((f"imagefolder:{tmp_path}", 2), (f"npz:{file}", 5)):
        assert [len(batch) for batch, _ in open_data(reference).batches(GREY, batch_size)] == [count]


@pytest.mark.parametrize("seed", [0, 2**31, 2**62, 2**63 - 1])
def test_any_seed_draws(seed: int) -> None:
    drawn = draw_calibration("x", 64, None, seed, lambda indices: [torch.tensor(indices)])
    orders = [torch.cat(list(drawn.fitting(number))).tolist() for number in (0, 1, 10**6)]
    assert len({tuple(order) for order in orders}) == 3
    assert [*map(sorted, orders)] == [sorted(orders[0])] * 3
    assert random_numbers(seed, 10**6, [0, 1]).shape == (2, 5)
