"""Data references `KIND:PATH[@SPLIT]` -> batches of normalised images."""

from __future__ import annotations

import copy
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ttcompress.data.augment import cut_out
from ttcompress.errors import DataError, shortlist
from ttcompress.records.report import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Batch = tuple[Tensor, Tensor | None]
Arrays = tuple[Pixels, Labels | None]
Sample = tuple[str, int | None]
Parts = tuple[NDArray[np.int64], Tensor]

_KINDS = "npz:FILE, cifar10:ROOT, mnist:ROOT, imagefolder:ROOT, images:DIR, digits"
_SPLITS = ("train", "test")
_COLOUR_MODES = {1: "L", 3: "RGB"}


class Images(ABC):
    """A set of images in fixed order, labelled or not.

    `name` is the reference without directories, `image_size` (C, H, W) where all images share it, and labels lie in
    0 ... `num_classes` - 1.
    """

    def __init__(self, name: str, num_classes: int | None, image_size: tuple[int, int, int] | None) -> None:
        self.name = name
        self.num_classes = num_classes
        self.image_size = image_size

    @property
    def labelled(self) -> bool:
        """Whether batches carry labels."""
        return self.num_classes is not None

    def require_labels(self) -> None:
        """Refuse a set without labels where accuracy is to be measured or trained for.

        Raises:
            DataError: there are no labels.
        """
        if not self.labelled:
            raise DataError(f"{self.name} has no labels, which are needed here: only --calib takes unlabelled images")

    def batches(
        self, preprocessing: Preprocessing, batch_size: int, limit: int | None = None, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield (float32 images (N, C, H, W), int64 labels (N,) or None) on the CPU, over the first `limit` images.

        Images are scaled to [0, 1] and normalised. Those of folders are also resized (shorter side) and centre cropped
        by `workers` processes; others keep their size.

        Raises:
            DataError: `preprocessing` is for another number of channels, or an image cannot be read.
        """
        self._check_normalisation(preprocessing)
        count = len(self) if limit is None else min(limit, len(self))
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        raw = self._raw_batches(preprocessing, batch_size, count, workers)
        return (((_channels_first(pixels) - mean) / std, labels) for pixels, labels in raw)

    def training_batches(
        self, preprocessing: Preprocessing, parts: Sequence[Parts], workers: int = 0, cut: bool = True
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (uint8 images (N, C, H, W), int64 labels (N,) or None) on the CPU, a batch a part.

        A part holds indices (N,) and random numbers (N, DRAWS) of augment.py, by which images of folders are cut out
        and resized to the network's input size, or, without `cut`, resized and cropped as for evaluation; others are as
        they are. Those of folders are read by `workers` processes.

        Raises:
            DataError: `preprocessing` is for another number of channels, or an image cannot be read.
        """
        self._check_normalisation(preprocessing)
        raw = self._raw_training_batches(preprocessing, parts, workers, cut)
        return ((torch.from_numpy(pixels).permute(0, 3, 1, 2), labels) for pixels, labels in raw)

    def _check_normalisation(self, preprocessing: Preprocessing) -> None:
        if len(preprocessing.mean) != len(preprocessing.std):
            raise DataError(f"mean {preprocessing.mean} and std {preprocessing.std} need one value a channel each")
        self._check_channels(len(preprocessing.mean))

    @property
    @abstractmethod
    def cuts(self) -> bool:
        """Whether `training_batches` cuts out random parts."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def chosen(self, indices: Sequence[int]) -> Images:
        """The images at these places, in this order."""

    @abstractmethod
    def statistics(self) -> Preprocessing:
        """Mean and standard deviation of each channel over the training split, where there is one, as normalisation.

        Raises:
            DataError: the set is a folder, which is not read as a whole, or a channel is constant.
        """

    @abstractmethod
    def _check_channels(self, channels: int) -> None: ...

    @abstractmethod
    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]: ...

    @abstractmethod
    def _raw_training_batches(
        self, preprocessing: Preprocessing, parts: Sequence[Parts], workers: int, cut: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]: ...


def _channels_first(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


class _ArrayImages(Images):
    """Images held in memory as uint8 (N, H, W, C); `train` loads the training split where this is another."""

    def __init__(self, name: str, arrays: Arrays, train: Callable[[], Arrays] | None = None) -> None:
        self._images, self._labels = arrays
        height, width, channels = self._images.shape[1:]
        num_classes = None if self._labels is None else int(self._labels.max()) + 1
        super().__init__(name, num_classes, (channels, height, width))
        self._train = train

    def __len__(self) -> int:
        return len(self._images)

    def chosen(self, indices: Sequence[int]) -> Images:
        at = np.asarray(indices, dtype=np.int64)
        part = copy.copy(self)
        part._images, part._labels = self._images[at], None if self._labels is None else self._labels[at]
        part._train = self._train or (lambda: (self._images, self._labels))
        return part

    def statistics(self) -> Preprocessing:
        images = self._train()[0] if self._train else self._images
        values = np.arange(256) / 255
        # A histogram gives the exact sums without a float64 copy of the images.
        shares = [
            np.bincount(images[..., c].ravel(), minlength=256) / images[..., c].size for c in range(images.shape[-1])
        ]
        means = [float(share @ values) for share in shares]
        deviations = [float(np.sqrt(share @ (values - mean) ** 2)) for share, mean in zip(shares, means, strict=True)]
        if min(deviations) == 0:
            raise DataError(
                f"{self.name}: a channel is the same everywhere and cannot be normalised: give --mean, --std"
            )
        return Preprocessing(tuple(means), tuple(deviations), self.image_size)

    def _check_channels(self, channels: int) -> None:
        have = self._images.shape[-1]
        if have != channels:
            raise DataError(
                f"{self.name} has images (N, H, W, C) of shape {self._images.shape} with {have} channels, "
                f"the normalisation is for {channels}: use data that fits the network, or give --mean and --std"
            )

    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        for start in range(0, count, batch_size):
            part = slice(start, min(start + batch_size, count))
            yield self._images[part], None if self._labels is None else torch.from_numpy(self._labels[part])

    cuts = False

    def _raw_training_batches(
        self, preprocessing: Preprocessing, parts: Sequence[Parts], workers: int, cut: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        for at, _ in parts:
            yield self._images[at], None if self._labels is None else torch.from_numpy(self._labels[at])


class _FolderImages(Images):
    """Image files, read when they are needed.

    Their order is a fixed shuffle: files are sorted by class, and the first few should not all be of one.
    """

    def __init__(self, name: str, samples: Sequence[Sample], num_classes: int | None) -> None:
        super().__init__(name, num_classes, None)
        self._samples = sorted(samples)
        random.Random(0).shuffle(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def chosen(self, indices: Sequence[int]) -> Images:
        part = copy.copy(self)
        part._samples = [self._samples[index] for index in indices]
        return part

    def statistics(self) -> Preprocessing:
        raise DataError(f"{self.name} is a folder, whose statistics are not computed: give --mean and --std")

    def _check_channels(self, channels: int) -> None:
        if channels not in _COLOUR_MODES:
            raise DataError(f"{self.name}: image files have 1 or 3 channels, the normalisation is for {channels}")

    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        files = _Files(self._samples[:count], preprocessing)
        # Without a generator of its own the loader would draw from, and so shift, the seeded global one.
        generator = torch.Generator()
        for items in DataLoader(files, batch_size, num_workers=workers, collate_fn=list, generator=generator):
            yield self._collated(items)

    cuts = True

    def _raw_training_batches(
        self, preprocessing: Preprocessing, parts: Sequence[Parts], workers: int, cut: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        wanted = [[(int(i), tuple(n.tolist())) for i, n in zip(at, numbers, strict=True)] for at, numbers in parts]
        files = _CutFiles(self._samples, preprocessing, cut)
        generator = torch.Generator()
        loader = DataLoader(
            files,
            batch_sampler=wanted,
            num_workers=workers,
            worker_init_fn=_leave_interrupts,
            collate_fn=list,
            generator=generator,
        )
        return (self._collated(items) for items in loader)

    def _collated(self, items: Sequence[tuple[Pixels | str, int | None]]) -> tuple[Pixels, Tensor | None]:
        pixels = _stack([item for item, _ in items], self.name)
        return pixels, torch.tensor([label for _, label in items]) if self.labelled else None


def _leave_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that can save what is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Files(Dataset[tuple[Pixels | str, int | None]]):
    """Image files as uint8 (H, W, C); one that cannot be read gives the reason, for workers raise tracebacks."""

    def __init__(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> None:
        self._samples = samples
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Pixels | str, int | None]:
        return self._read(index, lambda image: _resize_and_crop(image, self._preprocessing))

    def _read(self, index: int, cut: Callable[[Image], Image]) -> tuple[Pixels | str, int | None]:
        from PIL import Image
        from PIL.Image import DecompressionBombError

        path, label = self._samples[index]
        mode = _COLOUR_MODES[len(self._preprocessing.mean)]
        try:
            with Image.open(path) as image:
                pixels = np.asarray(cut(image.convert(mode)))
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
            return f"{path} is not a readable image: {error}", label
        return pixels.reshape(*pixels.shape[:2], -1), label


class _CutFiles(_Files):
    """The same, a part of random place, area and aspect cut out and resized, where the network's size is known."""

    def __init__(self, samples: Sequence[Sample], preprocessing: Preprocessing, cut: bool) -> None:
        super().__init__(samples, preprocessing)
        self._cuts = cut

    def __getitem__(self, wanted: tuple[int, tuple[float, ...]]) -> tuple[Pixels | str, int | None]:  # type: ignore[override]
        index, numbers = wanted
        return self._read(index, lambda image: self._cut(image, numbers))

    def _cut(self, image: Image, numbers: Sequence[float]) -> Image:
        if self._preprocessing.input_size is None or not self._cuts:
            return _resize_and_crop(image, self._preprocessing)
        from torchvision.transforms import functional

        _, height, width = self._preprocessing.input_size
        # The first number is for the mirror.
        top, left, tall, wide = cut_out(numbers[1:], image.height, image.width)
        cut: Image = functional.resized_crop(image, top, left, tall, wide, [height, width])
        return cut


def _resize_and_crop(image: Image, preprocessing: Preprocessing) -> Image:
    if preprocessing.input_size is None:
        return image
    from torchvision.transforms import functional

    _, height, width = preprocessing.input_size
    resized = functional.resize(image, [preprocessing.resize or max(height, width)])
    cropped: Image = functional.center_crop(resized, [height, width])
    return cropped


def _stack(items: Sequence[Pixels | str], name: str) -> Pixels:
    problems = [item for item in items if isinstance(item, str)]
    if problems:
        raise DataError(shortlist(problems, 1))
    sizes = {item.shape[:2] for item in items if not isinstance(item, str)}
    if len(sizes) > 1:
        raise DataError(
            f"{name} has images of several sizes, {shortlist(sorted(sizes), 3)}, and the network's is unknown"
        )
    return np.stack([item for item in items if not isinstance(item, str)])


def open_data(reference: str, split: str = "test") -> Images:
    """Open `KIND:PATH[@train|@test]`; `split` counts where the reference names none.

    Raises:
        DataError: an unknown kind, or nothing readable of that kind there.
    """
    kind, colon, path = reference.partition(":")
    if not colon and kind.split("@")[0] == "digits":
        kind, path = "digits", kind.removeprefix("digits")
    if kind not in _OPENERS:
        raise DataError(f"unknown kind of data {reference!r}: it is one of {_KINDS}")
    if not path and kind != "digits":
        raise DataError(f"{reference!r} names no place: write {kind}:PATH")
    if split not in _SPLITS:
        raise DataError(f"unknown split {split!r}: it is one of {shortlist(_SPLITS)}")
    return _OPENERS[kind](path, split)


def _split_off(path: str, default: str) -> tuple[str, str]:
    head, _, tail = path.rpartition("@")
    return (head, tail) if tail in _SPLITS else (path, default)


def _open_splits(kind: str, load: Callable[[str, str], Arrays], path: str, default: str) -> Images:
    root, split = _split_off(path, default)
    train = None if split == "train" else partial(load, root, "train")
    return _ArrayImages(f"{kind}@{split}", load(root, split), train)


def _open_npz(path: str, default: str) -> Images:
    file = _without_split(path)
    return _ArrayImages(f"npz:{file.name}", _load_npz(file))


def _without_split(path: str) -> Path:
    whole, (head, tail) = Path(path).expanduser(), _split_off(path, "")
    if tail and not whole.exists():
        raise DataError(
            f"{path}: @{tail} cannot be chosen, there is one split only: leave it out or name {head}'s twin"
        )
    return whole


def _load_npz(file: Path) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as archive:
            content = {key: archive[key] for key in ("images", "labels") if key in archive}
    except FileNotFoundError:
        raise DataError(f"no file {file}") from None
    except Exception as error:
        # What a damaged archive raises depends on where the damage is: zipfile, zlib and NumPy have their own errors.
        raise DataError(f"{file} is not a readable npz file of plain arrays ({type(error).__name__})") from error
    if "images" not in content:
        raise DataError(f"{file} has no array 'images': write it with numpy.savez(file, images=..., labels=...)")
    return _check_images(content["images"], str(file)), _check_labels(content, str(file))


def _check_images(images: NDArray[Any], where: str) -> Pixels:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{where}: images are {images.dtype} of shape {images.shape}, not uint8 of shape (N, H, W) or (N, H, W, C)"
        )
    if images.size == 0:
        raise DataError(f"{where} holds no images")
    return images.reshape(*images.shape[:3], -1)


