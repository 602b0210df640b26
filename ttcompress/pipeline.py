"""Composes the stages for the command line and the Python interface: compress, load, evaluate, expand."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress import __version__
from ttcompress.checkpoint import (
    check_output,
    load_compressed,
    tensor_bytes,
    write_dense,
    write_safetensors,
)
from ttcompress.data import Images, open_data
from ttcompress.errors import CheckpointError, DataError, PlanError, shortlist
from ttcompress.evaluate import Batches, Predictions, compare, predict
from ttcompress.header import blaming, read_metadata
from ttcompress.network import Network, open_any, open_dense, open_empty, stored_tensors, tied_parameters
from ttcompress.plan import adopt_plan, make_plan
from ttcompress.recipe import Recipe
from ttcompress.surgery import apply_plan
from ttcompress.tt.contract import dense_weight
from ttcompress.types import (
    Accuracy,
    CompressionPlan,
    Json,
    LayerPlan,
    Preprocessing,
    Progress,
    Report,
)

BATCH_SIZE = 128
# ---------------------------------------------------------------------------------------------------------------- files


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

    With `recipe.data`, accuracy is measured before and after. Nothing is written unless all went well.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    check_output(output, force)
    images = _labelled(recipe) if recipe.data else None
    network = open_dense(source, recipe.arch, recipe.key or "")
    network = replace(network, preprocessing=_preprocessing(recipe, network.preprocessing, images))
    meter = _images_meter(images, network.preprocessing, recipe, progress) if images else None
    report = compress_network(network, recipe, plan, meter, progress)
    write_safetensors(output, stored_tensors(network.model, network.tensors), report.to_json())
    return report


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
    if source is not None:
        network = open_dense(source, recipe.arch, recipe.key or "")
    elif recipe.arch:
        network = open_empty(recipe.arch)
    else:
        raise PlanError("give a checkpoint, or an architecture with --arch")
    network = replace(network, preprocessing=_preprocessing(recipe, network.preprocessing, None))
    plan = plan_network(network.model, recipe, plan, progress)
    before = tensor_bytes(stored_tensors(network.model, network.tensors))
    return _report(network, plan, recipe, (before, promised_bytes(before, plan, dtype_of(recipe))))


def expand_file(source: Path, output: Path, force: bool = False) -> Report:
    """Turn a compressed file back into an ordinary dense checkpoint, with the original keys and types.

    Raises:
        CheckpointError: not a compressed file, or an output that cannot be written.
    """
    check_output(output, force)
    metadata, tensors = read_metadata(source), load_compressed(source)
    with blaming(source):
        report = Report.from_json(metadata)
        dense = _expanded(report, tensors)
    write_dense(output, dense)
    return report


def _expanded(report: Report, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dense = dict(tensors)
    for layer in report.plan.layers:
        shapes = dict(_core_shapes(layer))
        wrong = [name for name, shape in shapes.items() if name not in dense or tuple(dense[name].shape) != shape]
        if wrong:
            raise CheckpointError(f"lacks {shortlist(wrong)}, or they have another shape")
        weight = dense_weight([dense.pop(name).double() for name in shapes], layer.spec.weight_shape)
        dense[f"{layer.fqn}.weight"] = weight.to(getattr(torch, layer.weight_dtype)).contiguous()
    return dense | {alias: dense[name].clone() for alias, name in report.tied.items()}


def _core_shapes(layer: LayerPlan) -> Iterator[tuple[str, tuple[int, ...]]]:
    for k, shape in enumerate(layer.tensorization.core_shapes(layer.tt_ranks)):
        yield f"{layer.fqn}.cores.{k}", shape


def evaluate_file(
    path: Path, recipe: Recipe, *, limit: int | None = None, progress: Progress | None = None
) -> tuple[Accuracy, str]:
    """Accuracy of a dense checkpoint or a compressed file on `recipe.data`, and the name of that data."""
    images = _labelled(recipe)
    network = open_any(path, recipe.arch, recipe.key or "")
    meter = _images_meter(images, _preprocessing(recipe, network.preprocessing, images), recipe, progress, limit)
    predictions: Predictions = meter.run(network.model)
    return predictions.accuracy(), images.name


# ---------------------------------------------------------------------------------------------------------- compression


@dataclass(frozen=True)
class Meter:
    """How to measure a network, and how to put two measurements into the report's `accuracy`."""

    run: Callable[[nn.Module], Any]
    summary: Callable[[Any, Any], Json]


