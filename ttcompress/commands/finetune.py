"""Fine-tuning from file to file: the network, its teacher and its data go into the training loop, a file comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ttcompress.commands.compressor import Compressor
from ttcompress.commands.inputs import BATCH_SIZE, images_meter, labelled, preprocessing_for
from ttcompress.data.sets import Images, open_data
from ttcompress.data.training_batches import Stream
from ttcompress.errors import CheckpointError, DataError, PlanError
from ttcompress.files.checkpoint import (
    check_output,
    file_digest,
    is_compressed,
    tensor_bytes,
    write_dense,
    write_safetensors,
)
from ttcompress.files.shards import read_metadata
from ttcompress.measure.accuracy import Predictions, compare
from ttcompress.networks.opening import Network, initialise, open_any, open_dense, open_fresh
from ttcompress.networks.running import forward
from ttcompress.networks.stored import stored_tensors, tied_parameters
from ttcompress.networks.surgery import fresh_layer, store_cores, swap
from ttcompress.processes import World, expected_rank, joined
from ttcompress.recipe import FORM, Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Preprocessing, Report
from ttcompress.runtime import device_of, seeded
from ttcompress.train.loop import Course, Options, State, best_epoch, train
from ttcompress.tt.decompose import frobenius_norm
from ttcompress.version import __version__

EPOCHS = 30
RATES = {"sgd": 0.01, "adamw": 1e-3}
LONGEST_WARM_UP = 1 / 3
"""Share of the training in which the learning rate rises, at most, where one epoch is not less."""
HELD_OUT, MOST_HELD_OUT = 10, 5000
"""One training image in so many, and no more than so many, choose the best epoch where no --val is given."""
NO_MIRROR = ("digits", "mnist")
"""Data sets whose images mean something else in a mirror."""
TRAINING = ("teacher", "augment", *(each.name for each in fields(Options) if each.name not in ("epochs", "seed")))
"""Options that mean nothing where nothing is trained."""
Log = Callable[[Json], None]


@dataclass(frozen=True)
class Student:
    """The network to train, the plan and report of its TT layers, and the dense network it came from, if at hand."""

    network: Network
    report: Report | None = None
    original: nn.Module | None = None
    digest: str = ""


def check_sources(recipe: Recipe) -> None:
    """See that the images and the teacher of a training are there, before something long comes first.

    Raises:
        TTCompressError: one of them cannot be opened.
    """
    for images in filter(None, (recipe.train, recipe.val)):
        open_data(images, "train")
    if recipe.teacher:
        open_any(Path(recipe.teacher))


def state_file(output: Path) -> Path:
    """Where the state of the training that will write `output` is kept."""
    return output.with_name(f"{output.name}.training")


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
    log: Log | None = None,
) -> Report:
    """Train a compressed file or a dense checkpoint further and write the best epoch in the same form.

    Without a source the network of `recipe.arch` is trained from scratch, in TT form where the recipe or the plan
    says how. `origin` is the checkpoint that a compressed file was made from, looked for beside it by default. The
    state of the training is in `OUTPUT.training`, from which `resume` goes on.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    check_output(output, force)
    if recipe.train is None:
        raise DataError("name the training images with --train")
    saved = state_file(output)
    if not resume and expected_rank() == 0:
        check_output(saved, force)
    student = _from_scratch(recipe, plan) if source is None else _open_student(source, recipe, plan, origin)
    if student.report is None and output.suffix not in (".pt", ".pth", ".safetensors"):
        raise CheckpointError(f"{output}: end the name in .pt, .pth or .safetensors")
    model = student.network.model
    types = {name: each.dtype for name, each in model.state_dict().items()}
    with seeded(recipe), joined(device_of(recipe)) as world:
        course, facts = _course(student, recipe, saved, world, progress, log)
        model.float().to(world.device)
        _check_fit(model, course)
        state = train(model, _options(recipe, world), course, resume)
        model.load_state_dict(state.best)
        _retyped(model, types)
        if student.report:
            store_cores(model, student.report.plan)
        report = _report(student, recipe, course, state, facts, progress)
        if world.leads:
            _write(output, student, report)
    return report


@torch.no_grad()
def _check_fit(model: nn.Module, course: Course) -> None:
    """See that the network, and the teacher, take the training images and have a class for each label."""
    images, _ = next(iter(replace(course.stream, workers=0).epoch(0)))
    for network in (model, course.teacher):
        classes = forward(network.eval(), images[:2]).shape[-1] if network else 0
        known = course.stream.images.num_classes or 0
        if network and known > classes:
            raise DataError(f"{course.stream.images.name} has {known} classes, the network {classes}")


