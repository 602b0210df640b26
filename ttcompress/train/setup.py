"""What a training is given: its options, and what it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ttcompress.data.training_batches import TrainingBatches
from ttcompress.processes import World
from ttcompress.records.common import Json, Progress

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    `warm_up` is in epochs, `clip` the largest norm of the gradients or 0 for any, `ema` 0 or the decay of an
    average of the weights, `distill` the teacher's share of the loss, `accumulate` the number of parts that a
    batch is split into. `precision` is one of `PRECISIONS` or `auto`, as `chosen_precision` finds; `channels_last`
    may be None, for where it is faster.
    """

    epochs: int
    lr: float
    optimizer: str = "sgd"
    schedule: str = "cosine"
    warm_up: float = 1.0
    weight_decay: float = 1e-4
    clip: float = 5.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: str = "auto"
    channels_last: bool | None = False
    compile: bool = False
    accumulate: int = 1
    deterministic: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TrainingSetup:
    """What a training runs on: batches, a teacher, how an epoch is scored, where the state is saved.

    `score` gives the score of a network, higher is better, the same number in all processes. `start_counts`
    says whether the network as it was may be the best one, which is fair only if it never saw the images that
    score it. The training resumes from `checkpoint` only under the same `fingerprint`.
    """

    stream: TrainingBatches
    score: Callable[[nn.Module], float]
    world: World
    teacher: nn.Module | None = None
    checkpoint: Path | None = None
    start_counts: bool = True
    fingerprint: Json = field(default_factory=dict)
    progress: Progress | None = None
    log: Callable[[Json], None] | None = None
