"""Compress a checkpoint into a file, or a module in memory: plan, decompose, swap in, measure, write."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ttcompress.calibrate.stages import adopt
from ttcompress.commands.compressor import Compressed, Compressor, promised_bytes, recorded, report_of
from ttcompress.commands.inputs import (
    Meter,
    Sources,
    calibration_images,
    classification,
    judge_by,
    tensor_calibration,
    with_sources,
)
from ttcompress.commands.weights_only import compress_weights, plan_weights
from ttcompress.errors import CheckpointError, DataError, PlanError, differences
from ttcompress.files.checkpoint import (
    check_output,
    file_digest,
    tensor_bytes,
    write_safetensors,
)
from ttcompress.files.shards import read_metadata
from ttcompress.networks.opening import Network, open_dense, open_empty
from ttcompress.networks.stored import stored_tensors
from ttcompress.planning.plan_file import is_made_by
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report
from ttcompress.runtime import device_of, fixed_threads, seeded


def compress_file(
    source: Path,
    output: Path,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint into one file (docs/format.md) and return its report.

    With `recipe.data`, accuracy is measured before and after. With `recipe.calib`, output error counts, not weight
    error. Nothing is written unless all went well. The architecture `none` is a matter of `compress_weights`.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    if recipe.is_weights_only:
        return compress_weights(source, output, recipe, plan, force=force, progress=progress)
    check_output(output, force)
    if recipe.max_drop is not None and not _is_search(recipe, plan) and recipe.data is None:
        raise DataError("--max-drop beside another target is a gate on accuracy: name labelled images with --data")
    network = open_dense(source, recipe.arch, recipe.key or "")
    network, sources = with_sources(network, recipe, progress)
    report = compress_network(network, recipe, plan, sources, progress)
    write_safetensors(output, stored_tensors(network.model, network.tensors, report.plan), report.metadata())
    return report


def check_repeats(checkpoint: Path, output: Path, recipe: Recipe, plan: CompressionPlan | None = None) -> None:
    """See that a compressed file is what `compress_file` with the same arguments wrote.

    Raises:
        CheckpointError: it is not, naming the difference.
    """
    report = Report.from_json(read_metadata(output))
    before = {**report.recipe, "seed": report.seed, "sha256": report.source.get("sha256")}
    before["calib"] = (report.calibration or {}).get("data")
    now = {**recorded(recipe), "seed": recipe.seed or 0, "sha256": file_digest(checkpoint)}
    now["calib"] = calibration_images(recipe)
    differ = differences(before, now)
    if not differ and plan is not None and not is_made_by(report.plan, plan):
        differ = "--plan was another"
    if differ:
        raise CheckpointError(f"{output}: was compressed otherwise: {differ}; repeat the command as it was")


def plan_file(
    source: Path | None,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """What `compress_file` would do: the report without measured errors and accuracy.

    Without a checkpoint the network comes from `recipe.arch` alone, which is enough for TT-ranks given by hand.
    """
    if source is not None and recipe.is_weights_only:
        return plan_weights(source, recipe, plan, progress=progress)
    if source is not None:
        network = open_dense(source, recipe.arch, recipe.key or "")
    elif recipe.arch:
        network = open_empty(recipe.arch)
    else:
        raise PlanError("give a checkpoint, or an architecture with --arch")
    network, sources = with_sources(network, replace(recipe, data=None), progress)
    before = tensor_bytes(stored_tensors(network.model, network.tensors))
    with seeded(recipe):
        searches = _is_search(recipe, plan)
        compressor = _compressor(network, recipe, sources, searches, progress)
        with fixed_threads():
            if searches:
                done = compressor.search(sources.judge)
            else:
                done = Compressed(network.model, compressor.plan(recipe, plan), compressor.calibrated_on())
    return report_of(network, done, recipe, (before, promised_bytes(before, done.plan)))


def compress(
    module: nn.Module,
    *,
    calib: Tensor | Iterable[Any] | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    val: Iterable[tuple[Tensor, Tensor]] | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Compress any module in memory; returns the compressed module and the report.

    Args:
        calib: inputs (N, ...) without labels, as one tensor or as batches (inputs, or tuples that begin with
            them); output error then counts instead of weight error.
        data: labelled batches (inputs, labels) to measure accuracy on, such as a DataLoader; read twice, in the
            same order if `agreement` is to be known.
        metric: instead of `data`, any function of the module; its values before and after go into the report.
        val: labelled batches to search by, with `max_drop` and no other target; read once a point.
        inplace: change `module` itself instead of a copy.
        options: those of the command line (`ranks`, `eps`, `ratio`, `include`, `format`, `device` ...; see `Recipe`).

    Raises:
        TTCompressError: options that contradict each other or do not fit the module.
    """
    recipe = Recipe(**options)
    if recipe.arch is not None:
        raise PlanError("the module is its own architecture: leave out arch")
    if data is not None and metric is not None:
        raise PlanError("give data or metric, not both")
    if recipe.max_drop is not None and recipe.target != "max_drop":
        raise PlanError("max_drop beside another target is a gate of the command line: look at the report instead")
    for name, batches in (("data", data), ("val", val)):
        if batches is not None and iter(batches) is batches:
            raise DataError(f"{name} is read more than once: give a list or a DataLoader, not an iterator")
    model = module if inplace else copy.deepcopy(module)
    meter = None
    if data is not None:
        meter = classification(lambda: data, "data", device_of(recipe), progress)
    elif metric is not None:
        name = getattr(metric, "__name__", "metric")
        meter = Meter(partial(_finite, metric, name), partial(_metric_json, name))
    judge = None if val is None else judge_by(classification(lambda: val, "val", device_of(recipe), progress))
    calibration = None if calib is None else tensor_calibration(calib, recipe)
    sources = Sources(meter, judge, calibration)
    return model, compress_network(Network(model, model.state_dict()), recipe, None, sources, progress)


