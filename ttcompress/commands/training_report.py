"""What is reported of a training: what was known before, with the history and all that is measured anew."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ttcompress.commands.inputs import accuracy_on, measured_images
from ttcompress.commands.starting_point import StartingPoint
from ttcompress.commands.texts import text_metric
from ttcompress.commands.training import TrainingData
from ttcompress.data.sets import Images
from ttcompress.data.text import names_texts
from ttcompress.files.tensors import tensor_bytes
from ttcompress.measure.accuracy import Predictions, compare
from ttcompress.networks.stored import stored_sha256, stored_tensors
from ttcompress.networks.weights import tied_weights, weight_of
from ttcompress.records.common import Json, Progress
from ttcompress.records.extras import Extras
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Report
from ttcompress.settings import Settings
from ttcompress.train.loop import best_epoch
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State
from ttcompress.tt.decompose import frobenius_norm
from ttcompress.version import __version__

ELSEWHERE = ("data", "limit", "val", "train", "teacher", "arch", "key", "device", "workers")
"""Options that the report has in another form, or that say where things are."""


def trained_report(
    start: StartingPoint,
    settings: Settings,
    setup: TrainingSetup,
    state: State,
    data: TrainingData,
    progress: Progress | None,
    extras: Extras | None = None,
) -> Report:
    """What was known before, with the training, the new errors of the weights and, with --data, the new accuracy."""
    model = start.network.model.eval()
    former = start.report or _dense_report(start, settings)

    accuracy = None
    if setup.world.leads and settings.recipe.data is not None:
        if names_texts(settings.recipe.data):
            accuracy = _on_texts(settings.recipe.data, start, former, settings, progress)
        elif images := measured_images(settings.recipe):
            accuracy = _accuracy(images, start, former, settings, data, progress, extras)

    stated = settings.recipe.to_json()
    finetuning = {
        "train": data.train,
        "val": data.val,
        "teacher": data.teacher,
        "options": {name: value for name, value in stated.items() if name not in ELSEWHERE},
        "precision": state.precision,
        "start_counts": setup.start_counts,
        "best": best_epoch(state.history, setup.start_counts)["epoch"],
        "before": former.accuracy,
        "history": state.history,
    }
    layers = [
        replace(layer, relative_error=_error(layer, start.original, model)) for layer in former.plan.layers
    ]
    stored = stored_tensors(model, start.network.tensors, former.plan)
    return replace(
        former,
        tensors_sha256=stored_sha256(stored) if start.report else None,
        bench=None,
        plan=former.plan.with_layers(layers),
        version=__version__,
        preprocessing=data.preprocessing,
        accuracy=accuracy,
        finetuning=finetuning,
    )


def _dense_report(start: StartingPoint, settings: Settings) -> Report:
    """Of a dense network: nothing is replaced."""
    network = start.network
    kept = [KeptParameter(name, each.numel(), "dense", "") for name, each in network.model.named_parameters()]
    size = tensor_bytes(stored_tensors(network.model, network.tensors))
    return Report(
        CompressionPlan((), tuple(kept)),
        size,
        size,
        __version__,
        settings.seed,
        source=network.source or {},
        architecture=network.architecture,
        tied=tied_weights(network.model),
    )


def _accuracy(
    images: Images,
    start: StartingPoint,
    former: Report,
    settings: Settings,
    data: TrainingData,
    progress: Progress | None,
    extras: Extras | None,
) -> Json:
    """Beside the dense network's, where that is at hand or was measured on the same images before."""
    metric = accuracy_on(images, data.preprocessing, settings, progress, extras)
    found: Predictions = metric.measure(start.network.model)
    if start.original is not None:
        return metric.summary(metric.measure(start.original), found)

    ours = compare(found, found, images.name).to_json()
    is_known = former.accuracy is not None and former.accuracy.get("data") == images.name
    known = former.accuracy if is_known and former.accuracy else {}
    theirs = {name: known.get(name) for name in ("dense", "dense_top5", "dense_interval")}
    return {**ours, **theirs, "agreement": None, "lost_interval": None}


def _on_texts(
    reference: str, start: StartingPoint, former: Report, settings: Settings, progress: Progress | None
) -> Json:
    """Beside the dense network's figure, where that network is at hand or was measured on the same texts before."""
    metric = text_metric(reference, start.network.reader, settings, progress, settings.recipe.limit)
    found = metric.measure(start.network.model)
    if start.original is not None:
        return metric.summary(metric.measure(start.original), found)

    ours = metric.summary(found, found)
    known = former.accuracy or {}
    is_known = known.get("data") == ours["data"] and known.get("metric") == ours.get("metric")
    theirs = {name: known.get(name) if is_known else None for name in ("dense", "dense_interval")}
    # How alike two networks are needs both.
    return {**ours, **theirs, "lost_interval": None, "beside": {}}


def _error(layer: LayerPlan, original: nn.Module | None, model: nn.Module) -> float | None:
    """Of a weight as it is now against the dense one, where that is at hand."""
    if original is None:
        return None
    dense, trained = (weight_of(network, layer) for network in (original, model))
    norm = frobenius_norm(dense)
    return frobenius_norm(dense - trained.to(dense)) / norm if norm else 0.0
