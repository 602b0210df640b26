"""What a network does with one input: multiply-adds, and how often each layer applies its weight."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ttcompress.layers.spec import Convolution
from ttcompress.networks.running import Example, NetworkInput, call, run
from ttcompress.tt.cost import Calls


@dataclass(frozen=True)
class Usage:
    """Multiply-adds of the whole network for one input, and by fqn the calls of its Linear layers and convolutions."""

    multiply_adds: int
    calls: Mapping[str, Calls]


def usage_of(model: nn.Module, example: Example) -> Usage:
    """What the network does with one input; on the meta device nothing is computed.

    Raises:
        DataError: an input that the network does not take.
    """
    calls: dict[str, Calls] = {}

    def count(name: str, module: nn.Linear | Convolution, given: Any, named: Any, output: Tensor) -> None:
        x = given[0] if given else named["input"]
        before = calls.get(name, Calls(0, 0))
        pixels, out_pixels = _positions(module, x), _positions(module, output)
        calls[name] = Calls(before.pixels + pixels, before.out_pixels + out_pixels)

    was_training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, was_training)
        one = example.suited(model.eval()).zeros(model)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Convolution):
                hook = module.register_forward_hook(partial(count, name), with_kwargs=True)
                stack.enter_context(hook)
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(torch.no_grad())
        call(model, one)
    return Usage(int(counter.get_total_flops()) // 2, calls)


def _positions(module: nn.Linear | Convolution, x: Tensor) -> int:
    """Rows of a Linear; pixels of a convolution, over all images."""
    if isinstance(module, nn.Linear):
        return x.numel() // x.shape[-1]
    channels = x.shape[-1 - len(module.kernel_size)]
    return x.numel() // channels


@torch.no_grad()
def multiply_adds(module: nn.Module, x: NetworkInput) -> int:
    """Of products of matrices and convolutions in a forward pass, as torch counts them."""
    # What layers keep is made in the first call and not counted; the second one has all at hand.
    run(module, x)
    with FlopCounterMode(display=False) as counter:
        run(module, x)
    return int(counter.get_total_flops()) // 2
