"""A GPU that is none: its tensors say that they are on one and refuse to meet others, as there, but have their values.

Of FakeTensorMode, which has no values, only the permission is taken to name a device that torch cannot start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
ATEN = torch.ops.aten
MOVES = (ATEN._to_copy.default, ATEN.copy_.default)
"""Operators that take tensors of two devices."""
READS = (ATEN._local_scalar_dense.default,)
"""Operators that wait for the device."""


class OnGpu(Tensor):
    """A tensor whose values are on the CPU, which it says to torch's autograd alone: no device has to be there."""

    values: Tensor
    waits = 0
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
        )
        made.values = values
        return made

    def cpu(self, *_: Any) -> Tensor:
        """To read values is to wait for the device."""
        OnGpu.waits += 1
        return self.values

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """To the CPU, which autograd takes it to be on already, or as ever."""
        if args and args[0] in ("cpu", torch.device("cpu")):
            return self.cpu().to(*args[1:], **kwargs)
        return super().to(*args, **kwargs)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Torch would copy the memory that autograd takes to be there."""
        twin: Any = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, Parameter):
            twin = Parameter(twin, self.requires_grad)
        return memo.setdefault(id(self), twin)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Where another tensor is, torch would ask of autograd.
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """Where tensors can be made on, and sent to, a device that is not there."""

    def __init__(self) -> None:
        # Torch starts no device as long as there is a mode of this key.
        super().__init__(_dispatch_key=None)
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        OnGpu.waits = 0

    @property
    def waits(self) -> int:
        """How often the device was read since the beginning."""
        return OnGpu.waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and isinstance(args[0], OnGpu):
            OnGpu.waits += 1
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator gives, on the device where it would be."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, OnGpu)]
    others = [each for each in tensors if not isinstance(each, OnGpu) and each.dim()]
    if ours and others and func not in MOVES:
        raise RuntimeError(f"{func}: tensors on the CPU and on the GPU")

    device = kwargs.get("device")
    wanted = GPU if ours and device is None else torch.device(device or "cpu")
    if func is ATEN.copy_.default:
        wanted = args[0].device
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    wrappers = {id(each.values): each for each in ours}
    inner_args, inner_kwargs = tree_map(_values, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)

    def placed(each: Any) -> Any:
        if not isinstance(each, Tensor) or wanted.type == "cpu":
            return each
        # What an operator changed in place is what it was given.
        changed = wrappers.get(id(each))
        return OnGpu(each) if changed is None else changed

    # Of tensors that wrap others no one counts the changes.
    for changed in _changed(func, args):
        torch.autograd.graph.increment_version(changed)
    return tree_map(placed, result)


def _changed(func: Any, args: Any) -> Iterator[OnGpu]:
    """The tensors that an operator changes in place."""
    for given, argument in zip(args, func._schema.arguments, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (each for each in tree_leaves(given) if isinstance(each, OnGpu))


def _values(each: Any) -> Any:
    return each.values if isinstance(each, OnGpu) else each


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    # Tensors that wrap others cannot be those of inference mode.
    monkeypatch.setattr(torch._C, "_InferenceMode", lambda wanted: torch.set_grad_enabled(not wanted))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    lifts = torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    # A parameter on the CPU cannot become one of another class in place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # What is made of numbers is made on the CPU and then sent.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with PretendedGpu() as mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
