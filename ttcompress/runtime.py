"""Where and with what a run computes: device, threads and random numbers."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ttcompress.errors import PlanError
from ttcompress.torchrun import own_place

MOST_THREADS = 16
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""The numbers by which glibc's mallopt knows its settings (malloc.h)."""


@contextmanager
def fixed_threads() -> Iterator[None]:
    """As many threads as this process may use processors, whatever the environment says: sums then come out alike.

    Processes that torchrun started on one machine share its processors.
    """
    sharing = own_place().local_size
    _replaced.append(torch.get_num_threads())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(MOST_THREADS, usable // sharing)))
    try:
        yield
    finally:
        torch.set_num_threads(_replaced.pop())


_replaced: list[int] = []
"""What the settings of `fixed_threads` that are in force have replaced."""


@contextmanager
def threads_as_set() -> Iterator[None]:
    """Within `fixed_threads`, as many threads as there were before: for measurements, which are of that setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(_replaced[0] if _replaced else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """So many threads, and then as many as before; None for as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """Tensors of a megabyte and more give their memory back when they go, where the C library is glibc.

    It would keep it for others, but leaves most of it unused where tensors of many passes come and go by turns: to an
    aligned one it never gives the place of another of the same size.
    """
    _thrifty.append(True)
    _set_heap(1 << 20, 1 << 21)
    give_back()
    try:
        yield
    finally:
        _thrifty.pop()
        if not _thrifty:
            # What it would have come to by itself, with large tensors.
            _set_heap(1 << 25, 1 << 26)


_thrifty: list[bool] = []
"""One for each `freed_at_once` that is in force."""


def _set_heap(mmap_threshold: int, trim_threshold: int) -> None:
    # Other C libraries have no such function.
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, trim_threshold)


def give_back() -> None:
    """Within `freed_at_once`, give back what was kept between small things that stay, where tensors are smaller."""
    if _thrifty:
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def chosen_device(name: str) -> torch.device:
    """The device of that name; `auto` is the GPU where there is one.

    Raises:
        PlanError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise PlanError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    try:
        # An empty device fails only when something is put there.
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Have torch use operators that give the same bits each time, where that is wanted; the setting is put back."""
    if not wanted:
        yield
        return
    # cuBLAS is deterministic only with a workspace of fixed size, which it looks for when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from this seed; the caller's own state is put back, on all devices."""
    # Named, since torch warns of more than one that is not.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
