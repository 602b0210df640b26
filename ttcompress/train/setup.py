"""What a training runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ttcompress.data.training_batches import TrainingBatches
from ttcompress.processes import World
from ttcompress.records.common import Json, Progress
from ttcompress.train.lesson import Classes, Lesson


@dataclass(frozen=True)
class TrainingSetup:
    """What a training runs on: batches, a teacher, how an epoch is scored, where the state is saved.

    `score` gives the score of a network, higher is better, the same number in all processes. `start_counts`
    says whether the network as it was may be the best one, which is fair only if it never saw the images that
    score it. `lesson` is what is learned. The training resumes from `checkpoint` only under the same `fingerprint`.
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
    lesson: Lesson = field(default_factory=Classes)
