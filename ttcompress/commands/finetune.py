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
from ttcompress.commands.inputs import accuracy_on, measured_images, preprocessing_for
from ttcompress.data.opening import open_data
from ttcompress.data.sets import Images
from ttcompress.data.training_batches import Stream
from ttcompress.errors import CheckpointError, DataError, PlanError
from ttcompress.files.checkpoint import file_digest, is_compressed
from ttcompress.files.output import check_output
from ttcompress.files.shards import read_metadata, stem
from ttcompress.files.tensors import tensor_bytes
from ttcompress.files.writing import write_dense, write_safetensors
from ttcompress.measure.accuracy import Predictions, compare
from ttcompress.networks.opening import Network, initialise, open_any, open_dense, open_fresh
from ttcompress.networks.running import forward
from ttcompress.networks.stored import stored_tensors, tied_parameters
from ttcompress.networks.surgery import fresh_layer, store_cores, swap
from ttcompress.processes import World, joined
from ttcompress.recipe import FORM, Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Preprocessing, Report
from ttcompress.runtime import chosen_device, seeded
from ttcompress.settings import Settings
from ttcompress.torchrun import expected_rank
from ttcompress.train.loop import best_epoch, train
from ttcompress.train.setup import TrainingOptions, TrainingSetup
from ttcompress.train.state import State
from ttcompress.tt.decompose import frobenius_norm
from ttcompress.version import __version__

HELD_OUT, MOST_HELD_OUT = 10, 5000
"""One training image in so many, and no more than so many, choose the best epoch where no --val is given."""
NO_MIRROR = ("digits", "mnist")
"""Data sets whose images mean something else in a mirror."""
ONLY_IN_TRAINING = (
    "teacher",
    "augment",
    *(each.name for each in fields(TrainingOptions) if each.name not in ("epochs", "seed")),
)
"""Options that mean nothing where nothing is trained."""
EpochLog = Callable[[Json], None]


@dataclass(frozen=True)
class Student:
    """The network to train, the plan and report of its TT layers, and the dense network it came from, if at hand."""

    network: Network
    report: Report | None = None
    original: nn.Module | None = None
    digest: str = ""


def check_inputs(recipe: Recipe) -> None:
    """See that the images and the teacher of a training are there, before something long comes first.

    Raises:
        TTCompressError: one of them cannot be opened.
    """
    for images in filter(None, (recipe.train, recipe.val)):
        open_data(images, "train")
    if recipe.teacher:
        open_any(Path(recipe.teacher))


def default_output(model: Path | None, recipe: Recipe) -> Path:
    """Where a trained network goes that nobody named a place for."""
    stem_ = stem(model) if model else str(recipe.arch).rpartition(":")[2]
    return Path(f"{stem_}-ft.safetensors")


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
    log: EpochLog | None = None,
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
    settings = Settings.of(recipe)
    student = _from_scratch(settings, plan) if source is None else _open_student(source, settings, plan, origin)
    if student.report is None and output.suffix not in (".pt", ".pth", ".safetensors"):
        raise CheckpointError(f"{output}: end the name in .pt, .pth or .safetensors")
    model = student.network.model
    types = {name: each.dtype for name, each in model.state_dict().items()}
    with seeded(settings.seed), joined(chosen_device(settings.device)) as world:
        course, facts = _course(student, settings, saved, world, progress, log)
        model.float().to(world.device)
        _check_fit(model, course)
        state = train(model, _options(settings, world), course, resume)
        model.load_state_dict(state.best)
        _retyped(model, types)
        if student.report:
            store_cores(model, student.report.plan)
        report = _report(student, settings, course, state, facts, progress)
        if world.leads:
            _write(output, student, report)
    return report


@torch.no_grad()
def _check_fit(model: nn.Module, course: TrainingSetup) -> None:
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
        write_safetensors(output, tensors, report.to_json())
    else:
        tied = {alias: tensors[name] for alias, name in tied_parameters(student.network.model).items()}
        write_dense(output, {name: tensor.cpu() for name, tensor in {**tensors, **tied}.items()})


