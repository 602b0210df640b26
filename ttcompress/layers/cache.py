"""What a layer keeps from one call for the next: what it made of its TT-cores, and how it ran."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttcompress.records.layers import Execution

Make = Callable[[list[Tensor]], Any]
"""Makes of the cores, in the type of the input, what an execution takes."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers by their bytes: NaN is no other number than itself there."""


class Snapshot:
    """The values of cores at one time, to be compared with those of now.

    A write through `core.data`, or into memory that something else shares, counts no version. As long as the memory
    of the cores is held here, its address is not given to other cores.
    """

    def __init__(self, cores: Sequence[Tensor]) -> None:
        self._held = [core.detach() for core in cores]
        self.copies = [core.clone() for core in self._held]
        self._pairs = [(_bits(now), _bits(then)) for now, then in zip(self._held, self.copies, strict=True)]

    def still_holds(self) -> bool:
        """Whether no bit of the cores has changed."""
        # By NumPy: torch compares element by element, and takes three times as long.
        return all(bool((now == then).all()) for now, then in self._pairs)


class Held:
    """The memory of cores on a GPU, held so that its address is not given to others; their versions are in the key."""

    copies: tuple[Tensor, ...] = ()

    def __init__(self, cores: Sequence[Tensor]) -> None:
        self._held = [core.detach() for core in cores]

    def still_holds(self) -> bool:
        """What changes the values gives them another key."""
        return True


class Made(NamedTuple):
    """What was made of the cores for an execution, and what they were then."""

    key: tuple[Hashable, ...]
    operands: Any
    cores: Snapshot | Held | None


class Call(NamedTuple):
    """How a call runs, and what the execution takes besides the input; `key` is all that this depends on."""

    key: Hashable
    execution: Execution
    made: Made

    def serves(self, key: Hashable) -> bool:
        """Whether a call of this key runs in the same way."""
        cores = self.made.cores
        return self.key == key and cores is not None and cores.still_holds()


class Cache:
    """What one layer keeps, never changed but replaced whole, since other threads may read it meanwhile."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self._made: Made | None = None

    def made(self, execution: Execution, x: Tensor, cores: Sequence[Tensor], make: Make) -> Made:
        """make(cores in the type of x), cached where possible until the cores change."""
        state = _state(cores)
        if state is None:
            return made_once(make(in_type_of(x, cores)))

        key = execution, x.dtype, x.is_contiguous(), torch.is_inference_mode_enabled(), state
        made = self._made
        if made is not None and made.key == key and made.cores is not None and made.cores.still_holds():
            return made

        # What the cores are is noted first: a write from elsewhere, in between, is then seen by the next call.
        snapshot = _snapshot(cores)
        if snapshot is None:
            return made_once(make(in_type_of(x, cores)))

        # What is cached outlives an autocast, which casts it as it does weights.
        with torch.autocast(x.device.type, enabled=False):
            operands = make(in_type_of(x, cores))
        made = Made(key, operands, snapshot)
        self._made = made
        return made

    def tensors(self) -> list[Tensor]:
        """All that is cached and takes memory."""
        if self._made is None:
            return []

        found: list[Tensor] = []
        waiting = [self._made.operands, self._made.cores.copies if self._made.cores else []]
        while waiting:
            each = waiting.pop()
            if isinstance(each, list | tuple):
                waiting += each
            elif isinstance(each, Tensor):
                found.append(each)
        return found


def made_once(operands: Any) -> Made:
    """What serves one call only."""
    return Made((), operands, None)


def made_for(x: Tensor, cores: Sequence[Tensor], make: Make) -> Made:
    """What serves this call only, as every step of a training makes it.

    Under autocast cores are multiplied in float32, and what comes of them is cast as weights are: that is nearer, and
    one cast instead of one for each core.
    """
    device = x.device.type
    # There is none for meta tensors, nor for float64.
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return made_once(make(in_type_of(x, cores)))
    with torch.autocast(device, enabled=False):
        return made_once(make([core.float() for core in cores]))


def call_key(x: Tensor, cores: Sequence[Tensor]) -> Hashable | None:
    """All that the execution of a call and its operands depend on, but for the values of the cores.

    None for cores whose changes cannot be seen, or on a GPU, where to choose takes less than what comes of it. Autocast
    is not part of it: nothing is cached in its type.
    """
    if not cores[0].is_cpu:
        return None
    state = _state(cores)
    if state is None:
        return None
    return x.shape, x.is_contiguous(), x.dtype, torch.is_inference_mode_enabled(), state


def in_type_of(x: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores in the type of an input."""
    return [core.to(x.dtype) for core in cores]


def _state(cores: Sequence[Tensor]) -> Hashable | None:
    """Where the cores are; None where their values cannot be compared at a small price.

    That is so for tensors without memory of their own, as under vmap or on meta. A GPU would have to be waited for:
    there versions are compared, which writes through `core.data` do not count.
    """
    device = cores[0].device
    if device.type not in ("cpu", "cuda"):
        return None
    try:
        where = tuple([each for core in cores for each in (core.data_ptr(), core.stride())])
        if device.type == "cpu":
            return where
        # Another stream would have to wait for what this one makes.
        stream = torch.cuda.current_stream(device).cuda_stream
        return where, tuple([core._version for core in cores]), stream
    except RuntimeError:
        return None


def _snapshot(cores: Sequence[Tensor]) -> Snapshot | Held | None:
    """None under torch.func, where copies of cores are of the one call too."""
    try:
        return Snapshot(cores) if cores[0].is_cpu else Held(cores)
    except RuntimeError:
        return None


def _bits(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.view(BITS[tensor.element_size()]).numpy()
    return array
