"""What torchrun tells this process through its environment, before torch is loaded."""

from __future__ import annotations

import os


def expected_rank() -> int:
    """The rank that torchrun gave this process, 0 where it did not start it."""
    return int(os.environ.get("RANK", "0"))


def expected_size() -> int:
    """How many processes torchrun started, 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the one that prints."""
    return expected_rank() == 0
