"""What the rows of a GPU have in common: where they find and leave things, and the file of their lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where rows run, what they need that is not in the repository, and where they leave what they make.

    `scale` shortens trainings and `is_tiny` makes layers small, to try all of it on a CPU.
    """

    cifar10: str | None
    checkpoints: Path | None
    results: Path
    work: Path
    device: torch.device
    scale: float = 1.0
    is_tiny: bool = False

    def epochs(self, count: int) -> int:
        return max(2, round(self.scale * count))


Run = Callable[[Place], Row]


def done(results: Path) -> set[str]:
    """The names of the rows that have a line."""
    if not results.exists():
        return set()
    return {json.loads(line)["gpu_row"] for line in results.read_text().splitlines()}


def append(results: Path, row: Row) -> None:
    """One line in one piece: several processes write to this file."""
    line = (json.dumps(row) + "\n").encode()
    file = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
