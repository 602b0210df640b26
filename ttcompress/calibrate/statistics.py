"""Moments of the inputs and outputs of each layer, from streaming passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.data.calibration_images import Calibration
from ttcompress.errors import DataError
from ttcompress.networks.running import centred, device_of, forward
from ttcompress.records.common import Progress
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import ModeMetric, Moments, mode_metrics

POSITIONS = 64
"""Output positions of an image that enter the moments of a convolution; larger maps are sampled on a grid."""


GROUP_BYTES = 1 << 31
"""Moments that are held at a time; layers beyond take another pass over the images."""


EVEN = 0.2
"""Share of the output metric that is spread evenly: a few hundred images do not show all that matters."""


@dataclass
class LayerStatistics:
    """Moments of one layer: inputs (in, kh, kw) row-major, the same on held-out images, gradients at its outputs.

    They are averages over the `positions` of an image at which a convolution has its weight.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    positions: int = 1

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode; squared norms in it add up over layers to a change of the network."""
        first, *rest = mode_metrics(tensorization, self.inputs, self.outputs.blended(EVEN), diagonal)
        return [ModeMetric(first.out * sqrt(self.positions), first.inp), *rest]


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the layers."""


@torch.enable_grad()
def measure(
    model: nn.Module, names: Sequence[str], calibration: Calibration, seed: int, progress: Progress | None = None
) -> dict[str, LayerStatistics]:
    """Moments of the named layers of a frozen dense network, in streaming passes over the images.

    The metric of the outputs is the Gauss-Newton matrix of the squared change of the network's (centred) outputs: its
    gradients are those of random projections, so that no label is needed and a confident network still has some.

    Raises:
        DataError: images that do not fit the network, or NaN.
    """
    order = _execution_order(model, names, calibration)
    statistics: dict[str, LayerStatistics] = {}
    for group in _groups([(name, _empty(model.get_submodule(name))) for name in order]):
        _fill(model, group, calibration, seed, progress)
        statistics |= group
    return statistics


def _execution_order(model: nn.Module, names: Sequence[str], calibration: Calibration) -> list[str]:
    seen: dict[str, None] = {}
    with hooked(model, names, lambda name, module, x: seen.setdefault(name)):
        forward(model, next(iter(calibration.held_out())).to(device_of(model)))
    return [*seen]


def _empty(module: nn.Module) -> LayerStatistics:
    weight: Tensor = module.weight  # type: ignore[assignment]
    size = prod(weight.shape[1:])
    return LayerStatistics(Moments(size), Moments(size), Moments(weight.shape[0]))


def _groups(layers: Sequence[tuple[str, LayerStatistics]]) -> Iterator[dict[str, LayerStatistics]]:
    group: dict[str, LayerStatistics] = {}
    held = 0
    for name, each in layers:
        size = each.inputs.num_bytes + each.held_out.num_bytes + each.outputs.num_bytes
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = {}, 0
        group[name] = each
        held += size
    if group:
        yield group


def _fill(
    model: nn.Module,
    group: dict[str, LayerStatistics],
    calibration: Calibration,
    seed: int,
    progress: Progress | None,
) -> None:
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    offset = images = 0

    def observe(name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise DataError(f"{name} runs without gradients, which calibration needs: exclude it, or leave out calib")
        each = group[name]
        columns, each.positions = layer_inputs(module, x.detach(), offset)
        each.inputs.add(columns, weight=images)
        # A leaf of its own, so that gradients flow from here on, whatever the input of the network is.
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf = leaf.clone()
        leaf.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: each.outputs.add(_columns(module, gradient), weight=images)
        )
        return leaf

    def observe_held_out(name: str, module: nn.Module, x: Tensor) -> None:
        group[name].held_out.add(layer_inputs(module, x, offset)[0], weight=images)

    with hooked(model, list(group), observe, after=True):
        for batch in calibration.fitting(0):
            images = len(batch)
            output = forward(model, batch.to(device))
            draw = torch.randn(output.shape, generator=generator).to(output)
            (output * centred(draw)).sum().backward()  # type: ignore[no-untyped-call]
            offset += 1
            if progress:
                progress("statistics", min(offset * images, calibration.num_images), calibration.num_images)
    with hooked(model, list(group), observe_held_out), torch.no_grad():
        for batch in calibration.held_out():
            images = len(batch)
            forward(model, batch.to(device))
            offset += 1


def _columns(module: nn.Module, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients there, as columns (out, rows)."""
    if isinstance(module, nn.Conv2d):
        return outputs.movedim(-3, 0).flatten(1)
    return outputs.reshape(-1, outputs.shape[-1]).T


def layer_inputs(module: nn.Module, x: Tensor, offset: int = 0) -> tuple[Tensor, int]:
    """What the weight multiplies, as columns (size, rows), and how many positions an image has.

    For a convolution these are im2col patches (in, kh, kw) on a grid of at most POSITIONS positions an image, moved
    along by `offset`.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).T, max(1, x[0].numel() // x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batch = x if x.dim() == 4 else x[None]
    padded = functional.pad(batch, module._reversed_padding_repeated_twice, mode=mode)
    spans = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = [
        (size - span) // stride + 1 for size, span, stride in zip(padded.shape[2:], spans, module.stride, strict=True)
    ]
    steps = [min(size, max(1, ceil(sqrt(prod(sizes) / POSITIONS)))) for size in sizes]
    top, left = (stride * (offset % step) for stride, step in zip(module.stride, steps, strict=True))
    strides = (module.stride[0] * steps[0], module.stride[1] * steps[1])
    patches = functional.unfold(padded[:, :, top:, left:], module.kernel_size, module.dilation, stride=strides)
    return patches.transpose(0, 1).flatten(1), prod(sizes)


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], observe: Callable[..., Any], after: bool = False) -> Iterator[None]:
    """observe(name, module, input[, output]) whenever one of these modules runs."""

    def call(name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], *output: Tensor) -> Any:
        return observe(name, module, given[0] if given else named["input"], *output)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        register: Any = module.register_forward_hook if after else module.register_forward_pre_hook
        handles.append(register(partial(call, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
