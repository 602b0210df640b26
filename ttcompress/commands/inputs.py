"""What a run learns from and is measured by: data references, opened in the normalisation of the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.commands.metric import Metric, accuracy_of
from ttcompress.commands.named_inputs import calibration_on, named_calibration, named_example, named_metric
from ttcompress.commands.samples import add_changed_samples
from ttcompress.commands.texts import all_texts, example_tokens, text_calibration, text_metric
from ttcompress.data.named_arrays import names_inputs, open_named_arrays
from ttcompress.data.opening import open_data
from ttcompress.data.sets import Images
from ttcompress.data.text import names_texts, open_texts
from ttcompress.errors import DataError
from ttcompress.measure.accuracy import Predictions
from ttcompress.networks.opening import Network
from ttcompress.networks.running import NetworkInput, batch_size, blaming, tensors_of
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.extras import Extras
from ttcompress.records.report import Preprocessing
from ttcompress.runtime import chosen_device
from ttcompress.settings import Settings


@dataclass(frozen=True)
class Inputs:
    """What a compression is measured by (`metric`), searches by (`searched`) and is fitted to (`calibration`).

    `example` is a batch to count, time and prove with.
    """

    metric: Metric | None = None
    searched: Metric | None = None
    calibration: Calibration | None = None
    example: NetworkInput | None = None


def open_inputs(
    network: Network, settings: Settings, progress: Progress | None, extras: Extras | None = None
) -> tuple[Network, Inputs]:
    """The network with its normalisation, and the data that the recipe names, in that normalisation.

    `extras` gets the samples that changed, once accuracy is measured.
    """
    recipe = settings.recipe
    if reads_text(recipe):
        return network, _text_inputs(network, settings, progress)

    data = measured_images(recipe)
    val = labelled(recipe.val, "train") if recipe.val and not names_inputs(recipe.val) else None
    calib = open_data(recipe.calib, "train") if recipe.calib and not names_inputs(recipe.calib) else None

    preprocessing = preprocessing_for(settings, network.preprocessing, data or calib or val)
    measured = partial(accuracy_on, preprocessing=preprocessing, settings=settings, progress=progress)
    inputs = Inputs(
        metric=measured(data, extras=extras) if data else None,
        searched=measured(val) if val else None,
        calibration=_calibration(calib, preprocessing, settings) if calib else None,
    )
    inputs = _with_named(inputs, network.model, settings, progress)
    return replace(network, preprocessing=preprocessing), inputs


def _with_named(inputs: Inputs, model: nn.Module, settings: Settings, progress: Progress | None) -> Inputs:
    """The same with what the recipe names that are arrays by the names of inputs."""
    recipe = settings.recipe
    references = {name: getattr(recipe, name) for name in ("data", "val", "calib")}
    named = {name: each for name, each in references.items() if each and names_inputs(each)}
    if not named:
        return inputs
    if recipe.mean:
        raise DataError("--mean and --std are for images: arrays by the names of inputs go in as they are")

    return replace(
        inputs,
        metric=named_metric(named["data"], model, settings, progress, recipe.limit)
        if "data" in named
        else inputs.metric,
        searched=named_metric(named["val"], model, settings, progress) if "val" in named else inputs.searched,
        calibration=named_calibration(named["calib"], model, settings)
        if "calib" in named
        else inputs.calibration,
        example=inputs.example or named_example(next(iter(named.values())), model),
    )


def reads_text(recipe: Recipe) -> bool:
    """Whether what the recipe names are texts.

    Raises:
        DataError: some of it is and some is not.
    """
    named = (recipe.data, recipe.val, recipe.calib, recipe.train)
    return all_texts([reference for reference in named if reference])


def _text_inputs(network: Network, settings: Settings, progress: Progress | None) -> Inputs:
    recipe = settings.recipe
    measured = partial(text_metric, reader=network.reader, settings=settings, progress=progress)
    first = recipe.calib or recipe.data or recipe.val or ""
    return Inputs(
        metric=measured(recipe.data, limit=recipe.limit) if recipe.data else None,
        searched=measured(recipe.val) if recipe.val else None,
        calibration=text_calibration(recipe.calib, network.reader, settings) if recipe.calib else None,
        example=example_tokens(first, network.reader, settings),
    )


def measured_images(recipe: Recipe) -> Images | None:
    """The labelled images that accuracy is reported on: the first `limit` of them."""
    if recipe.limit is not None and recipe.data is None:
        raise DataError("--limit needs --data")
    if recipe.data is None or names_inputs(recipe.data):
        return None
    images = labelled(recipe.data)
    return images if recipe.limit is None else images.chosen(range(min(recipe.limit, len(images))))


def calibration_name(settings: Settings) -> str | None:
    """The name of the images to calibrate on, as reports have it."""
    calib = settings.recipe.calib
    if calib is None:
        return None
    if names_texts(calib):
        return open_texts(calib).name
    return open_named_arrays(calib).name if names_inputs(calib) else open_data(calib, "train").name


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

    return draw_calibration(images.name, len(images), settings.recipe.calib_images, settings.seed, batches)


def accuracy_on(
    images: Images,
    preprocessing: Preprocessing | None,
    settings: Settings,
    progress: Progress | None,
    extras: Extras | None = None,
) -> Metric:
    """Accuracy on images, in the normalisation that is known or else that of the data.

    A summary of two networks adds the samples on which they differ to `extras`.
    """
    known = preprocessing or images.statistics()
    batches = partial(images.batches, known, settings.batch_size, workers=settings.workers)

    def known_total(what: str, done: int, total: int) -> None:
        if progress:
            progress(what, done, len(images))

    metric = accuracy_of(batches, images.name, chosen_device(settings.device), known_total, settings.outputs)
    if extras is None:
        return metric

    def summary(dense: Predictions, compressed: Predictions) -> Json:
        add_changed_samples(extras, images, known, dense, compressed)
        return metric.summary(dense, compressed)

    return replace(metric, summary=summary)


def preprocessing_for(
    settings: Settings, known: Preprocessing | None, images: Images | None
) -> Preprocessing | None:
    """What the user says, else what the architecture was trained with, else the statistics of the data."""
    mean, std = settings.recipe.mean, settings.recipe.std
    if bool(mean) != bool(std):
        raise DataError("--mean and --std are given together")

    if mean:
        return replace(known, mean=mean, std=std) if known else Preprocessing(mean, std)
    return known or (images.statistics() if images else None)


def tensor_calibration(calib: Tensor | Mapping[str, Any] | Iterable[Any], settings: Settings) -> Calibration:
    """Calibration on inputs in memory: one tensor or one mapping, or batches.

    A batch is inputs by themselves (a tensor, or a mapping of them by name) or a tuple that begins with them;
    what the tuple begins with may be a tuple of several inputs.

    Raises:
        DataError: none, too few, NaN, or batches that do not fit together.
    """
    with blaming("calib cannot be read"):
        given = [calib] if isinstance(calib, Tensor | Mapping) else list(calib)
    if not given:
        raise DataError("calib holds no inputs")

    batches = [_inputs_in(batch) for batch in given]
    with blaming("the batches of calib do not fit together"):
        inputs = _joined(batches)
    _check_rows(inputs)

    return calibration_on("calib", inputs, settings)


def _inputs_in(batch: Any) -> NetworkInput:
    """The inputs of a batch, without what follows them."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(inputs, Tensor | Mapping | tuple | list) or not tensors_of(inputs):
        kind = type(inputs).__name__
        raise DataError(
            f"a batch of calib is inputs, or a tuple that begins with them; this one has a {kind}"
        )
    return inputs


def _joined(batches: Sequence[Any]) -> Any:
    """All batches as one, on the CPU."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches)).detach().cpu()
    if isinstance(first, Mapping):
        return {name: _joined([batch[name] for batch in batches]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(_joined(column) for column in zip(*batches, strict=True))
    return first


def _check_rows(inputs: NetworkInput) -> None:
    """See that every tensor has a row an input, and that none is NaN.

    Raises:
        DataError: another number of rows, or NaN.
    """
    count = batch_size(inputs)
    for tensor in tensors_of(inputs):
        if tensor.dim() == 0 or len(tensor) != count:
            shape = tuple(tensor.shape)
            raise DataError(
                f"calib holds {count:,} inputs, but also a tensor {shape}: all need a row an input"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError("calib holds NaN or Inf")
