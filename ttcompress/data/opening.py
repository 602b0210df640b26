"""Data references `KIND:PATH[@SPLIT]` are opened as sets of images, by one opener a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcompress.data.arrays import ArrayImages, Arrays, Labels
from ttcompress.data.folders import FolderImages
from ttcompress.data.sets import Images, Pixels
from ttcompress.errors import DataError, shortlist

_KINDS = "npz:FILE, cifar10:ROOT, mnist:ROOT, imagefolder:ROOT, images:DIR, digits"
_SPLITS = ("train", "test")
CLASS_NAMES = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
}
"""What labels mean, for pages; folders of images have names of their own."""
MOST_CLASSES = 10_000_000
IMAGES, LABELS = "images", "labels"
"""Arrays of an npz file."""


def open_data(reference: str, split: str = "test") -> Images:
    """Open `KIND:PATH[@train|@test]`; `split` counts where the reference names none.

    Raises:
        DataError: an unknown kind, or nothing readable of that kind there.
    """
    kind, colon, path = reference.partition(":")
    # The only kind that needs no path may come with a split alone.
    if not colon and kind.split("@")[0] == "digits":
        kind, path = "digits", kind.removeprefix("digits")

    if kind not in _OPENERS:
        raise DataError(f"unknown kind of data {reference!r}: it is one of {_KINDS}")
    if not path and kind != "digits":
        raise DataError(f"{reference!r} names no place: write {kind}:PATH")
    if split not in _SPLITS:
        raise DataError(f"unknown split {split!r}: it is one of {shortlist(_SPLITS)}")
    try:
        return _OPENERS[kind](path, split)
    except (OSError, RuntimeError, ValueError) as error:
        # Names that no file can have, homes of nobody, folders that may not be entered.
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{reference}: cannot be read: {reason}") from error


def _split_off(path: str, default: str) -> tuple[str, str]:
    """The path without a split at its end, and the split, else the default."""
    head, _, tail = path.rpartition("@")
    return (head, tail) if tail in _SPLITS else (path, default)


def _without_split(path: str) -> Path:
    """A path that may name no split: what it ends in belongs to the name, if there is such a file.

    Raises:
        DataError: it ends in a split.
    """
    file = Path(path).expanduser()
    head, split = _split_off(path, "")
    if split and not file.exists():
        raise DataError(
            f"{path}: @{split} cannot be chosen, there is one split only: leave it out or name {head}'s twin"
        )
    return file


def _open_splits(kind: str, load: Callable[[str, str], Arrays], path: str, default: str) -> Images:
    """A set of a kind that has both splits; `load` gives the arrays of one under a root."""
    root, split = _split_off(path, default)
    load_train = None if split == "train" else partial(load, root, "train")
    images = ArrayImages(f"{kind}@{split}", load(root, split), load_train)
    images.class_names = CLASS_NAMES.get(kind, ())
    return images


def _open_npz(path: str, default: str) -> Images:
    file = _without_split(path)
    return ArrayImages(f"npz:{file.name}", _load_npz(file))


def npz_file(path: str) -> Path:
    """The file of a reference.

    Raises:
        DataError: there is none, or no ordinary one.
    """
    file = _without_split(path)
    _check_file(file)
    return file


def _check_file(file: Path) -> None:
    if not file.exists():
        raise DataError(f"no file {file}")
    if not file.is_file():
        raise DataError(f"{file} is not a readable npz file: it is no ordinary file")


def npz_names(file: Path) -> list[str]:
    """The names of the arrays of a file.

    Raises:
        DataError: it cannot be read.
    """
    with _archive(file) as archive:
        return list(archive.files)


def npz_content(file: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of a file: all, or those of these names that there are.

    Raises:
        DataError: it cannot be read.
    """
    with _archive(file) as archive:
        return {name: archive[name] for name in archive.files if names is None or name in names}


@contextmanager
def _archive(file: Path) -> Iterator[Any]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            # A single array in a file of its own is no archive.
            archive.files  # noqa: B018
            yield archive
    except Exception as error:
        # What a damaged archive raises depends on where the damage is: zipfile, zlib and NumPy differ.
        kind = type(error).__name__
        raise DataError(f"{file} is not a readable npz file of plain arrays ({kind})") from error


def _load_npz(file: Path) -> Arrays:
    _check_file(file)
    content = npz_content(file, (IMAGES, LABELS))
    if IMAGES not in content:
        raise DataError(
            f"{file} has no array 'images': write it with numpy.savez(file, images=..., labels=...)"
        )
    return _checked(content[IMAGES], content.get(LABELS), str(file))


def _checked(images: NDArray[Any], labels: NDArray[Any] | None, where: str) -> Arrays:
    """Images and labels as they have to be: one whole number an image.

    Raises:
        DataError: they are not.
    """
    return _check_images(images, where), None if labels is None else _check_labels(labels, len(images), where)


