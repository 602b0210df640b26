"""Sets of image files, read and resized when they are needed."""

from __future__ import annotations

import copy
import hashlib
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ttcompress.data.augment import random_crop_box
from ttcompress.data.sets import Images, Pixels, SampledBatch
from ttcompress.errors import DataError, shortlist
from ttcompress.records.report import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Sample = tuple[str, int | None]
"""Path of an image file, and its label."""
ReadImage = tuple[Pixels | str, int | None]
"""Pixels (H, W, C) of an image file, or why it cannot be read, and its label."""
_COLOUR_MODES = {1: "L", 3: "RGB"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
"""What is read, whatever a file is called: others, such as PostScript, start a program."""
SAMPLED_SIZES = 4096
"""So many files tell by their sizes whether images are the same."""


class FolderImages(Images):
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
        """The images at these places, in this order."""
        part = copy.copy(self)
        part._samples = [self._samples[index] for index in indices]
        return part

    def digest(self) -> str:
        """Of names and labels of all files, and the sizes of some."""
        content = hashlib.sha256()
        for path, label in self._samples:
            content.update(
                f"{Path(path).parent.name}/{Path(path).name} {label}\n".encode(errors="surrogateescape")
            )
        for path, _ in self._samples[:: max(1, len(self._samples) // SAMPLED_SIZES)]:
            content.update(f"{_size_of(path)}\n".encode())
        return content.hexdigest()

    def statistics(self) -> Preprocessing:
        """Refuse: a folder is not read as a whole.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.name} is a folder, whose statistics are not computed: give --mean and --std")

    def _check_channels(self, channels: int) -> None:
        if channels not in _COLOUR_MODES:
            raise DataError(
                f"{self.name}: image files have 1 or 3 channels, the normalisation is for {channels}"
            )

    def _raw_batches(
        self, preprocessing: Preprocessing, batch_size: int, count: int, workers: int
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        files = _EvaluationFiles(self._samples[:count], preprocessing)
        # Without a generator of its own the loader would draw from, and so shift, the seeded global one.
        generator = torch.Generator()
        # The loader makes room for a batch, however large it may be.
        size = min(batch_size, max(1, count))
        for items in DataLoader(files, size, num_workers=workers, collate_fn=list, generator=generator):
            yield self._collated(items)

    crops_randomly = True

    def _raw_training_batches(
        self, preprocessing: Preprocessing, sampled: Sequence[SampledBatch], workers: int, random_crop: bool
    ) -> Iterator[tuple[Pixels, Tensor | None]]:
        keys = [
            [(int(index), tuple(own.tolist())) for index, own in zip(indices, numbers, strict=True)]
            for indices, numbers in sampled
        ]
        loader = DataLoader(
            _TrainingFiles(self._samples, preprocessing, random_crop),
            batch_sampler=keys,
            num_workers=workers,
            worker_init_fn=_ignore_interrupts,
            collate_fn=list,
            generator=torch.Generator(),
        )
        return (self._collated(items) for items in loader)

    def _collated(self, items: Sequence[ReadImage]) -> tuple[Pixels, Tensor | None]:
        pixels = _stack([item for item, _ in items], self.name)
        labels = torch.tensor([label for _, label in items]) if self.labelled else None
        return pixels, labels


def _size_of(path: str) -> int:
    file = Path(path)
    # What cannot be read is said when it is read.
    return file.stat().st_size if file.is_file() else -1


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that can save what is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _EvaluationFiles(Dataset[ReadImage]):
    """Image files, resized and cropped in the centre; one that cannot be read gives the reason instead.

    An error raised in a worker process would come out as a traceback of many lines.
    """

    def __init__(self, samples: Sequence[Sample], preprocessing: Preprocessing) -> None:
        self._samples = samples
        self._preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> ReadImage:
        return self._read(index, lambda image: _resize_and_crop(image, self._preprocessing))

    def _read(self, index: int, crop: Callable[[Image], Image]) -> ReadImage:
        from PIL import Image
        from PIL.Image import DecompressionBombError

        path, label = self._samples[index]
        mode = _COLOUR_MODES[len(self._preprocessing.mean)]
        try:
            if not Path(path).is_file():
                raise ValueError("it is no ordinary file")
            with Image.open(path, formats=FORMATS) as image:
                pixels = np.asarray(crop(_eight_bits(image).convert(mode)))
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
            return f"{path} is not a readable image: {error}", label
        # Grey images have no axis of channels.
        return pixels.reshape(*pixels.shape[:2], -1), label


def _eight_bits(image: Image) -> Image:
    """Grey images of 16 bits a pixel by their upper eight, as PIL reads coloured ones; it would clip them to white."""
    is_wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not is_wide:
        if image.mode in ("I", "F"):
            raise ValueError(
                f"its pixels, of PIL's mode {image.mode}, have no range that is known: convert it to 8 bits"
            )
        return image
    from PIL.Image import fromarray

    return fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


class _TrainingFiles(_EvaluationFiles):
    """Image files, cropped at random and resized where the network's input size is known."""

    def __init__(self, samples: Sequence[Sample], preprocessing: Preprocessing, random_crop: bool) -> None:
        super().__init__(samples, preprocessing)
        self._random_crop = random_crop

    def __getitem__(self, key: tuple[int, tuple[float, ...]]) -> ReadImage:  # type: ignore[override]
        index, numbers = key
        return self._read(index, lambda image: self._crop(image, numbers))

    def _crop(self, image: Image, numbers: Sequence[float]) -> Image:
        if self._preprocessing.input_size is None or not self._random_crop:
            return _resize_and_crop(image, self._preprocessing)
        from torchvision.transforms import functional

        _, height, width = self._preprocessing.input_size
        # The first number is for the mirror.
        top, left, tall, wide = random_crop_box(numbers[1:], image.height, image.width)
        cropped: Image = functional.resized_crop(image, top, left, tall, wide, [height, width])
        return cropped


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

    images = [item for item in items if not isinstance(item, str)]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise DataError(
            f"{name} has images of several sizes, {shortlist(sorted(sizes), 3)}, and the network's is unknown"
        )
    return np.stack(images)
