"""What a training runs on, from what a recipe says: batches, teacher, score and options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ttcompress.commands.inputs import preprocessing_for
from ttcompress.commands.starting_point import StartingPoint
from ttcompress.commands.text_training import text_setup
from ttcompress.data.opening import open_data
from ttcompress.data.resident import Shown
from ttcompress.data.sets import Images
from ttcompress.data.text import names_texts
from ttcompress.data.training_batches import Stream, TrainingBatches
from ttcompress.errors import DataError, PlanError, TrainingError, shortlist
from ttcompress.files.checkpoint import file_digest
from ttcompress.networks.held import copied
from ttcompress.networks.opening import open_any
from ttcompress.networks.running import call, finite
from ttcompress.networks.structures import logits_of
from ttcompress.processes import World
from ttcompress.records.common import Json, Progress
from ttcompress.records.report import Preprocessing
from ttcompress.settings import Settings
from ttcompress.torchrun import leads
from ttcompress.train.options import TrainingOptions
from ttcompress.train.setup import TrainingSetup

HELD_OUT, MOST_HELD_OUT = 10, 5000
"""One training image in so many, and no more than so many, choose the best epoch where no --val is given."""
SCORED_ON_GPU = 4
"""So many times a batch is scored at a time there: what is kept for gradients takes more memory."""
NO_MIRROR = ("digits", "mnist")
"""Data sets whose images mean something else in a mirror."""
EpochLog = Callable[[Json], None]
Score = Callable[[nn.Module], float]
"""What chooses the best epoch: a figure of a network, higher is better."""


@dataclass(frozen=True)
class TrainingData:
    """The images or texts of a training, in which normalisation, and what the report calls them and the teacher."""

    stream: TrainingBatches
    train: str
    val: str
    teacher: str | None
    preprocessing: Preprocessing | None


def training_options(settings: Settings) -> TrainingOptions:
    """The settings of the training alone."""
    return TrainingOptions(**{each.name: getattr(settings, each.name) for each in fields(TrainingOptions)})


def training_setup(
    start: StartingPoint,
    settings: Settings,
    checkpoint: Path,
    world: World,
    progress: Progress | None,
    log: EpochLog | None,
) -> tuple[TrainingSetup, TrainingData]:
    """Open what the recipe data, in the normalisation of the network.

    Raises:
        DataError: images without labels and without a teacher, or too few of them.
        PlanError: a batch that the processes cannot share.
    """
    recipe = settings.recipe
    teacher, teacher_name = _teacher(start, settings, world)
    if names_texts(str(recipe.train)):
        known = {**vars(training_options(settings)), "batch_size": settings.batch_size, "model": start.digest}
        setup, texts, held_out = text_setup(
            start, settings, checkpoint, world, (teacher, teacher_name), known, progress, log
        )
        return setup, TrainingData(setup.stream, texts, held_out, teacher_name, None)

    images = open_data(str(recipe.train), "train")
    preprocessing = preprocessing_for(settings, start.network.preprocessing, images) or images.statistics()

    if teacher is None and not images.labelled:
        raise DataError(f"{images.name} has no labels: name a network to learn from with --teacher")
    if settings.batch_size % world.size:
        raise PlanError(f"--batch-size {settings.batch_size} cannot be shared by {world.size} processes")

    if recipe.val is None:
        chosen, val = _held_out(images, settings)
        val_name = f"{len(val):,} of these held out"
    else:
        chosen, val = images, open_data(recipe.val, "train")
        val_name = val.name

    stream = _stream(chosen, preprocessing, settings, world)
    score = _score_on(val, preprocessing, settings, world, None if val.labelled else teacher)
    fingerprint = {
        **vars(training_options(settings)),
        "batch_size": settings.batch_size,
        "augment": stream.augmentation,
        "processes": world.size,
        "train": f"{images.name} of {len(images)}, {images.digest()[:12]}",
        "val": f"{val.name} of {len(val)}, {val.digest()[:12]}",
        "teacher": teacher_name,
        "model": start.digest,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
    # A pretrained network was most likely trained on the very images that are held out of these.
    start_counts = recipe.val is not None or settings.from_scratch
    setup = TrainingSetup(stream, score, world, teacher, checkpoint, start_counts, fingerprint, progress, log)
    return setup, TrainingData(stream, images.name, val_name, teacher_name, preprocessing)


def _stream(images: Images, preprocessing: Preprocessing, settings: Settings, world: World) -> Stream:
    means_another_mirrored = len(preprocessing.mean) == 1 or images.name.startswith(NO_MIRROR)
    return Stream(
        images,
        preprocessing,
        settings.batch_size,
        settings.seed,
        world.device,
        settings.augment or ("shift" if means_another_mirrored else "flip"),
        settings.workers,
        world.rank,
        world.size,
    )


def _teacher(start: StartingPoint, settings: Settings, world: World) -> tuple[nn.Module | None, str | None]:
    """The network that is named, else the dense one that the training starts from; frozen, with its name."""
    named = settings.recipe.teacher
    if settings.distill == 0:
        return None, None
    if named:
        path = Path(named)
        return frozen(open_any(path).model, world.device), f"{path.name} {file_digest(path)[:12]}"
    if start.original is None:
        return None, None
    return frozen(copied(start.original), world.device), "the dense network"


def frozen(model: nn.Module, device: torch.device) -> nn.Module:
    """A teacher: in eval mode and float32, without gradients."""
    return model.requires_grad_(False).eval().float().to(device)


def say_frozen(model: nn.Module) -> None:
    """Log which layers a training leaves as they are, since they require no gradients.

    Raises:
        TrainingError: all of them.
    """
    parameters = dict(model.named_parameters())
    frozen_ones = [name for name, each in parameters.items() if not each.requires_grad]
    if len(frozen_ones) == len(parameters):
        raise TrainingError(
            "nothing to train: no parameter of the network requires gradients (requires_grad)"
        )
    if not frozen_ones or not leads():
        return

    layers = dict.fromkeys(name.rpartition(".")[0].removesuffix(".cores") for name in frozen_ones)
    count = sum(parameters[name].numel() for name in frozen_ones)
    logging.getLogger("ttcompress").warning(
        f"ttcompress: {count:,} parameters are not trained, since they require no gradients: {shortlist(layers)}"
    )


def _held_out(images: Images, settings: Settings) -> tuple[Images, Images]:
    """The training set without, and, the images that choose the best epoch; drawn by the seed."""
    count = min(MOST_HELD_OUT, len(images) // HELD_OUT)
    if not count:
        raise DataError(f"{images.name} has {len(images)} images, too few to hold some out: give --val")

    order = np.random.default_rng(settings.seed).permutation(len(images))
    held_out, trained = np.sort(order[:count]), np.sort(order[count:])
    return images.chosen(trained.tolist()), images.chosen(held_out.tolist())


def _score_on(
    images: Images, preprocessing: Preprocessing, settings: Settings, world: World, teacher: nn.Module | None
) -> Score:
    """Percent of images with the right class, or with the teacher's; each process looks at its share."""
    share = images.chosen(range(world.rank, len(images), world.size))
    device = world.device
    batch_size = settings.batch_size * (SCORED_ON_GPU if device.type == "cuda" else 1)
    there = Shown(share, preprocessing, device)

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for batch, labels in there.batches(batch_size, settings.workers):
            targets = labels if teacher is None else _classes(teacher, batch)
            if targets is None:
                raise DataError(f"{images.name} has no labels to choose the best epoch by")
            right = (_classes(model, batch) == targets).sum()
            # Filled on the device: a number that is sent there would wait for it.
            counts += torch.stack([right, right.new_full((), len(batch))])

        right_of_all, seen = world.total(counts).tolist()
        return float(100 * right_of_all / seen)

    return score


def _classes(model: nn.Module, images: Tensor) -> Tensor:
    return finite(logits_of(call(model, images))).argmax(1)
