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
from ttcompress.runtime import chosen_device
from ttcompress.settings import Settings

Score = Callable[[nn.Module], float]
"""What a search goes by: a figure of a network, higher is better."""


@dataclass(frozen=True)
class Metric:
    """How to measure a network, and how to put its measurement before and after into the report's `accuracy`."""

    measure: Callable[[nn.Module], Any]
    summary: Callable[[Any, Any], Json]


@dataclass(frozen=True)
class Inputs:
    """What a compression is measured by (`metric`), searches by (`score`) and is fitted to (`calibration`)."""

    metric: Metric | None = None
    score: Score | None = None
    calibration: Calibration | None = None


def open_inputs(network: Network, settings: Settings, progress: Progress | None) -> tuple[Network, Inputs]:
    """The network with its normalisation, and the data that the recipe names, in that normalisation."""
    recipe = settings.recipe
    data = measured_images(recipe)
    val = labelled(recipe.val, "train") if recipe.val else None
    calib = open_data(recipe.calib, "train") if recipe.calib else None

    preprocessing = preprocessing_for(settings, network.preprocessing, data or calib or val)
    measured = partial(accuracy_on, preprocessing=preprocessing, settings=settings, progress=progress)
    inputs = Inputs(
        metric=measured(data) if data else None,
        score=score_by(measured(val)) if val else None,
        calibration=_calibration(calib, preprocessing, settings) if calib else None,
    )
    return replace(network, preprocessing=preprocessing), inputs


def measured_images(recipe: Recipe) -> Images | None:
    """The labelled images that accuracy is reported on: the first `limit` of them."""
    if recipe.limit is not None and recipe.data is None:
        raise DataError("--limit needs --data, the images to measure accuracy on")
    if recipe.data is None:
        return None
    images = labelled(recipe.data)
    return images if recipe.limit is None else images.chosen(range(min(recipe.limit, len(images))))


def calibration_name(settings: Settings) -> str | None:
    """The name of the images to calibrate on, as reports have it."""
    calib = settings.recipe.calib
    return open_data(calib, "train").name if calib else None


def labelled(reference: str, split: str = "test") -> Images:
    """The images of a reference, whose labels are needed.

    Raises:
        DataError: there are none.
    """
    images = open_data(reference, split)
    images.require_labels()
    return images


def _calibration(images: Images, preprocessing: Preprocessing | None, settings: Settings) -> Calibration:
    known = preprocessing or images.statistics()

    def batches(indices: Sequence[int]) -> Iterator[Tensor]:
        chosen = images.chosen(indices)
        for batch, _ in chosen.batches(known, settings.batch_size, workers=settings.workers):
            yield batch

    return draw(images.name, len(images), settings.recipe.calib_images, settings.seed, batches)


def score_by(metric: Metric) -> Score:
    """Top-1 accuracy in percent."""

    def top1(model: nn.Module) -> float:
        predictions: Predictions = metric.measure(model)
        return predictions.accuracy().top1

    return top1


def accuracy_on(
    images: Images, preprocessing: Preprocessing | None, settings: Settings, progress: Progress | None
) -> Metric:
    """Accuracy on images, in the normalisation that is known or else that of the data."""
    known = preprocessing or images.statistics()
    batches = partial(images.batches, known, settings.batch_size, workers=settings.workers)
    return accuracy_of(batches, images.name, chosen_device(settings.device), progress)


def accuracy_of(batches: Callable[[], Batches], name: str, device: torch.device, progress: Progress | None) -> Metric:
    """Accuracy on labelled batches, made anew for every measurement."""

    def measure(model: nn.Module) -> Predictions:
        return predict(model.to(device), batches(), device, progress)

    def summary(dense: Predictions, compressed: Predictions) -> Json:
        return compare(dense, compressed, name).to_json()

    return Metric(measure, summary)


def preprocessing_for(settings: Settings, known: Preprocessing | None, images: Images | None) -> Preprocessing | None:
    """What the user says, else what the architecture was trained with, else the statistics of the data."""
    mean, std = settings.recipe.mean, settings.recipe.std
    if bool(mean) != bool(std):
        raise DataError("--mean and --std are given together")

    if mean:
        return replace(known, mean=mean, std=std) if known else Preprocessing(mean, std)
    return known or (images.statistics() if images else None)


def tensor_calibration(calib: Tensor | Iterable[Any], settings: Settings) -> Calibration:
    """Calibration on inputs in memory: one tensor, or batches of inputs or of tuples that begin with them.

    Raises:
        DataError: none, too few, or NaN.
    """
    given = [calib] if isinstance(calib, Tensor) else list(calib)
    batches = [each if isinstance(each, Tensor) else each[0] for each in given]
    if not batches:
        raise DataError("calib holds no inputs")

    inputs = torch.cat(batches).detach().cpu()
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise DataError("calib holds NaN or Inf")

    def parts(indices: Sequence[int]) -> Iterator[Tensor]:
        size = settings.batch_size
        for start in range(0, len(indices), size):
            yield inputs[torch.tensor(indices[start : start + size])]

    return draw("calib", len(inputs), settings.recipe.calib_images, settings.seed, parts)