def _check_labels(content: dict[str, NDArray[Any]], where: str) -> Labels | None:
    if "labels" not in content:
        return None
    images, labels = content["images"], content["labels"]
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{where}: labels are {labels.dtype} of shape {labels.shape}, for {len(images)} images they have to be "
            f"integers of shape ({len(images)},)"
        )
    if labels.min() < 0:
        raise DataError(f"{where}: labels count from 0, the smallest is {labels.min()}")
    return labels.astype(np.int64)


def _load_cifar10(root: str, split: str) -> Arrays:
    folder = Path(root).expanduser()
    file = folder / f"cifar10-{split}.npz"
    if file.is_file():
        return _load_npz(file)
    from torchvision.datasets import CIFAR10

    try:
        dataset = CIFAR10(str(folder), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(f"no CIFAR-10 in {folder}: neither {file.name} nor an intact cifar-10-batches-py") from error
    return dataset.data, np.asarray(dataset.targets, dtype=np.int64)


def _load_mnist(root: str, split: str) -> Arrays:
    from torchvision.datasets import MNIST

    folder = Path(root).expanduser()
    try:
        dataset = MNIST(str(folder), train=split == "train", download=False)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise DataError(f"no MNIST in {folder}: it has to hold MNIST/raw with the four idx files") from error
    return dataset.data.numpy()[..., None], dataset.targets.numpy()


def _load_digits(root: str, split: str) -> Arrays:
    if root:
        raise DataError(f"digits come with scikit-learn and take no path, not {root!r}: write digits or digits@train")
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey values are 0 ... 16 there.
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    first_test = len(images) * 4 // 5
    part = slice(first_test) if split == "train" else slice(first_test, None)
    return images[part], digits.target[part].astype(np.int64)


def _open_imagefolder(path: str, default: str) -> Images:
    folder, subfolder = _choose_subfolder(path, default)
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(folder))
    except OSError as error:
        raise DataError(f"{folder} is not a folder of classes with images in each: {error}") from error
    return _FolderImages("imagefolder" + (f"@{subfolder}" if subfolder else ""), dataset.samples, len(dataset.classes))