def compress(
    module: nn.Module,
    *,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Compress any module in memory; returns the compressed module and the report.

    Args:
        data: labelled batches (inputs, labels) to measure accuracy on, such as a DataLoader; read twice.
        metric: instead of `data`, any function of the module; its values before and after go into the report.
        inplace: change `module` itself instead of a copy.
        options: those of the command line (`ranks`, `eps`, `ratio`, `include`, `format`, `device` ...; see `Recipe`).

    Raises:
        TTCompressError: options that contradict each other or do not fit the module.
    """
    recipe = Recipe(**options)
    if recipe.data is not None or recipe.arch is not None:
        raise PlanError("the module is its own architecture, and data takes batches, not a reference")
    if data is not None and metric is not None:
        raise PlanError("give data or metric, not both")
    if data is not None and iter(data) is data:
        raise DataError("data is read twice, before and after: give a list or a DataLoader, not an iterator")
    model = module if inplace else copy.deepcopy(module)
    meter = None
    if data is not None:
        meter = _classification(lambda: data, "data", device_of(recipe), progress)
    elif metric is not None:
        name = getattr(metric, "__name__", "metric")
        meter = Meter(partial(_finite, metric, name), partial(_metric_json, name))
    return model, compress_network(Network(model, model.state_dict()), recipe, None, meter, progress)


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
    write_safetensors(Path(path), stored_tensors(module, module.state_dict()), report.to_json())


def compress_network(
    network: Network,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    meter: Meter | None = None,
    progress: Progress | None = None,
) -> Report:
    """Plan (unless a plan is given), decompose and swap in place, and measure before and after."""
    device = device_of(recipe)
    bytes_before = tensor_bytes(stored_tensors(network.model, network.tensors))
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed or 0)
        plan = plan_network(network.model, recipe, plan, progress)
        dense = meter.run(network.model) if meter else None
        with fixed_threads():
            plan = apply_plan(network.model, plan, device, dtype_of(recipe), progress)
        accuracy = meter.summary(dense, meter.run(network.model)) if meter else None
    bytes_after = tensor_bytes(stored_tensors(network.model, network.tensors))
    return _report(network, plan, recipe, (bytes_before, bytes_after), accuracy)


def plan_network(
    model: nn.Module, recipe: Recipe, plan: CompressionPlan | None = None, progress: Progress | None = None
) -> CompressionPlan:
    """The plan that the recipe asks for, or the one given, checked against the network.

    Raises:
        PlanError: a plan beside another target, one that does not fit, or one that would replace nothing.
    """
    if plan is None:
        with fixed_threads():
            plan = make_plan(model, recipe, device_of(recipe), progress)
    else:
        plan = adopt_plan(model, recipe, plan)
    if not plan.layers:
        reasons = sorted({kept.reason for kept in plan.kept if kept.kind})
        raise PlanError(f"nothing would be compressed, every layer stays dense: {shortlist(reasons)}")
    return plan


def _report(
    network: Network, plan: CompressionPlan, recipe: Recipe, num_bytes: tuple[int, int], accuracy: Json | None = None
) -> Report:
    elsewhere = ("arch", "key", "data", "mean", "std", "device", "batch_size", "workers", "seed")
    options = {key: value for key, value in recipe.to_json().items() if key not in elsewhere}
    return Report(
        plan=plan,
        bytes_before=num_bytes[0],
        bytes_after=num_bytes[1],
        version=__version__,
        seed=recipe.seed or 0,
        source=network.source or {},
        architecture=network.architecture,
        preprocessing=network.preprocessing,
        recipe=options,
        tied=tied_parameters(network.model),
        accuracy=accuracy,
    )


def promised_bytes(bytes_before: int, plan: CompressionPlan, dtype: torch.dtype | None) -> int:
    """Bytes of all tensors once the plan is applied."""
    saved = 0
    for layer in plan.layers:
        dense: torch.dtype = getattr(torch, layer.weight_dtype)
        saved += layer.params_before * dense.itemsize - layer.params_after * (dtype or dense).itemsize
    return bytes_before - saved


@contextmanager
def fixed_threads() -> Iterator[None]:
    """The machine's own number of threads, whatever the environment says: sums then come out the same each time."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(16, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(recipe: Recipe) -> torch.device:
    """`auto` (the default) is the GPU where there is one.

    Raises:
        PlanError: a device that torch does not know or this machine does not have.
    """
    name = recipe.device or "auto"
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise PlanError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error


def dtype_of(recipe: Recipe) -> torch.dtype | None:
    """Storage type of the cores; None keeps that of each weight."""
    return getattr(torch, recipe.dtype) if recipe.dtype else None


# ----------------------------------------------------------------------------------------------------------------- data


def _labelled(recipe: Recipe) -> Images:
    if recipe.data is None:
        raise DataError("name the labelled images with --data")
    images = open_data(recipe.data)
    images.require_labels()
    return images


def _images_meter(
    images: Images,
    preprocessing: Preprocessing | None,
    recipe: Recipe,
    progress: Progress | None,
    limit: int | None = None,
) -> Meter:
    known = preprocessing or images.statistics()
    make = partial(images.batches, known, recipe.batch_size or BATCH_SIZE, limit, recipe.workers or 0)
    return _classification(make, images.name, device_of(recipe), progress)


def _classification(
    batches: Callable[[], Batches], name: str, device: torch.device, progress: Progress | None
) -> Meter:
    def run(model: nn.Module) -> Predictions:
        return predict(model.to(device), batches(), device, progress)

    return Meter(run, lambda dense, compressed: compare(dense, compressed, name).to_json())


def _preprocessing(recipe: Recipe, known: Preprocessing | None, images: Images | None) -> Preprocessing | None:
    """What the user says, else what the architecture was trained with, else the statistics of the data."""
    if bool(recipe.mean) != bool(recipe.std):
        raise DataError("--mean and --std are given together")
    if recipe.mean and known:
        return replace(known, mean=recipe.mean, std=recipe.std)
    if recipe.mean:
        return Preprocessing(recipe.mean, recipe.std)
    return known or (images.statistics() if images else None)
