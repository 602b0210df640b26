"""The state of a training: everything that decides its next step, saved whole and read back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import CheckpointError, differences
from ttcompress.files.output import replacing
from ttcompress.records.common import Json
from ttcompress.train.optimize import Average


@dataclass
class State:
    """A training at some step: `step` batches of epoch `epoch` are done.

    `sums` are over those: the number of images, their summed loss and how many were classified right.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[Json] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

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
        content = _read(path, device)
        differing = differences(content["fingerprint"], fingerprint)
        if differing:
            raise CheckpointError(f"{path}: was trained otherwise: {differing}; repeat the command as it was")

        try:
            self._restore(content)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            kind = type(error).__name__
            raise CheckpointError(f"{path}: is of another network, or damaged: {kind}") from error

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        if self.average:
            self.average.values = content["average"]["values"]
            self.average.updates = content["average"]["updates"]

        for name, value in content["progress"].items():
            setattr(self, name, value)
        self.best = content["best"]


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: nothing to resume, no such file")
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        kind = type(error).__name__
        raise CheckpointError(f"{path}: not a readable training checkpoint: {kind}") from error

    if not isinstance(content, dict) or "fingerprint" not in content:
        raise CheckpointError(f"{path}: not a training checkpoint")
    return content
