"""What the layers of a network see while it runs, and their inputs and outputs as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil, prod, sqrt
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 64
"""Output positions of an image that enter the moments of a convolution; larger maps are sampled on a grid."""


@contextmanager
def hooked(
    model: nn.Module, names: Iterable[str], observe: Callable[..., Any], after: bool = False
) -> Iterator[None]:
    """observe(name, module, input[, output]) whenever one of these modules runs."""

    def call(
        name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], *output: Tensor
    ) -> Any:
        x = given[0] if given else named["input"]
        return observe(name, module, x, *output)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        register: Any = module.register_forward_hook if after else module.register_forward_pre_hook
        # A module may be called with its input by name.
        handles.append(register(partial(call, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(module: nn.Module, x: Tensor, offset: int = 0) -> tuple[Tensor, int]:
    """What the weight multiplies, as columns (size, rows), and how many positions an image has.

    For a convolution these are im2col patches (in, kh, kw) on a grid of at most POSITIONS positions an image,
    moved along by `offset`.
    """
    if not isinstance(module, nn.Conv2d):
        size = x.shape[-1]
        return x.reshape(-1, size).T, max(1, x[0].numel() // size)

    batch = x if x.dim() == 4 else x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(batch, module._reversed_padding_repeated_twice, mode=mode)
    height, width = _output_size(module, padded)

    # Neighbouring patches are much alike: some rows and columns are enough, other ones for another batch.
    spacing = max(1, ceil(sqrt(height * width / POSITIONS)))
    rows, columns = min(height, spacing), min(width, spacing)
    down, right = module.stride
    shifted = padded[:, :, down * (offset % rows) :, right * (offset % columns) :]

    stride = down * rows, right * columns
    patches = functional.unfold(shifted, module.kernel_size, module.dilation, stride=stride)
    return patches.transpose(0, 1).flatten(1), height * width


def _output_size(module: nn.Conv2d, padded: Tensor) -> tuple[int, int]:
    sizes = []
    for axis, size in enumerate(padded.shape[2:]):
        span = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        sizes.append((size - span) // module.stride[axis] + 1)
    return sizes[0], sizes[1]


def layer_outputs(module: nn.Module, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients there, as columns (out, rows)."""
    if isinstance(module, nn.Conv2d):
        return outputs.movedim(-3, 0).flatten(1)
    return outputs.reshape(-1, outputs.shape[-1]).T


def weight_size(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer's weight as the matrix that multiplies those columns."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0], prod(weight.shape[1:])
