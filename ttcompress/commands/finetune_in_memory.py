"""Training of any module on any loader, for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Never

import torch
from torch import nn

from ttcompress.commands.in_memory import LabelledBatches, check_keywords, speaking_python
from ttcompress.commands.training import frozen, say_frozen, training_options
from ttcompress.data.training_batches import LoaderBatches
from ttcompress.errors import DataError
from ttcompress.measure.accuracy import predict
from ttcompress.networks.held import copied
from ttcompress.processes import World
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.runtime import chosen_device, seeded
from ttcompress.runtime import deterministic as reproducible
from ttcompress.settings import Settings
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions
from ttcompress.train.setup import TrainingSetup


def finetune(
    module: nn.Module,
    train_loader: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    val: LabelledBatches | None = None,
    epochs: int | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    schedule: str | None = None,
    warm_up: float | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    ema: float | None = None,
    label_smoothing: float | None = None,
    distill: float | None = None,
    temperature: float | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    precision: str | None = None,
    channels_last: bool | None = None,
    compile: bool | None = None,
    accumulate: int | None = None,
    deterministic: bool | None = None,
    device: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    log: Callable[[Json], None] | None = None,
    **unknown: Never,
) -> list[Json]:
    """Train a classifier in place, compressed or not, and return its history, a record an epoch.

    TT-cores and all other parameters that require gradients are trained. It ends in eval mode with the weights of the
    best epoch on `val`, or of the last one where there is no `val`, and on the device where it was trained.

    Args:
        train_loader: batches of (inputs, labels), or of inputs alone where there is a teacher; anything with a length
            that can be gone through once an epoch, such as a DataLoader.
        teacher: a network whose logits are learned, such as the dense one; it is copied.
        val: labelled batches that choose the best epoch; the network as it was counts as epoch 0.
        epochs, lr and so on: options of the command line (docs/cli.md), with the same defaults.

    Raises:
        DataError: batches that the network does not take, or no labels and no teacher.
        PlanError: an option out of range.
        TrainingError: the loss is no longer finite.
        TypeError: a keyword that there is not, with the nearest that there is.

    >>> import torch, ttcompress
    >>> x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    >>> batches = list(zip(x.split(16), (x[:, 0] > 0).long().split(16)))
    >>> net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> history = ttcompress.finetune(net, batches, epochs=5, lr=0.1, val=batches)
    >>> history[-1]["epoch"], history[-1]["loss"] < history[1]["loss"]
    (5, True)
    """
    given = locals()
    check_keywords(given, finetune)
    with speaking_python():
        names = {each.name for each in fields(TrainingOptions)} | {"device"}
        settings = Settings.of(Recipe(**{name: given[name] for name in names}))
        where = chosen_device(settings.device)
        options = _options(settings)

        setup = TrainingSetup(
            LoaderBatches(train_loader, where),
            _score(val, where),
            World(where),
            teacher=frozen(copied(teacher), where) if teacher and options.distill else None,
            start_counts=val is not None,
            progress=progress,
            log=log,
        )
        with reproducible(settings.deterministic), seeded(settings.seed):
            _check_batches(setup)
            say_frozen(module)
            state = train(module.to(where), options, setup)
        module.load_state_dict(state.best)
        module.eval()
    return state.history


def _options(settings: Settings) -> TrainingOptions:
    # A module of the user's own may hold anything: its memory format is not changed unasked.
    return replace(training_options(settings), channels_last=bool(settings.channels_last))


def _score(val: LabelledBatches | None, device: torch.device) -> Callable[[nn.Module], float]:
    """Top-1 accuracy on `val`; without it, what makes the last epoch the best."""
    epoch = 0

    def count(model: nn.Module) -> float:
        nonlocal epoch
        epoch += 1
        return float(epoch)

    def top1(model: nn.Module) -> float:
        return predict(model, val or (), device).accuracy().top1

    return count if val is None else top1


def _check_batches(setup: TrainingSetup) -> None:
    # Whether there is any is asked first: some loaders can be gone through once only.
    if setup.stream.steps == 0:
        raise DataError("train_loader gives no batch")
    _, labels = setup.stream.sample
    if labels is None and setup.teacher is None:
        raise DataError("train_loader gives no labels: name a network to learn from with teacher")
