"""Building networks that a file names, without more memory or time than networks take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from ttcompress.errors import ArchitectureError

BUFFERS = "buffers"
"""In the place of a device: buffers hold their values, parameters wait on the meta device."""
MOST_PARAMETERS = 10**10
"""Of a network that is built by name."""
MOST_BUFFERED = 2**28
"""Numbers in the buffers of one, which are held in memory."""
MOST_TENSORS = 100_000
"""Parameters and buffers, which each take time."""


class _Placing(TorchFunctionMode):
    """One function of torch makes its tensors on another device than the one that is set."""

    def __init__(self, makes: Callable[..., Tensor], device: str) -> None:
        super().__init__()
        self._makes, self._device = makes, device

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": self._device} if func is self._makes else kwargs)


def weights_on_meta() -> TorchFunctionMode:
    """Parameters take no memory and no initialisation time, while other tensors hold numbers.

    `torch.device("meta")` would do but for torchvision's RegNets, which compute their widths with tensors.
    """
    return _Placing(torch.empty, "meta")


def _readable_steps() -> TorchFunctionMode:
    """What rates of dropping are made of is read by constructors, which nothing on the meta device can be."""
    return _Placing(torch.linspace, "cpu")


def within_limits(name: str, construct: Callable[[], nn.Module], most: int) -> nn.Module:
    """What is constructed, parameters on the meta device and buffers with their values.

    It is first made without any memory, and counted on the way.

    Raises:
        ArchitectureError: it would be larger than any network is.
    """
    counter = _Counter(name, most)
    handles = [
        register_module_parameter_registration_hook(counter.parameter),
        register_module_buffer_registration_hook(counter.buffer),
    ]
    try:
        with torch.device("meta"), _readable_steps():
            construct()
    finally:
        for handle in handles:
            handle.remove()

    with weights_on_meta():
        return construct()


class _Counter:
    """Counts what modules register while they are made, and stops where it is too much."""

    def __init__(self, name: str, most: int) -> None:
        self._name, self._most = name, most
        self._tensors = self._parameters = self._buffered = 0

    def parameter(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        """Note a parameter."""
        self._parameters += self._counted(value)
        if self._parameters > self._most:
            self._refuse(f"more than {self._most:,} parameters; networks built by name have at most so many")

    def buffer(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        """Note a buffer."""
        self._buffered += self._counted(value)
        if self._buffered > MOST_BUFFERED:
            self._refuse(f"more than {MOST_BUFFERED:,} numbers in its buffers")

    def _counted(self, value: Tensor | None) -> int:
        self._tensors += 1
        if self._tensors > MOST_TENSORS:
            self._refuse(f"more than {MOST_TENSORS:,} tensors")
        return 0 if value is None else value.numel()

    def _refuse(self, what: str) -> None:
        raise ArchitectureError(f"{self._name} would have {what}")
