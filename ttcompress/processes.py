"""Processes that work on one network together, as torchrun starts them, or one process alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ttcompress.errors import PlanError, TTCompressError
from ttcompress.torchrun import Place, own_place

REACHED_WITHIN = timedelta(minutes=1)
"""How long a process tries to reach the address where the processes meet."""
ALL_THERE_WITHIN = timedelta(minutes=10)
"""How long the first of the processes wait there for the last, which may have read more slowly."""


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

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given, as clocks have to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

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
        TTCompressError: the processes do not find each other.
    """
    place = own_place()
    if place.size == 1:
        yield World(device)
        return

    if device.type == "cuda":
        device = _own_gpu(place)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = _meeting_point(place)
    # NCCL would else guess the device, at the first barrier.
    own_gpu = device if device.type == "cuda" else None
    distributed.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=patience, device_id=own_gpu
    )
    try:
        yield World(device, place.rank, place.size)
    finally:
        distributed.destroy_process_group()


def _meeting_point(place: Place) -> Any:
    """The store through which the processes find each other, once all of them are there."""
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=REACHED_WITHIN))
        arrivals = PrefixStore("arrivals", store)
        arrivals.set(str(place.rank), "here")
        arrivals.wait([str(rank) for rank in range(place.size)], ALL_THERE_WITHIN)
    except (RuntimeError, ValueError, OSError) as error:
        raise TTCompressError(
            f"the {place.size} processes do not meet at {place.address} (MASTER_ADDR, MASTER_PORT), "
            f"this is number {place.rank}: start all of them with torchrun"
        ) from error
    return store


def _own_gpu(place: Place) -> torch.device:
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise PlanError(
            f"process {place.local_rank} of this machine has no GPU of its own, there are {count}"
        )
    return torch.device("cuda", place.local_rank)
