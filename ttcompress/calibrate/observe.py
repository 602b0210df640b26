"""What the modules of a network see while it runs, and their inputs and outputs as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 64
"""Output positions of an image that enter the moments of a convolution; larger maps are sampled on a grid."""


@dataclass(frozen=True)
class Call:
    """What a module was called with, in order and by name."""

    given: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def first(self) -> Tensor:
        """The first input: that of a layer, whatever it is called with besides."""
        first: Tensor = self.given[0] if self.given else next(iter(self.named.values()))
        return first

    def argument(self, index: int, names: Sequence[str]) -> Tensor:
        """The input of this index, which may have been given by name."""
        argument: Tensor = self.given[index] if index < len(self.given) else self.named[names[index]]
        return argument


@contextmanager
def hooked(
    model: nn.Module, names: Iterable[str], observe: Callable[..., Any], after: bool = False
) -> Iterator[None]:
    """observe(name, module, call[, output]) whenever one of these modules runs."""

    def call(
        name: str, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], *output: Any
    ) -> Any:
        return observe(name, module, Call(given, named), *output)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        register: Any = module.register_forward_hook if after else module.register_forward_pre_hook
        # A module may be called with its input by name.
        handles.append(register(partial(call, name), with_kwargs=True))
    try:
        with _module_by_module():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _module_by_module() -> Iterator[None]:
    """Torch's fast paths of transformers run a whole layer in one call, past the modules in it."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def gradients_in_eval(model: nn.Module) -> Iterator[None]:
    """CuDNN has gradients of recurrent modules in training mode only; torch's own kernels have them in eval mode."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not any(
        isinstance(each, nn.RNNBase) for each in model.modules()
    )
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


# ------------------------------------------------------------------------------------------------------------- columns


def layer_inputs(module: Any, x: Tensor, offset: int = 0) -> tuple[Tensor, int]:
    """What the weight multiplies, as columns (size, rows), and how many positions an image has.

    For a convolution these are im2col patches (in, window) on a grid of at most POSITIONS positions an image,
    moved along by `offset`; for a transposed one those of its input with zeros between.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        size = x.shape[-1]
        return x.reshape(-1, size).T, max(1, x[0].numel() // size)

    axes = len(module.kernel_size)
    batch = batched(module, x)
    padded, stride = _stuffed(module, batch) if module.transposed else _padded(module, batch)
    sizes = _output_sizes(module, padded, stride)
    positions = prod(sizes)

    # Neighbouring patches are much alike: some of them along each axis are enough, other ones for another batch.
    spacing = max(1, ceil((positions / POSITIONS) ** (1 / axes)))
    steps = []
    for axis, size in enumerate(sizes):
        every = min(size, spacing)
        # Each in its turn meets another part of the window.
        while module.transposed and gcd(every, module.stride[axis]) > 1:
            every += 1
        start = stride[axis] * (offset % min(size, every))
        padded = padded.narrow(2 + axis, start, padded.shape[2 + axis] - start)
        steps.append(stride[axis] * every)

    columns = _patches(padded, module.kernel_size, module.dilation, steps)
    if module.transposed:
        window = columns.reshape(-1, *module.kernel_size, columns.shape[1])
        columns = window.flip([*range(1, axes + 1)]).flatten(0, axes)
    return columns, positions


def batched(module: Any, x: Tensor) -> Tensor:
    """What goes through a convolution, which takes a single input without a batch axis too."""
    return x if x.dim() == len(module.kernel_size) + 2 else x[None]


def _padded(module: Any, batch: Tensor) -> tuple[Tensor, Sequence[int]]:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(batch, module._reversed_padding_repeated_twice, mode=mode), module.stride


def _stuffed(module: Any, batch: Tensor) -> tuple[Tensor, Sequence[int]]:
    """The input of which an ordinary convolution with the window turned around makes the same output."""
    sizes = [stride * (size - 1) + 1 for stride, size in zip(module.stride, batch.shape[2:], strict=True)]
    stuffed = batch.new_zeros(*batch.shape[:2], *sizes)
    between = tuple(slice(None, None, stride) for stride in module.stride)
    stuffed[(slice(None), slice(None), *between)] = batch

    around = []
    for axis in reversed(range(len(sizes))):
        border = module.dilation[axis] * (module.kernel_size[axis] - 1) - module.padding[axis]
        around += [border, border + module.output_padding[axis]]
    return functional.pad(stuffed, around), [1] * len(sizes)


def _output_sizes(module: Any, padded: Tensor, strides: Sequence[int]) -> list[int]:
    sizes = []
    for axis, (size, stride) in enumerate(zip(padded.shape[2:], strides, strict=True)):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        sizes.append((size - span) // stride + 1)
    return sizes


def _patches(
    padded: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """Windows of a batch (images, in, ...) as columns (in window, images positions)."""
    axes = len(kernel_size)
    if max(kernel_size) == 1:
        every = (slice(None, None, stride) for stride in strides)
        return padded[(slice(None), slice(None), *every)].transpose(0, 1).flatten(1)
    if axes == 2:
        columns = functional.unfold(padded, kernel_size, dilation, stride=strides)  # type: ignore[arg-type]
        return columns.transpose(0, 1).flatten(1)

    windows = padded
    for axis, (size, step, stride) in enumerate(zip(kernel_size, dilation, strides, strict=True)):
        span = step * (size - 1) + 1
        windows = windows.unfold(2 + axis, span, stride)[..., ::step]
    along, within = range(2, 2 + axes), range(2 + axes, 2 + 2 * axes)
    return windows.permute(1, *within, 0, *along).flatten(0, axes).flatten(1)


def layer_outputs(module: Any, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients there, as columns (out, rows)."""
    return outputs.movedim(channel_axis(module, outputs), 0).flatten(1)


def channel_axis(module: Any, outputs: Tensor) -> int:
    """Which axis of a layer's outputs has their channels or features."""
    window = len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else 0
    return outputs.dim() - 1 - window


def kernel_gradient(module: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient (out, in window) of a convolution's weight, from its input and the gradient at its output.

    Both have a batch axis; channels of the gradient may be others than the module has.
    """
    padding = module.padding
    if not module.transposed:
        # Padding may be of another kind than zeros, and by name.
        (x, _), padding = _padded(module, x), [0] * len(module.kernel_size)

    channels = x.shape[1], gradient.shape[1]
    shape = channels if module.transposed else channels[::-1]
    _, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient,
        x,
        x.new_empty(1).expand(*shape, *module.kernel_size),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        1,
        [False, True, False],
    )
    return (of_weight.transpose(0, 1) if module.transposed else of_weight).flatten(1)  # type: ignore[no-any-return]
