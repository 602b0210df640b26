"""How a network is measured, and what the report says of it before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ttcompress.measure.accuracy import Batches, Predictions, compare, predict
from ttcompress.records.common import Json, Progress


@dataclass(frozen=True)
class Metric:
    """How to measure a network, and how to put its measurement before and after into the report's `accuracy`."""

    measure: Callable[[nn.Module], Any]
    summary: Callable[[Any, Any], Json]


def accuracy_of(
    batches: Callable[[], Batches],
    name: str,
    device: torch.device,
    progress: Progress | None,
    outputs: Sequence[str] = (),
) -> Metric:
    """Accuracy on labelled batches, made anew for every measurement; `outputs` as in `predict`."""

    def measure(model: nn.Module) -> Predictions:
        return predict(model.to(device), batches(), device, progress, outputs)

    def summary(dense: Predictions, compressed: Predictions) -> Json:
        return compare(dense, compressed, name).to_json()

    return Metric(measure, summary)