def _finite(metric: Callable[[nn.Module], float], name: str, module: nn.Module) -> float:
    value = float(metric(module))
    if not isfinite(value):
        raise DataError(f"{name} returned {value}, which no report can hold")
    return value


def _metric_json(name: str, dense: float, compressed: float) -> Json:
    return {"metric": name, "dense": dense, "compressed": compressed, "n": None, "interval": None}


def save(module: nn.Module, report: Report, path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a module that `compress` made to a compressed file; `load(path, factory=...)` reads it back.

    Raises:
        CheckpointError: the file exists and `force` is not set, or its folder does not.
    """
    check_output(Path(path), force)
    write_safetensors(Path(path), stored_tensors(module, module.state_dict(), report.plan), report.metadata())


def compress_network(
    network: Network,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    sources: Sources | None = None,
    progress: Progress | None = None,
) -> Report:
    """Plan (unless a plan is given), decompose and swap in place, and measure before and after."""
    sources = sources or Sources()
    meter = sources.meter
    bytes_before = tensor_bytes(stored_tensors(network.model, network.tensors))
    with seeded(recipe):
        searches = _is_search(recipe, plan)
        compressor = _compressor(network, recipe, sources, searches, progress)
        dense = meter.run(network.model) if meter else None
        with fixed_threads():
            if searches:
                done = compressor.search(sources.judge)
                adopt(network.model, done.model, done.plan)
            else:
                done = compressor.apply(compressor.plan(recipe, plan), inplace=True)
        accuracy = meter.summary(dense, meter.run(network.model)) if meter else None
    bytes_after = tensor_bytes(stored_tensors(network.model, network.tensors, done.plan))
    return report_of(network, done, recipe, (bytes_before, bytes_after), accuracy)


def drop_beyond_gate(report: Report, recipe: Recipe) -> float | None:
    """The fall of accuracy in points, where `--max-drop` beside another target allows less."""
    if recipe.max_drop is None or report.accuracy is None or report.search:
        return None
    drop = float(report.accuracy["dense"] - report.accuracy["compressed"])
    return drop if drop > recipe.max_drop else None


def _is_search(recipe: Recipe, plan: CompressionPlan | None) -> bool:
    return plan is None and recipe.target == "max_drop"


def _compressor(
    network: Network, recipe: Recipe, sources: Sources, searches: bool, progress: Progress | None
) -> Compressor:
    for option, value in (("--calib-images", recipe.calib_images), ("--effort", recipe.effort)):
        if value is not None and sources.calibration is None:
            raise DataError(f"{option} needs --calib, the images to calibrate on")
    if sources.judge and not searches:
        raise DataError("--val is what --max-drop without another target searches by: leave it out")
    known = network.preprocessing and network.preprocessing.input_size
    return Compressor(
        network.model,
        recipe,
        device_of(recipe),
        sources.calibration,
        progress,
        input_shape=recipe.input_size or known or (),
    )
