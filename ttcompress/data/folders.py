"""Sets of image files, read and resized when they are needed."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ttcompress.data.augment import cut_out
from ttcompress.data.sets import Images, Parts, Pixels
from ttcompress.errors import DataError, shortlist
from ttcompress.records.report import Preprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


Sample = tuple[str, int | None]
_COLOUR_MODES = {1: "L", 3: "RGB"}


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

    def statistics(self) -> Preprocessing:
        """Refuse: a folder is not read as a whole.

        Raises:
            DataError: always.
        """
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