def _choose_subfolder(path: str, default: str) -> tuple[Path, str]:
    head, _, tail = path.rpartition("@")
    if head and tail and (Path(head).expanduser() / tail).is_dir():
        return Path(head).expanduser() / tail, tail
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"no folder {root}" + (f", and no subfolder {tail} in {head}" if head else ""))
    names = {"train": ("train",), "test": ("test", "val")}[default]
    chosen = next((name for name in names if (root / name).is_dir()), "")
    others = [name for name in ("train", "test", "val") if (root / name).is_dir()]
    if others and not chosen:
        raise DataError(f"{root} has no {default} split but {shortlist(others)}: choose it, as in {path}@{others[0]}")
    return root / chosen, chosen


def _open_images(path: str, default: str) -> Images:
    folder = _without_split(path)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = [str(file) for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS]
    if not files:
        raise DataError(f"{folder} holds no images: {shortlist(IMG_EXTENSIONS, len(IMG_EXTENSIONS))} are read")
    return _FolderImages("images", [(file, None) for file in files], None)


_OPENERS: dict[str, Callable[[str, str], Images]] = {
    "npz": _open_npz,
    "cifar10": partial(_open_splits, "cifar10", _load_cifar10),
    "mnist": partial(_open_splits, "mnist", _load_mnist),
    "digits": partial(_open_splits, "digits", _load_digits),
    "imagefolder": _open_imagefolder,
    "images": _open_images,
}
