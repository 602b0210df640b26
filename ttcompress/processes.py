"""Processes that work on one network together, as torchrun starts them, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed

from ttcompress.errors import PlanError, TTCompressError
from ttcompress.torchrun import expected_size


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.size == 1:
            return flag
        count = self.total(torch.tensor([float(flag)], device=self.device))
        return bool(count)

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Pieces of work that this process does: the largest go first, each to whoever has least."""
        loads = [0] * self.size
        own = []
        largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
        for index in largest_first:
            taker = loads.index(min(loads))
            loads[taker] += sizes[index]
            if taker == self.rank:
                own.append(index)
        return sorted(own)

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            TTCompressError: one of them is gone.
        """
        if self.size == 1:
            return
        try:
            distributed.barrier()
        except RuntimeError as error:
            raise TTCompressError("another process stopped") from error


@contextmanager
def joined(device: torch.device, patience: timedelta | None = None) -> Iterator[World]:
    """The world of this process: NCCL between GPUs, gloo between CPUs.

    Args:
        patience: how long processes wait for each other, by default as long as torch says.

    Raises:
        PlanError: more processes on this machine than it has GPUs.
    """
    size = expected_size()
    if size == 1:
        yield World(device)
        return

    if device.type == "cuda":
        device = _own_gpu()
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=patience)
    try:
        yield World(device, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def _own_gpu() -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise PlanError(f"process {local_rank} of this machine has no GPU of its own, there are {count}")
    return torch.device("cuda", local_rank)
