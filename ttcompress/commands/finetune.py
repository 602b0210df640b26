"""Fine-tuning from file to file: the network, its teacher and its data go into the training loop, a file comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from ttcompress.commands.outputs import (
    check_network_output,
    default_name,
    library_folder,
    write_dense_folder,
    write_network,
)
from ttcompress.commands.starting_point import StartingPoint, open_start, start_from_scratch
from ttcompress.commands.training import EpochLog, say_frozen, training_options, training_setup
from ttcompress.commands.training_report import trained_report
from ttcompress.data.opening import open_data
from ttcompress.data.text import names_texts, open_texts
from ttcompress.data.training_batches import Stream
from ttcompress.errors import CheckpointError, DataError
from ttcompress.files.checkpoint import is_compressed
from ttcompress.files.model_folder import ModelFolder
from ttcompress.files.output import alone, check_output
from ttcompress.files.writing import write_dense
from ttcompress.networks.opening import open_any
from ttcompress.networks.running import call
from ttcompress.networks.stored import file_metadata, stored_tensors, tied_parameters
from ttcompress.networks.structures import logits_of
from ttcompress.networks.surgery import store_cores
from ttcompress.processes import joined
from ttcompress.recipe import Recipe
from ttcompress.records.common import Progress
from ttcompress.records.extras import Extras
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report
from ttcompress.runtime import chosen_device, deterministic, seeded
from ttcompress.settings import Settings
from ttcompress.torchrun import expected_rank
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions

DENSE_SUFFIXES = (".pt", ".pth", ".safetensors")
_LOOP_OPTIONS = (each.name for each in fields(TrainingOptions) if each.name not in ("epochs", "seed"))
ONLY_IN_TRAINING = ("teacher", "augment", *_LOOP_OPTIONS)
"""Options that mean nothing where nothing is trained."""


def check_inputs(recipe: Recipe) -> None:
    """See that the images or texts and the teacher of a training are there, before something long comes first.

    Raises:
        TTCompressError: one of them cannot be opened.
    """
    for reference in filter(None, (recipe.train, recipe.val)):
        if names_texts(reference):
            open_texts(reference)
        else:
            open_data(reference, "train")
    if recipe.teacher:
        open_any(Path(recipe.teacher))


def default_output(model: Path | None, recipe: Recipe) -> Path:
    """Where a trained network goes that nobody named a place for."""
    if model is None:
        return Path(f"{str(recipe.arch).rpartition(':')[2]}-ft.safetensors")
    return default_name(model, library_folder(model, recipe.arch), "-ft")


def state_file(output: Path) -> Path:
    """Where the state of the training that will write `output` is kept."""
    return output.with_name(f"{output.name}.training")


@alone
def finetune_file(
    source: Path | None,
    output: Path,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    origin: Path | None = None,
    progress: Progress | None = None,
    log: EpochLog | None = None,
    extras: Extras | None = None,
) -> Report:
    """Train a compressed file or a dense checkpoint further and write the best epoch in the same form.

    Without a source the network of `recipe.arch` is trained from scratch, in TT form where the recipe or the plan
    says how. `extras` gets what a page shows beside the report. `origin` is the checkpoint that a compressed file was made from, looked for beside it by default. The
    state of the training is in `OUTPUT.training`, from which `resume` goes on.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    folder = library_folder(source, recipe.arch, output)
    check_network_output(output, force, folder, compressed=source is None or is_compressed(source))
    if recipe.train is None:
        raise DataError("name the training images, or texts, with --train")
    checkpoint = state_file(output)
    if not resume and expected_rank() == 0:
        check_output(checkpoint, force)

    settings = Settings.of(recipe)
    start = (
        start_from_scratch(settings, plan) if source is None else open_start(source, settings, plan, origin)
    )
    if start.report is None and folder is None and output.suffix not in DENSE_SUFFIXES:
        raise CheckpointError(f"{output}: end the name in .pt, .pth or .safetensors")

    model = start.network.model
    types = {name: each.dtype for name, each in model.state_dict().items()}

    with (
        deterministic(settings.deterministic),
        seeded(settings.seed),
        joined(chosen_device(settings.device)) as world,
    ):
        say_frozen(model)
        setup, data = training_setup(start, settings, checkpoint, world, progress, log)
        model.float().to(world.device)
        if isinstance(data.stream, Stream):
            _check_fit(model, setup.teacher, data.stream)

        state = train(model, training_options(settings), setup, resume)
        model.load_state_dict(state.best)
        _retype(model, types)
        if start.report:
            store_cores(model, start.report.plan)

        report = trained_report(start, settings, setup, state, data, progress, extras)
        if world.leads:
            _write(output, start, report, folder)
    return report


@torch.no_grad()
def _check_fit(model: nn.Module, teacher: nn.Module | None, stream: Stream) -> None:
    """See that the network, and the teacher, take the training images and have a class for each label."""
    images, _ = stream.sample
    labels = stream.images.num_classes or 0

    for network in filter(None, (model, teacher)):
        classes = logits_of(call(network.eval(), images[:2])).shape[-1]
        if labels > classes:
            raise DataError(f"{stream.images.name} has {labels} classes, the network {classes}")


@torch.no_grad()
def _retype(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Back to the types of before, training is in float32, and to torch's own memory format."""
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(types[name]).contiguous()


def _write(output: Path, start: StartingPoint, report: Report, folder: ModelFolder | None) -> None:
    model = start.network.model
    plan = start.report.plan if start.report else None
    tensors = stored_tensors(model, start.network.tensors, plan)
    if start.report:
        write_network(output, tensors, file_metadata(report, tensors), folder)
        return
    if folder is not None and start.network.architecture is not None:
        write_dense_folder(output, model.cpu(), start.network.architecture, folder)
        return

    tied = {alias: tensors[name] for alias, name in tied_parameters(model).items()}
    write_dense(output, {name: tensor.cpu() for name, tensor in {**tensors, **tied}.items()})