@torch.no_grad()
def _retyped(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Back to the types of before, training is in float32, and to torch's own memory format."""
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(types[name]).contiguous()


def _write(output: Path, student: Student, report: Report) -> None:
    plan = student.report.plan if student.report else None
    tensors = stored_tensors(student.network.model, student.network.tensors, plan)
    if student.report:
        write_safetensors(output, tensors, report.metadata())
    else:
        tied = {alias: tensors[name] for alias, name in tied_parameters(student.network.model).items()}
        write_dense(output, {name: tensor.cpu() for name, tensor in {**tensors, **tied}.items()})


# -------------------------------------------------------------------------------------------------------------- student


def _open_student(source: Path, recipe: Recipe, plan: CompressionPlan | None, origin: Path | None) -> Student:
    planned = plan or recipe.has_target or recipe.exec or recipe.tune or recipe.input_size
    if recipe.from_scratch or (origin is None and planned):
        raise PlanError(f"{source} is trained as it is: ranks, budgets and plans are for --arch with --from-scratch")
    if origin is None and (unused := recipe.given(*FORM, "dtype", "calib", "calib_images", "effort")):
        raise PlanError(f"{source} is trained as it is: leave out {', '.join(unused)}")
    network = open_any(source, recipe.arch, recipe.key or "")
    if not is_compressed(source):
        return Student(network, None, copy.deepcopy(network.model), file_digest(source))
    report = Report.from_json(read_metadata(source))
    origin = origin or source.with_name(str(report.source.get("file") or source.name))
    is_origin = origin.is_file() and file_digest(origin) == report.source.get("sha256")
    original = open_dense(origin, recipe.arch, recipe.key or "").model if is_origin else None
    return Student(network, report, original, file_digest(source))


def _from_scratch(recipe: Recipe, plan: CompressionPlan | None) -> Student:
    """Random weights, drawn by the seed; TT layers as their ranks say, initialised as torch does dense ones."""
    if not recipe.arch or not recipe.from_scratch:
        raise PlanError("give a compressed file or a checkpoint, or --arch with --from-scratch")
    with seeded(recipe):
        network = open_fresh(recipe.arch)
        if plan is None and not recipe.has_target:
            initialise(network.model)
            return Student(replace(network, tensors=network.model.state_dict()), digest=recipe.arch)
        size = recipe.input_size or (network.preprocessing and network.preprocessing.input_size) or ()
        plan = Compressor(network.model, recipe, device_of(recipe), input_shape=size).plan(recipe, plan)
        before = tensor_bytes(network.tensors)
        for layer in plan.layers:
            swap(network.model, layer.fqn, fresh_layer(layer))
        initialise(network.model)
    state = network.model.state_dict()
    after = tensor_bytes(stored_tensors(network.model, state, plan))
    report = Report(plan, before, after, __version__, recipe.seed or 0, {}, network.architecture)
    named = ", ".join(f"{layer.fqn} {layer.tensorization.format} {layer.tt_ranks}" for layer in plan.layers)
    return Student(replace(network, tensors=state), report, None, f"{recipe.arch} with {named}")


# --------------------------------------------------------------------------------------------------------------- course


def _options(recipe: Recipe, world: World) -> Options:
    stated = {each.name: getattr(recipe, each.name) for each in fields(Options)}
    given = {name: value for name, value in stated.items() if value is not None}
    # Where convolutions run faster so (docs/finetune.md).
    channels_last = world.device.type == "cpu" or (recipe.precision or "float32") != "float32"
    epochs = recipe.epochs or EPOCHS
    warm_up = min(1.0, epochs * LONGEST_WARM_UP)
    rate = RATES[recipe.optimizer or "sgd"]
    default = {"epochs": epochs, "lr": rate, "warm_up": warm_up, "channels_last": channels_last}
    return Options(**{**default, **given})


@dataclass(frozen=True)
class Facts:
    """What the report says of a training beside its history."""

    train: str
    val: str
    teacher: str | None
    preprocessing: Preprocessing


def _course(
    student: Student,
    recipe: Recipe,
    saved: Path,
    world: World,
    progress: Progress | None,
    log: Log | None,
) -> tuple[Course, Facts]:
    images = open_data(recipe.train or "", "train")
    preprocessing = preprocessing_for(recipe, student.network.preprocessing, images) or images.statistics()
    teacher, teacher_name = _teacher(student, recipe, world)
    if teacher is None and not images.labelled:
        raise DataError(f"{images.name} has no labels: name a network to learn from with --teacher")
    batch_size = recipe.batch_size or BATCH_SIZE
    if batch_size % world.size:
        raise PlanError(f"--batch-size {batch_size} cannot be shared by {world.size} processes")
    chosen, val = _held_out(images, recipe) if recipe.val is None else (images, open_data(recipe.val, "train"))
    default = "shift" if len(preprocessing.mean) == 1 or images.name.startswith(NO_MIRROR) else "flip"
    stream = Stream(
        chosen, preprocessing, batch_size, recipe.seed or 0, world.device, recipe.augment or default,
        recipe.workers or 0, world.rank, world.size,
    )  # fmt: skip
    facts = Facts(
        images.name, val.name if recipe.val else f"{len(val):,} of these held out", teacher_name, preprocessing
    )
    judge = _judge(val, preprocessing, batch_size, recipe.workers or 0, world, None if val.labelled else teacher)
    fingerprint = {
        **vars(_options(recipe, world)),
        "batch_size": batch_size, "augment": stream.augmentation, "processes": world.size,
        "train": f"{images.name} of {len(images)}", "val": f"{val.name} of {len(val)}", "teacher": teacher_name,
        "model": student.digest, "mean": list(preprocessing.mean), "std": list(preprocessing.std),
    }  # fmt: skip
    # A pretrained network was most likely trained on the very images that are held out of these.
    fair = recipe.val is not None or bool(recipe.from_scratch)
    return Course(stream, judge, world, teacher, saved, fair, fingerprint, progress, log), facts


def _teacher(student: Student, recipe: Recipe, world: World) -> tuple[nn.Module | None, str | None]:
    """The one that is named, else the dense network that the student came from, frozen."""
    if recipe.distill == 0:
        return None, None
    if recipe.teacher:
        path = Path(recipe.teacher)
        return _frozen(open_any(path).model, world), f"{path.name} {file_digest(path)[:12]}"
    if student.original is None:
        return None, None
    return _frozen(copy.deepcopy(student.original), world), "the dense network"


def _frozen(model: nn.Module, world: World) -> nn.Module:
    return model.requires_grad_(False).eval().float().to(world.device)


def _held_out(images: Images, recipe: Recipe) -> tuple[Images, Images]:
    """The training set without, and, the images that choose the best epoch; drawn by the seed."""
    count = min(MOST_HELD_OUT, len(images) // HELD_OUT)
    if not count:
        raise DataError(f"{images.name} has {len(images)} images, too few to hold some out: give --val")
    order = np.random.default_rng(recipe.seed or 0).permutation(len(images))
    return images.chosen(np.sort(order[count:]).tolist()), images.chosen(np.sort(order[:count]).tolist())


def _judge(
    images: Images,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int,
    world: World,
    teacher: nn.Module | None,
) -> Callable[[nn.Module], float]:
    """Percent of images with the right class, or with the teacher's; each process looks at its share."""
    share = images.chosen(range(world.rank, len(images), world.size))

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        counts = torch.zeros(2, dtype=torch.float64, device=world.device)
        for batch, labels in share.batches(preprocessing, batch_size, workers=workers):
            batch = batch.to(world.device)
            aims = forward(teacher, batch).argmax(1) if teacher else labels
            assert aims is not None
            right = (forward(model, batch).argmax(1) == aims.to(world.device)).sum()
            counts += torch.stack([right, right.new_tensor(len(batch))])
        right, seen = world.total(counts).tolist()
        return float(100 * right / seen)

    return judge


# --------------------------------------------------------------------------------------------------------------- report


def _report(
    student: Student, recipe: Recipe, course: Course, state: State, facts: Facts, progress: Progress | None
) -> Report:
    """What was known before, with the training, the new errors of the weights and, with --data, the new accuracy."""
    model, former = student.network.model.eval(), student.report or _dense_report(student, recipe)
    accuracy = None
    if recipe.data and course.world.leads:
        accuracy = _accuracy(labelled(recipe.data), student, former, recipe, facts, progress)
    paths = ("data", "val", "train", "teacher", "arch", "key", "device", "workers")
    finetuning = {
        "train": facts.train,
        "val": facts.val,
        "teacher": facts.teacher,
        "options": {name: value for name, value in recipe.to_json().items() if name not in paths},
        "start_counts": course.start_counts,
        "best": best_epoch(state.history, course.start_counts)["epoch"],
        "before": former.accuracy,
        "history": state.history,
    }
    layers = [replace(layer, relative_error=_error(layer, student.original, model)) for layer in former.plan.layers]
    return replace(
        former,
        plan=former.plan.with_layers(layers),
        version=__version__,
        preprocessing=facts.preprocessing,
        accuracy=accuracy,
        finetuning=finetuning,
    )


def _dense_report(student: Student, recipe: Recipe) -> Report:
    network = student.network
    kept = [KeptParameter(name, each.numel(), "dense", "") for name, each in network.model.named_parameters()]
    size = tensor_bytes(stored_tensors(network.model, network.tensors))
    return Report(
        CompressionPlan((), tuple(kept)), size, size, __version__, recipe.seed or 0,
        source=network.source or {}, architecture=network.architecture, tied=tied_parameters(network.model),
    )  # fmt: skip


def _accuracy(
    images: Images, student: Student, former: Report, recipe: Recipe, facts: Facts, progress: Progress | None
) -> Json:
    """Beside the dense network's, where that is at hand or was measured on the same images before."""
    meter = images_meter(images, facts.preprocessing, recipe, progress)
    found: Predictions = meter.run(student.network.model)
    if student.original is not None:
        return meter.summary(meter.run(student.original), found)
    ours = compare(found, found, images.name).to_json()
    known = former.accuracy if former.accuracy and former.accuracy.get("data") == images.name else {}
    theirs = {name: known.get(name) for name in ("dense", "dense_top5", "dense_interval")}
    return {**ours, **theirs, "agreement": None}


def _error(layer: LayerPlan, original: nn.Module | None, model: nn.Module) -> float | None:
    if original is None:
        return None
    weight, ours = (network.get_submodule(layer.fqn).weight.detach() for network in (original, model))  # type: ignore[operator]
    norm = frobenius_norm(weight)
    return frobenius_norm(weight - ours.to(weight)) / norm if norm else 0.0
