"""What a run learns from and is measured by: data references, opened in the normalisation of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.data.calibration_images import Calibration, draw
from ttcompress.data.opening import open_data
from ttcompress.data.sets import Images
from ttcompress.errors import DataError
from ttcompress.measure.accuracy import Batches, Predictions, compare, predict
from ttcompress.networks.opening import Network
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.report import Preprocessing
from ttcompress.runtime import device_of

BATCH_SIZE = 128


@dataclass(frozen=True)
class Meter:
    """How to measure a network, and how to put two measurements into the report's `accuracy`."""

    run: Callable[[nn.Module], Any]
    summary: Callable[[Any, Any], Json]


@dataclass(frozen=True)
class Sources:
    """What a compression learns from and is measured by: the report's `meter`, the search's `judge`, calibration."""

    meter: Meter | None = None
    judge: Callable[[nn.Module], float] | None = None
    calibration: Calibration | None = None


def with_sources(network: Network, recipe: Recipe, progress: Progress | None) -> tuple[Network, Sources]:
    """The network with its normalisation, and the data that the recipe names, in that normalisation."""
    images = labelled(recipe.data) if recipe.data else None
    val = labelled(recipe.val, "train") if recipe.val else None
    calib = open_data(recipe.calib, "train") if recipe.calib else None
    preprocessing = preprocessing_for(recipe, network.preprocessing, images or calib or val)
    meter = images_meter(images, preprocessing, recipe, progress) if images else None
    judge = judge_by(images_meter(val, preprocessing, recipe, progress)) if val else None
    calibration = _calibration(calib, preprocessing, recipe) if calib else None
    return replace(network, preprocessing=preprocessing), Sources(meter, judge, calibration)


def calibration_images(recipe: Recipe) -> str | None:
    """The name of the images to calibrate on, as reports have it."""
    return open_data(recipe.calib, "train").name if recipe.calib else None


def labelled(reference: str, split: str = "test") -> Images:
    """The images of a reference, whose labels are needed.

    Raises:
        DataError: there are none.
    """
    images = open_data(reference, split)
    images.require_labels()
    return images


def _calibration(images: Images, preprocessing: Preprocessing | None, recipe: Recipe) -> Calibration:
    known = preprocessing or images.statistics()
    size, workers = recipe.batch_size or BATCH_SIZE, recipe.workers or 0

    def batches(indices: Sequence[int]) -> Iterator[Tensor]:
        return (batch for batch, _ in images.chosen(indices).batches(known, size, workers=workers))

    return draw(images.name, len(images), recipe.calib_images, recipe.seed or 0, batches)


def judge_by(meter: Meter) -> Callable[[nn.Module], float]:
    """Top-1 accuracy in percent, as the search sees it."""

    def accuracy(model: nn.Module) -> float:
        predictions: Predictions = meter.run(model)
        return predictions.accuracy().top1

    return accuracy


def images_meter(
    images: Images,
    preprocessing: Preprocessing | None,
    recipe: Recipe,
    progress: Progress | None,
    limit: int | None = None,
) -> Meter:
    """Accuracy on the first `limit` images, in the normalisation that is known or else that of the data."""
    known = preprocessing or images.statistics()
    make = partial(images.batches, known, recipe.batch_size or BATCH_SIZE, limit, recipe.workers or 0)
    return classification(make, images.name, device_of(recipe), progress)


def classification(batches: Callable[[], Batches], name: str, device: torch.device, progress: Progress | None) -> Meter:
    """Accuracy on labelled batches, made anew for every measurement."""

    def run(model: nn.Module) -> Predictions:
        return predict(model.to(device), batches(), device, progress)

    return Meter(run, lambda dense, compressed: compare(dense, compressed, name).to_json())


def preprocessing_for(recipe: Recipe, known: Preprocessing | None, images: Images | None) -> Preprocessing | None:
    """What the user says, else what the architecture was trained with, else the statistics of the data."""
    if bool(recipe.mean) != bool(recipe.std):
        raise DataError("--mean and --std are given together")
    if recipe.mean and known:
        return replace(known, mean=recipe.mean, std=recipe.std)
    if recipe.mean:
        return Preprocessing(recipe.mean, recipe.std)
    return known or (images.statistics() if images else None)


def tensor_calibration(calib: Tensor | Iterable[Any], recipe: Recipe) -> Calibration:
    """Calibration on inputs in memory: one tensor, or batches of inputs or of tuples that begin with them.

    Raises:
        DataError: none, too few, or NaN.
    """
    batches = (
        [calib] if isinstance(calib, Tensor) else [each if isinstance(each, Tensor) else each[0] for each in calib]
    )
    if not batches:
        raise DataError("calib holds no inputs")
    inputs = torch.cat(batches).detach().cpu()
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise DataError("calib holds NaN or Inf")
    size = recipe.batch_size or BATCH_SIZE
    return draw(
        "calib",
        len(inputs),
        recipe.calib_images,
        recipe.seed or 0,
        lambda indices: (inputs[torch.tensor(part)] for part in _parts(indices, size)),
    )


def _parts(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (indices[start : start + size] for start in range(0, len(indices), size))
