"""Processes that work on one network together, as torchrun starts them; alone, everything here does nothing."""

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
        """The sum over all processes."""
        if self.size > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return bool(self.total(torch.tensor([float(flag)], device=self.device))) if self.size > 1 else flag

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of several pieces of work this process does: the largest go first, each to whoever has least."""
        loads, own = [0] * self.size, []
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            taker = loads.index(min(loads))
            loads[taker] += sizes[index]
            if taker == self.rank:
                own.append(index)
        return sorted(own)

    def wait(self) -> None:
        """Until all processes are here.

        Raises:
            TTCompressError: one of them is gone.
        """
        if self.size > 1:
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
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise PlanError(f"process {local} of this machine has no GPU of its own, there are {there}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    try:
        yield World(device, distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()
