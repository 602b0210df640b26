"""What a dense checkpoint or a compressed file is worth: accuracy, or another figure on texts."""

from __future__ import annotations

from pathlib import Path

from ttcompress.commands.inputs import accuracy_on, measured_images, preprocessing_for, reads_text
from ttcompress.commands.named_inputs import named_metric
from ttcompress.commands.texts import COSINE, text_metric
from ttcompress.data.named_arrays import names_inputs, open_named_arrays
from ttcompress.data.text import open_texts
from ttcompress.errors import DataError
from ttcompress.measure.accuracy import Predictions
from ttcompress.networks.opening import Network, open_any
from ttcompress.recipe import Recipe
from ttcompress.records.common import Progress
from ttcompress.records.report import Accuracy, Figure
from ttcompress.settings import Settings


def evaluate_file(
    path: Path, recipe: Recipe, *, progress: Progress | None = None
) -> tuple[Accuracy | Figure, str]:
    """What a dense checkpoint or a compressed file is worth on `recipe.data`, and the name of that data.

    On images, and on texts with classes, that is accuracy.

    Raises:
        TTCompressError: no data named, or whatever does not fit.
    """
    settings = Settings.of(recipe)
    if recipe.data is not None and reads_text(recipe):
        network = open_any(path, recipe.arch, settings.key)
        return _on_texts(network, recipe.data, settings, progress)

    if recipe.data is not None and names_inputs(recipe.data):
        model = open_any(path, recipe.arch, settings.key).model
        metric = named_metric(recipe.data, model, settings, progress, recipe.limit)
        named: Predictions = metric.measure(model)
        return named.accuracy(), open_named_arrays(recipe.data).name

    images = measured_images(recipe)
    if images is None:
        raise DataError("name labelled images, or texts, with --data")

    network = open_any(path, recipe.arch, settings.key)
    preprocessing = preprocessing_for(settings, network.preprocessing, images)
    metric = accuracy_on(images, preprocessing, settings, progress)
    predictions: Predictions = metric.measure(network.model)
    return predictions.accuracy(), images.name


def _on_texts(
    network: Network, reference: str, settings: Settings, progress: Progress | None
) -> tuple[Accuracy | Figure, str]:
    metric = text_metric(reference, network.reader, settings, progress, settings.recipe.limit)
    found = metric.measure(network.model)
    if isinstance(found, Predictions):
        return found.accuracy(), open_texts(reference).name

    summary = metric.summary(found, found)
    if summary["metric"] == COSINE:
        raise DataError(
            f"{reference}: texts alone say how alike two networks are, not how good one is: name pairs with scores, "
            "as stsb:FILE"
        )
    interval = summary["interval"] and tuple(summary["interval"])
    figure = Figure(summary["metric"], summary["compressed"], summary["n"], summary["unit"], interval)
    return figure, summary["data"]