# -------------------------------------------------------------------------------------------------------------- student


def _open_student(source: Path, settings: Settings, plan: CompressionPlan | None, origin: Path | None) -> Student:
    recipe = settings.recipe
    planned = plan or recipe.has_target or recipe.exec or recipe.tune or recipe.input_size
    if settings.from_scratch or (origin is None and planned):
        raise PlanError(f"{source} is trained as it is: ranks, budgets and plans are for --arch with --from-scratch")
    if origin is None and (unused := recipe.given(*FORM, "dtype", "calib", "calib_images", "effort")):
        raise PlanError(f"{source} is trained as it is: leave out {', '.join(unused)}")
    network = open_any(source, recipe.arch, settings.key)
    if not is_compressed(source):
        return Student(network, None, copy.deepcopy(network.model), file_digest(source))
    report = Report.from_json(read_metadata(source))
    origin = origin or source.with_name(str(report.source.get("file") or source.name))
    is_origin = origin.is_file() and file_digest(origin) == report.source.get("sha256")
    original = open_dense(origin, recipe.arch, settings.key).model if is_origin else None
    return Student(network, report, original, file_digest(source))


def _from_scratch(settings: Settings, plan: CompressionPlan | None) -> Student:
    """Random weights, drawn by the seed; TT layers as their ranks say, initialised as torch does dense ones."""
    recipe = settings.recipe
    if not recipe.arch or not settings.from_scratch:
        raise PlanError("give a compressed file or a checkpoint, or --arch with --from-scratch")
    with seeded(settings.seed):
        network = open_fresh(recipe.arch)
        if plan is None and not recipe.has_target:
            initialise(network.model)
            return Student(replace(network, tensors=network.model.state_dict()), digest=recipe.arch)
        size = settings.input_size or (network.preprocessing and network.preprocessing.input_size) or ()
        plan = Compressor(network.model, settings, chosen_device(settings.device), input_shape=size).plan(recipe, plan)
        before = tensor_bytes(network.tensors)
        for layer in plan.layers:
            swap(network.model, layer.fqn, fresh_layer(layer))
        initialise(network.model)
    state = network.model.state_dict()
    after = tensor_bytes(stored_tensors(network.model, state, plan))
    report = Report(plan, before, after, __version__, settings.seed, {}, network.architecture)
    named = ", ".join(f"{layer.fqn} {layer.tensorization.format} {layer.tt_ranks}" for layer in plan.layers)
    return Student(replace(network, tensors=state), report, None, f"{recipe.arch} with {named}")


# --------------------------------------------------------------------------------------------------------------- course


def _options(settings: Settings, world: World) -> TrainingOptions:
    stated = {each.name: getattr(settings, each.name) for each in fields(TrainingOptions)}
    if settings.channels_last is None:
        # Where convolutions run faster so (docs/finetune.md).
        stated["channels_last"] = world.device.type == "cpu" or settings.precision != "float32"
    return TrainingOptions(**stated)


@dataclass(frozen=True)
class Facts:
    """What the report says of a training beside its history."""

    train: str
    val: str
    teacher: str | None
    preprocessing: Preprocessing


