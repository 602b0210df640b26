"""What a training on texts runs on: samples of tokens, the dense network as teacher, a score of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ttcompress.commands.metric import Metric
from ttcompress.commands.starting_point import StartingPoint
from ttcompress.commands.texts import COSINE, all_texts, metric_on, require_reader, text_metric, token_samples
from ttcompress.data.text import open_texts
from ttcompress.data.token_batches import TokenStream
from ttcompress.data.tokens import TokenSamples
from ttcompress.errors import DataError, PlanError
from ttcompress.measure.accuracy import Predictions
from ttcompress.networks.reader import Reader, Task
from ttcompress.processes import World
from ttcompress.records.common import Json, Progress
from ttcompress.settings import Settings
from ttcompress.train.lesson import Classes, Lesson, NextTokens, Vectors
from ttcompress.train.setup import TrainingSetup

HELD_OUT, MOST_HELD_OUT = 10, 1000
"""One sample in so many, and no more than so many, choose the best epoch where no --val is given."""
OF_IMAGES = ("augment", "mixup", "cutmix", "channels_last", "mean", "std")
LESSONS: dict[Task, type[Lesson]] = {
    Task.CAUSAL: NextTokens,
    Task.CLASSIFIER: Classes,
    Task.ENCODER: Vectors,
}


def text_setup(
    start: StartingPoint,
    settings: Settings,
    checkpoint: Path,
    world: World,
    teacher: tuple[nn.Module | None, str | None],
    fingerprint: Json,
    progress: Progress | None,
    log: Callable[[Json], None] | None,
) -> tuple[TrainingSetup, str, str]:
    """The setup, and the names of what is trained on and what chooses the best epoch.

    Args:
        teacher: the network to learn from, and its name.
        fingerprint: what a resumed training has to share, beside the data.

    Raises:
        DataError: nothing to learn, or too little text.
        PlanError: options of images, or several processes.
    """
    recipe = settings.recipe
    reference = str(recipe.train)
    all_texts([each for each in (reference, recipe.val, recipe.data) if each])
    _check_options(settings, world)

    reader = require_reader(start.network.reader, reference)
    texts = open_texts(reference)
    samples = token_samples(texts, reader, settings)
    model, teacher_name = teacher
    _check_taught(samples, reader, model)

    if recipe.val is None:
        trained, held_out = _held_out(samples, settings)
        val_name, val_digest = f"{len(held_out):,} of these held out", ""
        metric = metric_on(held_out, None, reader, settings, None)
    else:
        val = open_texts(recipe.val)
        trained, val_name, val_digest = samples, val.name, val.digest[:12]
        metric = text_metric(recipe.val, reader, settings, None)

    setup = TrainingSetup(
        TokenStream(trained, settings.batch_size, settings.seed, world.device),
        _score(metric, model),
        world,
        model,
        checkpoint,
        recipe.val is not None,
        {
            **fingerprint,
            "train": f"{texts.name} of {len(samples)}, {texts.digest[:12]}",
            "val": f"{val_name}, {val_digest}",
            "teacher": teacher_name,
            "seq_len": recipe.seq_len,
        },
        progress,
        log,
        LESSONS[reader.task](),
    )
    return setup, texts.name, val_name


def _check_options(settings: Settings, world: World) -> None:
    if world.size > 1:
        raise PlanError("texts are trained on by one process")
    if unused := settings.recipe.given(*OF_IMAGES):
        raise PlanError(f"{', '.join(unused)}: only for images")


def _check_taught(samples: TokenSamples, reader: Reader, teacher: nn.Module | None) -> None:
    """See that there is something to learn: the next token, a label, or what a teacher says."""
    if teacher is not None or reader.task is Task.CAUSAL:
        return
    if reader.task is Task.ENCODER or samples.labels is None:
        raise DataError(
            f"{samples.name} does not say what is right: name the dense network to learn from with --teacher"
        )


def _held_out(samples: TokenSamples, settings: Settings) -> tuple[TokenSamples, TokenSamples]:
    """The samples to train on, and those that choose the best epoch; drawn by the seed."""
    count = min(MOST_HELD_OUT, len(samples) // HELD_OUT)
    if not count:
        raise DataError(
            f"{samples.name} has {len(samples)} samples, too few to hold some out: give --val, or a smaller --seq-len"
        )
    order = np.random.default_rng(settings.seed).permutation(len(samples)).tolist()
    return samples.chosen(sorted(order[count:])), samples.chosen(sorted(order[:count]))


def _score(metric: Metric, teacher: nn.Module | None) -> Callable[[nn.Module], float]:
    """In percent: accuracy, cosine or correlation; of a language model the mean probability of the next token.

    That mean is geometric, 100 over the perplexity.
    """
    known: list[Any] = []

    def score(model: nn.Module) -> float:
        if teacher is not None and not known:
            known.append(metric.measure(teacher))
        found = metric.measure(model)
        if isinstance(found, Predictions):
            return found.accuracy().top1
        summary = metric.summary(known[0] if known else found, found)
        return max(0.0, _percent(summary))

    return score


def _percent(summary: Json) -> float:
    value = float(summary["compressed"])
    if summary.get("lower_is_better"):
        return 100 / value
    return 100 * value if summary["metric"] == COSINE else value
