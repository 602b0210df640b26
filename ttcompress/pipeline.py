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

from ttcompress import __version__, models
from ttcompress.checkpoint import (
    Checkpoint,
    check_output,
    is_compressed,
    load_checkpoint,
    load_compressed,
    tensor_bytes,
    write_dense,
    write_safetensors,
)
from ttcompress.data import Images, open_data
from ttcompress.errors import ArchitectureError, CheckpointError, DataError, PlanError, shortlist
from ttcompress.evaluate import Batches, Predictions, compare, predict
from ttcompress.header import blaming, read_metadata
from ttcompress.plan import adopt_plan, make_plan
from ttcompress.recipe import Recipe
from ttcompress.surgery import apply_plan, check_plan, insert_empty
from ttcompress.tt.contract import dense_weight
from ttcompress.types import (
    Accuracy,
    Architecture,
    CompressionPlan,
    Json,
    LayerPlan,
    Preprocessing,
    Progress,
    Report,
)

BATCH_SIZE = 128
Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network with its weights, and what is known about where it came from."""

    model: nn.Module
    tensors: Mapping[str, Tensor]
    architecture: Architecture | None = None
    preprocessing: Preprocessing | None = None
    source: Json | None = None


# ---------------------------------------------------------------------------------------------------------------- files


def compress_file(
    source: Path,
    output: Path,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    key: str = "",
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
    network = open_dense(source, recipe.arch, key)
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
    key: str = "",
    progress: Progress | None = None,
) -> Report:
    """What `compress_file` would do: the report without measured errors and accuracy.

    Without a checkpoint the network comes from `recipe.arch` alone, which is enough for TT-ranks given by hand.
    """
    if source is not None:
        network = open_dense(source, recipe.arch, key)
    elif recipe.arch:
        architecture, factory = _resolve(recipe.arch, None)
        model = models.build(architecture, factory)
        network = Network(model, model.state_dict(), architecture, models.preprocessing(architecture))
    else:
        raise PlanError("give a checkpoint, or an architecture with --arch")
    network = replace(network, preprocessing=_preprocessing(recipe, network.preprocessing, None))
    plan = plan_network(network.model, recipe, plan, progress)
    before = tensor_bytes(stored_tensors(network.model, network.tensors))
    return _report(network, plan, recipe, (before, promised_bytes(before, plan, dtype_of(recipe))))


def load(path: str | os.PathLike[str], factory: Factory | None = None, device: str = "cpu") -> nn.Module:
    """Load a compressed file into a module, in eval mode; no checkpoint is needed.

    Args:
        factory: builds the original network, for files whose architecture is neither in the zoo nor in torchvision.

    Raises:
        CheckpointError: not a compressed file, damaged, or of another schema.
        ArchitectureError: a factory is needed, or the one given builds another network.
    """
    return open_compressed(Path(path), factory)[0].to(device)


def open_compressed(path: Path, factory: Factory | None = None) -> tuple[nn.Module, Report]:
    """A compressed file as a module, and its report."""
    tensors = load_compressed(path)
    with blaming(path):
        report = Report.from_json(read_metadata(path))
        return _rebuilt(report, tensors, factory), report


def _rebuilt(report: Report, tensors: Mapping[str, Tensor], factory: Factory | None) -> nn.Module:
    if factory is None and report.architecture is None:
        raise ArchitectureError("records no architecture; pass factory= (or --arch net.py:build)")
    state = {**tensors, **{alias: tensors[name] for alias, name in report.tied.items()}}
    architecture = report.architecture or Architecture("factory", "factory")
    if factory is not None:
        architecture = replace(architecture, kind="factory")

    def build(device: str) -> nn.Module:
        model = models.build(architecture, factory, device)
        check_plan(model, report.plan)
        insert_empty(model, report.plan.layers)
        return model

    try:
        return _filled(build, state)
    except PlanError as error:
        raise ArchitectureError(f"{architecture.name} builds another network: {error}") from error


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
    path: Path, recipe: Recipe, *, key: str = "", limit: int | None = None, progress: Progress | None = None
) -> tuple[Accuracy, str]:
    """Accuracy of a dense checkpoint or a compressed file on `recipe.data`, and the name of that data."""
    images = _labelled(recipe)
    if is_compressed(path):
        factory = models.load_factory(recipe.arch) if recipe.arch and _needs_factory(path) else None
        model, report = open_compressed(path, factory)
        known = report.preprocessing
    else:
        network = open_dense(path, recipe.arch, key)
        model, known = network.model, network.preprocessing
    meter = _images_meter(images, _preprocessing(recipe, known, images), recipe, progress, limit)
    predictions: Predictions = meter.run(model)
    return predictions.accuracy(), images.name


def _needs_factory(path: Path) -> bool:
    with blaming(path):
        architecture = Report.from_json(read_metadata(path)).architecture
    return architecture is None or architecture.kind == "factory"


# ------------------------------------------------------------------------------------------------------------- networks


def open_dense(path: Path, arch: str | None = None, key: str = "") -> Network:
    """A dense checkpoint in its architecture, given by `arch` or inferred from keys and shapes.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ArchitectureError: none fits, or several.
    """
    if is_compressed(path):
        raise CheckpointError(f"{path}: is compressed already; `ttcompress expand` makes it dense again")
    checkpoint = load_checkpoint(path, key)
    architecture, factory = _resolve(arch, checkpoint)
    model = _filled(lambda device: models.build(architecture, factory, device), checkpoint.tensors)
    return Network(model, checkpoint.tensors, architecture, models.preprocessing(architecture), checkpoint.source)


def _resolve(arch: str | None, checkpoint: Checkpoint | None) -> tuple[Architecture, Factory | None]:
    shapes = checkpoint.shapes if checkpoint else None
    architecture = models.resolve(arch, shapes) if arch else models.infer(shapes or {})
    return architecture, models.load_factory(arch) if arch and architecture.kind == "factory" else None


def _filled(build: Callable[[str], nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """The built network with these tensors in it, tied parameters still tied, nothing left without a value."""
    model = build("meta")
    _assign(model, state)
    if _is_unfinished(model):
        # Buffers outside the state dict have their values from the constructor alone.
        model = build("cpu")
        _assign(model, state)
    return model.eval()


def _assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    tied = tied_parameters(model)
    problem = models.mismatch({name: tuple(tensor.shape) for name, tensor in state.items()}, model)
    if problem:
        raise CheckpointError(f"the file does not fit its architecture: {problem}")
    model.load_state_dict(dict(state), strict=False, assign=True)
    for alias, name in tied.items():
        owner, _, own_name = alias.rpartition(".")
        setattr(model.get_submodule(owner), own_name, model.get_parameter(name))


def _is_unfinished(model: nn.Module) -> bool:
    values = [value for module in model.modules() for value in vars(module).values()]
    held = [*model.parameters(), *model.buffers(), *(value for value in values if isinstance(value, Tensor))]
    return any(tensor.is_meta for tensor in held)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Names that stand for a parameter which has another name before, and that name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def stored_tensors(model: nn.Module, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file holds: the state dict without tied copies, and without counters that the original lacked."""
    tied = tied_parameters(model)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and (name in original or not name.endswith("num_batches_tracked"))
    }


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
    torch.manual_seed(recipe.seed or 0)
    device = device_of(recipe)
    bytes_before = tensor_bytes(stored_tensors(network.model, network.tensors))
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
    elsewhere = ("arch", "data", "mean", "std", "device", "batch_size", "workers", "seed")
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
