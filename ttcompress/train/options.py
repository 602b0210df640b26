"""How to train."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