def _course(
    student: Student,
    settings: Settings,
    saved: Path,
    world: World,
    progress: Progress | None,
    log: EpochLog | None,
) -> tuple[TrainingSetup, Facts]:
    recipe = settings.recipe
    images = open_data(str(recipe.train), "train")
    preprocessing = preprocessing_for(settings, student.network.preprocessing, images) or images.statistics()
    teacher, teacher_name = _teacher(student, settings, world)
    if teacher is None and not images.labelled:
        raise DataError(f"{images.name} has no labels: name a network to learn from with --teacher")
    batch_size = settings.batch_size
    if batch_size % world.size:
        raise PlanError(f"--batch-size {batch_size} cannot be shared by {world.size} processes")
    chosen, val = _held_out(images, settings) if recipe.val is None else (images, open_data(recipe.val, "train"))
    default = "shift" if len(preprocessing.mean) == 1 or images.name.startswith(NO_MIRROR) else "flip"
    stream = Stream(
        chosen, preprocessing, batch_size, settings.seed, world.device, settings.augment or default,
        settings.workers, world.rank, world.size,
    )  # fmt: skip
    facts = Facts(
        images.name, val.name if recipe.val else f"{len(val):,} of these held out", teacher_name, preprocessing
    )
    judge = _judge(val, preprocessing, batch_size, settings.workers, world, None if val.labelled else teacher)
    fingerprint = {
        **vars(_options(settings, world)),
        "batch_size": batch_size, "augment": stream.augmentation, "processes": world.size,
        "train": f"{images.name} of {len(images)}", "val": f"{val.name} of {len(val)}", "teacher": teacher_name,
        "model": student.digest, "mean": list(preprocessing.mean), "std": list(preprocessing.std),
    }  # fmt: skip
    # A pretrained network was most likely trained on the very images that are held out of these.
    fair = recipe.val is not None or settings.from_scratch
    return TrainingSetup(stream, judge, world, teacher, saved, fair, fingerprint, progress, log), facts


def _teacher(student: Student, settings: Settings, world: World) -> tuple[nn.Module | None, str | None]:
    """The one that is named, else the dense network that the student came from, frozen."""
    if settings.distill == 0:
        return None, None
    if settings.recipe.teacher:
        path = Path(settings.recipe.teacher)
        return _frozen(open_any(path).model, world), f"{path.name} {file_digest(path)[:12]}"
    if student.original is None:
        return None, None
    return _frozen(copy.deepcopy(student.original), world), "the dense network"


def _frozen(model: nn.Module, world: World) -> nn.Module:
    return model.requires_grad_(False).eval().float().to(world.device)


def _held_out(images: Images, settings: Settings) -> tuple[Images, Images]:
    """The training set without, and, the images that choose the best epoch; drawn by the seed."""
    count = min(MOST_HELD_OUT, len(images) // HELD_OUT)
    if not count:
        raise DataError(f"{images.name} has {len(images)} images, too few to hold some out: give --val")
    order = np.random.default_rng(settings.seed).permutation(len(images))
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
    student: Student, settings: Settings, course: TrainingSetup, state: State, facts: Facts, progress: Progress | None
) -> Report:
    """What was known before, with the training, the new errors of the weights and, with --data, the new accuracy."""
    recipe = settings.recipe
    model, former = student.network.model.eval(), student.report or _dense_report(student, settings)
    accuracy = None
    images = measured_images(recipe)
    if images and course.world.leads:
        accuracy = _accuracy(images, student, former, settings, facts, progress)
    paths = ("data", "limit", "val", "train", "teacher", "arch", "key", "device", "workers")
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


def _dense_report(student: Student, settings: Settings) -> Report:
    network = student.network
    kept = [KeptParameter(name, each.numel(), "dense", "") for name, each in network.model.named_parameters()]
    size = tensor_bytes(stored_tensors(network.model, network.tensors))
    return Report(
        CompressionPlan((), tuple(kept)), size, size, __version__, settings.seed,
        source=network.source or {}, architecture=network.architecture, tied=tied_parameters(network.model),
    )  # fmt: skip


def _accuracy(
    images: Images, student: Student, former: Report, settings: Settings, facts: Facts, progress: Progress | None
) -> Json:
    """Beside the dense network's, where that is at hand or was measured on the same images before."""
    metric = accuracy_on(images, facts.preprocessing, settings, progress)
    found: Predictions = metric.measure(student.network.model)
    if student.original is not None:
        return metric.summary(metric.measure(student.original), found)
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
