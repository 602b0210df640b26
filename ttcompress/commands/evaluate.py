"""Accuracy of a dense checkpoint or a compressed file."""

from __future__ import annotations

from pathlib import Path

from ttcompress.commands.inputs import accuracy_on, measured_images, preprocessing_for
from ttcompress.errors import DataError
from ttcompress.measure.accuracy import Predictions
from ttcompress.networks.opening import open_any
from ttcompress.recipe import Recipe
from ttcompress.records.common import Progress
from ttcompress.records.report import Accuracy
from ttcompress.settings import Settings


def evaluate_file(path: Path, recipe: Recipe, *, progress: Progress | None = None) -> tuple[Accuracy, str]:
    """Accuracy of a dense checkpoint or a compressed file on `recipe.data`, and the name of that data.

    Raises:
        TTCompressError: no data named, or whatever does not fit.
    """
    images = measured_images(recipe)
    if images is None:
        raise DataError("name the labelled images with --data")

    settings = Settings.of(recipe)
    network = open_any(path, recipe.arch, settings.key)
    preprocessing = preprocessing_for(settings, network.preprocessing, images)
    metric = accuracy_on(images, preprocessing, settings, progress)
    predictions: Predictions = metric.measure(network.model)
    return predictions.accuracy(), images.name
