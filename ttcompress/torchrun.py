"""What torchrun tells this process through its environment, before torch is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ttcompress.errors import PlanError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
PLACE = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Place:
    """Which process this is, of how many, altogether and on this machine, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""


def own_place() -> Place:
    """The place that torchrun gave this process; that of a process alone where torchrun did not start it.

    Shells and job schedulers set variables of the same names, so that some of them alone say nothing.

    Raises:
        PlanError: all variables of torchrun are there, but contradict each other or are no numbers.
    """
    if not all(os.environ.get(name) for name in (*NUMBERS, *PLACE)):
        return Place()

    stated = [os.environ[name] for name in (*NUMBERS, "MASTER_PORT")]
    if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in stated):
        raise PlanError(
            f"the environment contradicts itself: {_listing()} have to be numbers, as torchrun sets them"
        )

    rank, size, local_rank, local_size, port = map(int, stated)
    if not (rank < size and local_rank < local_size <= size and local_rank <= rank and 0 < port < 2**16):
        raise PlanError(
            f"the environment contradicts itself: {_listing()}; start with torchrun, or unset them"
        )
    return Place(rank, size, local_rank, local_size, f"{os.environ['MASTER_ADDR']}:{port}")


def _listing() -> str:
    return ", ".join(f"{name}={os.environ[name]}" for name in (*NUMBERS, "MASTER_PORT"))


def expected_rank() -> int:
    """The rank that torchrun gave this process, 0 where it did not start it."""
    return own_place().rank


def expected_size() -> int:
    """How many processes torchrun started, 1 where it did not."""
    return own_place().size


def leads() -> bool:
    """Whether this process is the one that prints."""
    return expected_rank() == 0
