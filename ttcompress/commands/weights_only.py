"""`--arch none`: the weights of a checkpoint compressed one by one, without its architecture, never all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.commands.compressor import Compressed, Compressor
from ttcompress.commands.partial_results import Work, is_stopped, work_on
from ttcompress.commands.reports import promised_bytes, recorded, report_of
from ttcompress.errors import PlanError, shortlist
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import TensorInfo, canonical_json
from ttcompress.files.output import alone, check_output
from ttcompress.files.shards import Index, read_index
from ttcompress.files.tensors import DTYPE_NAMES, LazyTensors, tensor_bytes, tensor_infos
from ttcompress.files.writing import write_safetensors, write_shards
from ttcompress.layers.spec import viewed
from ttcompress.networks.opening import Network, open_weights
from ttcompress.networks.stored import file_metadata, stored_cores, stored_tensors
from ttcompress.networks.surgery import check_plan, decompose
from ttcompress.planning.spectra import LayerSpectra
from ttcompress.processes import World, joined
from ttcompress.recipe import Recipe
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report
from ttcompress.runtime import chosen_device, fixed_threads, seeded
from ttcompress.settings import Settings
from ttcompress.version import __version__

PATIENCE = timedelta(days=30)
"""Processes wait for each other's layers; torchrun sees to it that none waits for one that is dead."""
NEEDS_A_NETWORK = (
    "data",
    "val",
    "calib",
    "calib_images",
    "effort",
    "train",
    "epochs",
    "max_drop",
    "macs_ratio",
    "latency_ratio",
    "tune",
)