def _check_images(images: NDArray[Any], where: str) -> Pixels:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: images are {images.dtype} of shape {images.shape}, not uint8 of shape (N, H, W) or (N, H, W, C)"
        )
    if images.size == 0:
        raise DataError(f"{where} holds no images")
    # Grey images may lack the axis of channels.
    return images.reshape(*images.shape[:3], -1)


def _check_labels(labels: NDArray[Any], count: int, where: str) -> Labels:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}, for {count} images they have to be "
            f"integers of shape ({count},)"
        )
    if labels.min() < 0:
        raise DataError(f"{where}: labels count from 0, the smallest is {labels.min()}")
    if labels.max() >= MOST_CLASSES:
        raise DataError(
            f"{where}: labels count from 0, the largest is {labels.max()}, more than any network has"
        )
    return labels.astype(np.int64)


def _check_ordinary(folder: Path) -> None:
    """See that a folder, if it is there, holds no pipes, at which reading would wait for ever."""
    odd = [
        file.name
        for file in sorted(folder.glob("*"))
        if file.exists() and not (file.is_file() or file.is_dir())
    ]
    if odd:
        raise DataError(f"{folder} holds what is no ordinary file: {shortlist(odd)}")


def _load_cifar10(root: str, split: str) -> Arrays:
    folder = Path(root).expanduser()
    file = folder / f"cifar10-{split}.npz"
    if file.exists():
        return _load_npz(file)

    from torchvision.datasets import CIFAR10

    _check_ordinary(folder / CIFAR10.base_folder)
    try:
        dataset = CIFAR10(str(folder), train=split == "train", download=False)
        labels = np.asarray(dataset.targets)
    except Exception as error:
        # Damage may show anywhere in the reading.
        raise DataError(
            f"no CIFAR-10 in {folder}: neither {file.name} nor an intact cifar-10-batches-py"
        ) from error
    return _checked(dataset.data, labels, str(folder))


def _load_mnist(root: str, split: str) -> Arrays:
    from torchvision.datasets import MNIST

    folder = Path(root).expanduser()
    for inner in ("raw", "processed"):
        _check_ordinary(folder / "MNIST" / inner)
    try:
        dataset = MNIST(str(folder), train=split == "train", download=False)
        images, labels = dataset.data.numpy(), dataset.targets.numpy()
    except Exception as error:
        kind = type(error).__name__
        raise DataError(
            f"no MNIST in {folder}: it has to hold MNIST/raw with the four idx files, undamaged ({kind})"
        ) from error
    return _checked(images, labels, f"{folder}, {split} images of MNIST")


def _load_digits(root: str, split: str) -> Arrays:
    if root:
        raise DataError(
            f"digits come with scikit-learn and take no path, not {root!r}: write digits or digits@train"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey values are 0 ... 16 there.
    scaled = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = scaled[..., None]
    labels = digits.target.astype(np.int64)

    first_test = len(images) * 4 // 5
    part = slice(first_test) if split == "train" else slice(first_test, None)
    return images[part], labels[part]


def _open_imagefolder(path: str, default: str) -> Images:
    folder, subfolder = _choose_subfolder(path, default)
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a folder of classes with images in each: {error}") from error
    name = f"imagefolder@{subfolder}" if subfolder else "imagefolder"
    images = FolderImages(name, dataset.samples, len(dataset.classes))
    images.class_names = tuple(dataset.classes)
    return images


def _choose_subfolder(path: str, default: str) -> tuple[Path, str]:
    """The folder of classes that `PATH[@subfolder]` stands for, and the name of the subfolder, if any."""
    head, _, tail = path.rpartition("@")
    if head and tail:
        named = Path(head).expanduser() / tail
        if named.is_dir():
            return named, tail

    root = Path(path).expanduser()
    if not root.is_dir():
        also = f", and no subfolder {tail} in {head}" if head else ""
        raise DataError(f"no folder {root}{also}")

    present = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    # ImageNet calls what is tested on `val`.
    wanted = ("train",) if default == "train" else ("test", "val")
    chosen = next((name for name in wanted if name in present), "")
    if present and not chosen:
        raise DataError(
            f"{root} has no {default} split but {shortlist(present)}: choose it, as in {path}@{present[0]}"
        )
    return root / chosen, chosen


def _open_images(path: str, default: str) -> Images:
    folder = _without_split(path)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = [str(file) for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise DataError(
            f"{folder} holds no images: {shortlist(IMG_EXTENSIONS, len(IMG_EXTENSIONS))} are read"
        )
    return FolderImages("images", [(file, None) for file in files], None)


_OPENERS: dict[str, Callable[[str, str], Images]] = {
    "npz": _open_npz,
    "cifar10": partial(_open_splits, "cifar10", _load_cifar10),
    "mnist": partial(_open_splits, "mnist", _load_mnist),
    "digits": partial(_open_splits, "digits", _load_digits),
    "imagefolder": _open_imagefolder,
    "images": _open_images,
}
