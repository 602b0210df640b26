"""How many inputs pass through a network at a time, so that a calibration stays within its memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import gradients_in_eval
from ttcompress.errors import DataError
from ttcompress.networks.running import (
    NetworkInput,
    batch_size,
    call,
    device_of,
    map_tensors,
    placed,
    tensors_of,
)
from ttcompress.runtime import freed_at_once

BUDGET, GPU_BUDGET = 3 << 27, 3 << 30
"""Bytes that the inputs which are under way at a time may take, in the memory of this machine and of a GPU."""
MOMENT_BYTES = 3 << 28
"""Moments that add up at a time; layers beyond take another pass over the images."""
IN_PASSING = 6
"""Without gradients an input is taken to need so many times its largest layer output: branches, sums, patches."""
LONGER = 2
"""Attention grows with this power of the length."""


@dataclass(frozen=True)
class Room:
    """What one input takes on its way, measured at one of so many `numbers`, and how much there may be.

    `with_gradients` are the bytes that wait for the way back, `without` those of a way there alone.
    """

    with_gradients: int
    without: int
    numbers: int
    budget: int

    def most(self, inputs: NetworkInput, gradients: bool = True) -> int:
        """How many of these inputs may be under way at a time: at least one."""
        longer = max(1.0, numbers_of(inputs) / max(1, self.numbers)) ** LONGER
        each = (self.with_gradients if gradients else self.without) * longer
        return max(1, int(self.budget / max(1.0, each)))

    def pieces(self, inputs: NetworkInput, gradients: bool = True) -> list[Any]:
        """A batch in pieces that there is room for, in order and of nearly equal size."""
        size, most = batch_size(inputs), self.most(inputs, gradients)
        count = -(-size // most)
        return (
            [inputs] if count <= 1 else parts_of(inputs, [size * part // count for part in range(count + 1)])
        )


def parts_of(inputs: NetworkInput, ends: Sequence[int]) -> list[Any]:
    """The rows of a batch from each of these ends to the next."""
    pairs = itertools.pairwise(ends)
    return [map_tensors(itemgetter(slice(start, end)), inputs) for start, end in pairs]


def numbers_of(inputs: NetworkInput) -> int:
    """How many numbers one input of a batch is, at most."""
    return max(tensor[0].numel() for tensor in tensors_of(inputs))


def two_of(model: nn.Module, batches: Iterable[NetworkInput]) -> Any:
    """Two of the largest inputs, or one, where the network is."""
    largest = max(batches, key=numbers_of)
    # Two, for networks that drop an axis of length one.
    few = parts_of(largest, [0, min(2, batch_size(largest))])[0]
    # Copies: part of a batch has the memory of the whole.
    return map_tensors(torch.clone, placed(few, device_of(model)))


def room_for(model: nn.Module, batches: Iterable[NetworkInput]) -> Room | None:
    """Room for inputs such as these, by what the largest of them takes; None of a network that takes none alone.

    Only sizes count, so that it is the same each time, on every machine.
    """
    inputs = two_of(model, batches)
    count = batch_size(inputs)
    try:
        saved, passing = _taken(model, inputs)
    except DataError:
        return None
    budget = GPU_BUDGET if device_of(model).type == "cuda" else BUDGET
    return Room(saved // count, passing // count, numbers_of(inputs), budget)


def _taken(model: nn.Module, inputs: NetworkInput) -> tuple[int, int]:
    """Bytes that a pass leaves for its gradients, or as outputs of layers, and those that it needs in passing."""
    saved: dict[int, Tensor] = {}
    outputs: list[int] = []
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that no other tensor comes to the same place. Without its graph, which holds what this returns: a ring
        # through C++ that nobody would take apart.
        alone = tensor.detach()
        saved.setdefault(alone.untyped_storage().data_ptr(), alone)
        return alone

    def see(module: nn.Module, given: Any, output: Any) -> None:
        outputs.append(sum(tensor.nbytes for tensor in tensors_of(output)))

    leaves = [module for module in model.modules() if not any(module.children())]
    handles = [module.register_forward_hook(see) for module in leaves]
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    try:
        with gradients_in_eval(model), _all_trained(model), torch.enable_grad(), hooks:
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()

    waiting = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)
    return max(waiting, sum(outputs)), IN_PASSING * max(outputs, default=0)


def thrift(moments: Iterable[int]) -> AbstractContextManager[None]:
    """Memory given back at once where the bytes of all moments show that the layers are large.

    It takes several hundred megabytes off a large network, and would add a tenth to the time of a small one.
    """
    return freed_at_once() if sum(moments) > MOMENT_BYTES else nullcontext()


@contextmanager
def _all_trained(model: nn.Module) -> Iterator[None]:
    """As if all parameters were to be trained."""
    frozen = [each for each in model.parameters() if not each.requires_grad and each.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