@alone
def compress_weights(
    source: Path,
    output: Path,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress the weights of a checkpoint into one file, or into a folder of shards like those it came in.

    What is finished is kept in `OUTPUT.partial`, from which the same call goes on; processes that torchrun started
    share the work.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    _check_recipe(recipe)
    settings = Settings.of(recipe)
    index = None if output.suffix == ".safetensors" else read_index(source)
    # A run that was stopped has seen to it that the output is its own; it may have been as good as done.
    check_output(output, force or is_stopped(output), index, source)
    network = open_weights(source, settings.key)
    with (
        joined(chosen_device(settings.device), PATIENCE) as world,
        fixed_threads(),
        _work(output, network, settings, plan, force, world) as work,
    ):
        planned = work.plan(lambda: _planned(network, settings, plan, work, progress))
        files = _decomposed(network, settings, planned, work, progress)
        report = _report(network, settings, _with_errors(planned, files))
        if world.leads:
            _write(output, index, report, _compressed(network, planned, files))
    return report


def plan_weights(
    source: Path, recipe: Recipe, plan: CompressionPlan | None = None, *, progress: Progress | None = None
) -> Report:
    """What `compress_weights` would do: the report without measured errors."""
    _check_recipe(recipe)
    settings = Settings.of(recipe)
    network = open_weights(source, settings.key)
    with fixed_threads():
        planned = _planned(network, settings, plan, None, progress)
    return _report(network, settings, planned)


def _check_recipe(recipe: Recipe) -> None:
    given = recipe.given(*NEEDS_A_NETWORK)
    if given:
        raise PlanError(
            f"with --arch none no network can run: leave out {', '.join(given)}, or name the architecture"
        )


def _work(
    output: Path,
    network: Network,
    settings: Settings,
    plan: CompressionPlan | None,
    force: bool,
    world: World,
) -> AbstractContextManager[Work]:
    """The work folder, known by all that the decompositions depend on."""
    key = {
        **recorded(settings.recipe),
        "key": settings.recipe.key,
        "seed": settings.seed,
        "checkpoint": (network.source or {})["sha256"],
        "plan": hashlib.sha256(canonical_json(plan.to_json()).encode()).hexdigest() if plan else None,
        "device": world.device.type,
        "threads": torch.get_num_threads(),
        "versions": f"{__version__}, torch {torch.__version__}",
    }
    return work_on(output, key, force, world)


def _planned(
    network: Network,
    settings: Settings,
    plan: CompressionPlan | None,
    work: Work | None,
    progress: Progress | None,
) -> CompressionPlan:
    device = work.world.device if work else chosen_device(settings.device)
    compressor = Compressor(network.model, settings, device, progress=progress)
    if work:
        compressor = replace(compressor, results=partial(_shared_spectra, work))
    planned = compressor.plan(settings.recipe, plan)
    check_plan(network.model, planned)
    taken = [name for layer in planned.layers for name in layer.stored_shapes if name in network.tensors]
    if taken:
        raise PlanError(
            f"the checkpoint has tensors that are called as TT-cores would be: {shortlist(taken)}"
        )
    return planned


def _shared_spectra(
    work: Work, sizes: Sequence[int], compute: Callable[[int], LayerSpectra]
) -> list[LayerSpectra]:
    """The spectra of all weights, each computed once by one of the processes and held in a file until the run ends."""
    tensors = work.results("spectra", sizes, lambda index: compute(index).to_tensors())
    return [LayerSpectra.from_tensors(each) for each in tensors]


def _decomposed(
    network: Network, settings: Settings, plan: CompressionPlan, work: Work, progress: Progress | None
) -> list[Path]:
    """Of every planned layer a file with its cores and their relative error."""

    def cores(index: int) -> dict[str, Tensor]:
        layer = plan.layers[index]
        if progress:
            progress(f"decomposing {layer.fqn}", index, len(plan.layers))
        # Each on its own random numbers, so that it does not matter which were finished before, and where.
        with seeded(settings.seed):
            weight = network.tensors[layer.weight_name].to(work.world.device)
            result = decompose(layer, viewed(weight, layer.spec))
        error = torch.tensor(result.relative_error, dtype=torch.float64)
        return {**stored_cores(result.cores, layer), "relative_error": error}

    return work.files("cores", [layer.params_before for layer in plan.layers], cores)


def _with_errors(plan: CompressionPlan, files: Sequence[Path]) -> CompressionPlan:
    errors = [float(load_compressed(file)["relative_error"]) for file in files]
    return plan.with_layers(
        [replace(layer, relative_error=error) for layer, error in zip(plan.layers, errors, strict=True)]
    )


def _report(network: Network, settings: Settings, plan: CompressionPlan) -> Report:
    before = tensor_bytes(stored_tensors(network.model, network.tensors))
    num_bytes = before, promised_bytes(before, plan)
    return report_of(network, Compressed(network.model, plan), settings, num_bytes)


def _compressed(network: Network, plan: CompressionPlan, files: Sequence[Path]) -> LazyTensors:
    """The stored tensors: those of the checkpoint, and in the place of planned weights the cores in the files."""
    kept = stored_tensors(network.model, network.tensors)
    cores: dict[str, Path] = {}
    infos: dict[str, TensorInfo] = {}
    for layer, file in zip(plan.layers, files, strict=True):
        del kept[layer.weight_name]
        stored_as = DTYPE_NAMES[getattr(torch, layer.stored_dtype)]
        infos |= {name: TensorInfo(stored_as, shape) for name, shape in layer.core_shapes.items()}
        infos |= {name: TensorInfo("F32", shape) for name, shape in layer.scale_shapes.items()}
        cores |= dict.fromkeys(layer.stored_shapes, file)

    def make(name: str) -> Tensor:
        return load_compressed(cores[name])[name] if name in cores else kept[name]

    return LazyTensors({**infos, **tensor_infos(kept)}, make)


def _write(output: Path, index: Index | None, report: Report, tensors: Mapping[str, Tensor]) -> None:
    metadata = file_metadata(report, tensors)
    if index is None:
        write_safetensors(output, tensors, metadata)
        return
    homes = dict(index.homes)
    for layer in report.plan.layers:
        homes |= dict.fromkeys(layer.stored_shapes, homes.pop(layer.weight_name))
    write_shards(output, index.moved(homes), tensors, metadata)
