"""The state of a training: everything that decides its next step, saved whole and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import CheckpointError, differences
from ttcompress.files.header import brief, canonical_json
from ttcompress.files.output import replacing
from ttcompress.records.common import Json
from ttcompress.train.optimize import Average
from ttcompress.train.options import PRECISIONS


@dataclass
class State:
    """A training at some step: `step` batches of epoch `epoch` are done.

    `sums` are over those: the number of images, their summed loss and how many were classified right. `unbounded`
    are tensors that had NaN or Inf from the start, as masks do. `precision` is the one that the training runs in: a
    choice by the clock, which going on does not make again.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    precision: str = "float32"
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[Json] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    unbounded: frozenset[str] = frozenset()

    @property
    def values(self) -> dict[str, Tensor]:
        """The state dict that counts: the average where one is kept."""
        return self.average.values if self.average else self.model.state_dict()

    def save(self, path: Path, fingerprint: Json) -> None:
        """Write everything to a file that the former one stands for until it is whole."""
        average = {"values": self.average.values, "updates": self.average.updates} if self.average else None
        content = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": average,
            "precision": self.precision,
            "progress": {"epoch": self.epoch, "step": self.step, "sums": self.sums, "history": self.history},
            "best": self.best,
        }
        # Given a name instead of a file, torch.save would write the temporary one's into it.
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def load(self, path: Path, fingerprint: Json, device: torch.device) -> None:
        """Go back to a saved state.

        Raises:
            CheckpointError: no such file, a damaged one, or one of a training with other options, naming
                them.
        """
        content = _read(path)
        differing = differences(content["fingerprint"], fingerprint)
        if differing:
            raise CheckpointError(f"{path}: was trained otherwise: {differing}; repeat the command as it was")

        if problem := problem_of(content, self):
            raise CheckpointError(
                f"{path}: is of another network, or damaged: {problem}; start again without --resume"
            )
        try:
            self._restore(content, device)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: is of another network, or damaged: {brief(error)}; start again without --resume"
            ) from error

    def _restore(self, content: dict[str, Any], device: torch.device) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.average:
            self.average.values = {
                name: each.to(device) for name, each in content["average"]["values"].items()
            }
            self.average.updates = content["average"]["updates"]

        self.precision = content["precision"]
        for name in PROGRESS:
            setattr(self, name, content["progress"][name])
        self.best = {name: each.to(device) for name, each in content["best"].items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: nothing to resume, no such file")
    try:
        # Not to the device, where it would be held twice, and AdamW's counters be waited for in every step.
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(f"{path}: not a readable training checkpoint: {kind}") from error

    if not isinstance(content, dict) or not isinstance(content.get("fingerprint"), dict):
        raise CheckpointError(f"{path}: not a training checkpoint")
    try:
        canonical_json(content["fingerprint"])
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a training checkpoint: {brief(error)}") from error
    return content


# ------------------------------------------------------------------------------------------- what a state has to be

PROGRESS = ("epoch", "step", "sums", "history")
KEPT_BY = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}
"""What an optimizer keeps of a parameter, once it has taken a step."""


def problem_of(content: dict[str, Any], state: State) -> str:
    """What is wrong with a saved state for going on with it, in a few words; empty where nothing is."""
    for name in ("model", "optimizer", "scaler", "progress", "best"):
        if not isinstance(content.get(name), dict):
            return f"it lacks {name}"
    if content.get("precision") not in tuple(PRECISIONS):
        return "its precision"

    average = content.get("average")
    if (average is None) != (state.average is None):
        return "an average of the weights is there or is not, against the options"
    values = [("model", content["model"]), ("best", content["best"])]
    if state.average:
        if not isinstance(average, dict) or not _is_count(average.get("updates")):
            return "its average of the weights"
        values.append(("average", average.get("values")))

    problems = (_problem_of_tensors(name, held, state) for name, held in values)
    return (
        next(filter(None, problems), "")
        or _problem_of_progress(content["progress"])
        or _problem_of_optimizer(content["optimizer"], state.optimizer)
        or ("" if all(map(_is_number, content["scaler"].values())) else "its scale of the loss")
    )


def _problem_of_tensors(what: str, held: Any, state: State) -> str:
    now = state.model.state_dict()
    if not isinstance(held, dict) or held.keys() != now.keys():
        return f"other names in {what}"
    for name, value in held.items():
        expected = now[name]
        if not _is_like(value, expected) or value.dtype != expected.dtype:
            return f"{name} in {what} has another shape or type"
        if name not in state.unbounded and not _is_finite(value):
            return f"{name} in {what} is not finite"
    return ""


def _problem_of_progress(progress: dict[str, Any]) -> str:
    epoch: Any
    epoch, step, sums, history = (progress.get(name) for name in PROGRESS)
    if not _is_count(epoch) or not _is_count(step):
        return "its place in the training"
    if (
        not isinstance(sums, list)
        or len(sums) != 3
        or not all(map(_is_number, sums))
        or (step and not sums[0] > 0)
    ):
        return "its sums over an epoch"
    # The network as it was is epoch 0.
    if not isinstance(history, list) or len(history) != epoch + 1:
        return "its history"
    for number, record in enumerate(history):
        figures = ("val",) if number == 0 else ("val", "loss", "train")
        if not isinstance(record, dict) or record.get("epoch") != number:
            return "its history"
        if not all(_is_number(record.get(figure)) for figure in figures):
            return "its history"
    return ""


def _problem_of_optimizer(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> str:
    now = optimizer.state_dict()
    groups, kept = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(kept, dict) or len(groups) != len(now["param_groups"]):
        return "its optimizer"
    for group, expected in zip(groups, now["param_groups"], strict=True):
        if not isinstance(group, dict) or not all(
            _is_alike(group.get(name), expected[name]) for name in expected
        ):
            return "the options of its optimizer"

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, held in kept.items():
        if not _is_count(index) or index >= len(parameters) or not isinstance(held, dict):
            return "its optimizer"
        names = KEPT_BY.get(type(optimizer), set())
        if not names <= held.keys() or not all(_is_kept(value, parameters[index]) for value in held.values()):
            return f"what its optimizer keeps of parameter {index}"
    return ""


def _is_alike(value: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return _is_number(value)
    return type(value) is type(expected) and (not isinstance(expected, list) or value == expected)


def _is_kept(value: Any, parameter: Tensor) -> bool:
    if value is None:
        return True
    if not isinstance(value, Tensor):
        return _is_number(value)
    return (
        (value.dim() == 0 or _is_like(value, parameter)) and value.is_floating_point() and _is_finite(value)
    )


def _is_like(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == expected.shape and value.layout == torch.strided


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
