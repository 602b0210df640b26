"""What a layer keeps from one call for the next: what it made of its TT-cores, and how it ran."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcompress.records.layers import Execution

Make = Callable[[list[Tensor]], Any]
"""Makes of the cores, in the type of the input, what an execution takes."""


class Call(NamedTuple):
    """How a call runs, and what the execution takes besides the input; `key` is all that this depends on."""

    key: Hashable
    execution: Execution
    operands: Any


class _Made(NamedTuple):
    """What was made of the cores; as long as their memory is held its address is not given to other cores."""

    key: tuple[Hashable, ...]
    operands: Any
    held: list[Tensor]


class Kept:
    """What one layer keeps, never changed but replaced whole, since other threads may read it meanwhile."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self._made: _Made | None = None

    def operands(self, execution: Execution, x: Tensor, cores: Sequence[Tensor], make: Make) -> Any:
        """make(cores in the type of x), kept where possible until the cores change.

        A change in place through `core.data` cannot be seen; `train()` and `eval()` drop what is kept.
        """
        state = _state(cores)
        if state is None:
            return make(in_type_of(x, cores))

        key = execution, x.dtype, x.is_contiguous(), torch.is_inference_mode_enabled(), state
        made = self._made
        if made is not None and made.key == key:
            return made.operands

        # What is kept outlives an autocast, which casts it as it does weights.
        with torch.autocast(x.device.type, enabled=False):
            operands = make(in_type_of(x, cores))
        self._made = _Made(key, operands, [core.detach() for core in cores])
        return operands

    def tensors(self) -> list[Tensor]:
        """All that is kept and takes memory."""
        found: list[Tensor] = []
        waiting = [self._made.operands] if self._made else []
        while waiting:
            each = waiting.pop()
            if isinstance(each, list | tuple):
                waiting += each
            elif isinstance(each, Tensor):
                found.append(each)
        return found


def call_key(x: Tensor, cores: Sequence[Tensor]) -> Hashable | None:
    """All that the execution of a call and its operands depend on; None for cores whose changes cannot be seen.

    Autocast is not part of it: nothing is kept in its type.
    """
    state = _state(cores)
    if state is None:
        return None
    return x.shape, x.is_contiguous(), x.dtype, torch.is_inference_mode_enabled(), state


def in_type_of(x: Tensor, cores: Sequence[Tensor]) -> list[Tensor]:
    """The cores in the type of an input."""
    return [core.to(x.dtype) for core in cores]


def _state(cores: Sequence[Tensor]) -> tuple[int, ...] | None:
    """What changes when the cores do; None for tensors without memory of their own, as under vmap or on meta."""
    if cores[0].is_meta:
        return None
    try:
        return tuple([number for core in cores for number in (core._version, core.data_ptr())])
    except RuntimeError:
        return None
