"""Moments of the inputs and outputs of each layer, from streaming passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import hooked, layer_inputs, layer_outputs, weight_size
from ttcompress.data.calibration_images import Calibration
from ttcompress.errors import DataError
from ttcompress.networks.running import batch_size, blaming, centred, device_of, forward, placed
from ttcompress.records.common import Progress
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import ModeMetric, Moments, mode_metrics

GROUP_BYTES = 1 << 31
"""Moments that are held at a time; layers beyond take another pass over the images."""


EVEN = 0.2
"""Share of the output metric that is spread evenly over all directions.

A few hundred images do not show all that matters: outputs to which none of them is sensitive would cost
nothing, and would be given up for the others."""


@dataclass
class LayerStatistics:
    """Moments of one layer: inputs (in, kh, kw) row-major, the same held out, and gradients at its outputs.

    They are averages over the `positions` of an image at which a convolution has its weight.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    positions: int = 1

    @property
    def num_bytes(self) -> int:
        """Memory that the moments take."""
        return self.inputs.num_bytes + self.held_out.num_bytes + self.outputs.num_bytes

    @property
    def output_metric(self) -> Moments:
        """What an error at each output costs, as the gradients have it, an EVEN share of it spread evenly."""
        return self.outputs.blended(EVEN)

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode, in which squared norms are changes of the network's outputs.

        An image passes a convolution's weight at all its `positions`, and their changes add up, so that
        layers with large maps weigh more.
        """
        first, *rest = mode_metrics(tensorization, self.inputs, self.output_metric, diagonal)
        return [ModeMetric(first.out * sqrt(self.positions), first.inp), *rest]


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the layers."""


@torch.enable_grad()
def measure(
    model: nn.Module,
    names: Sequence[str],
    calibration: Calibration,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, LayerStatistics]:
    """Moments of the named layers of a frozen dense network, in streaming passes over the images.

    The metric of the outputs is the Gauss-Newton matrix E[J^T J] of the squared change of the network's
    (centred) outputs, J their derivative at the layer's outputs. It is never formed: for random v with E[v
    v^T] = 1 the gradient of <v, outputs> is J^T v, and E[J^T v v^T J] is the matrix (Hutchinson 1990; Martens
    and Grosse 2015 draw v from the network's own predictions). No label is needed, and a confident network
    still has a metric.

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
        batch = next(iter(calibration.held_out()))
        forward(model, placed(batch, device_of(model)))
    return [*seen]


def _empty(module: nn.Module) -> LayerStatistics:
    outputs, inputs = weight_size(module)
    return LayerStatistics(Moments(inputs), Moments(inputs), Moments(outputs))


def _groups(layers: Sequence[tuple[str, LayerStatistics]]) -> Iterator[dict[str, LayerStatistics]]:
    """Neighbouring layers whose moments fit into GROUP_BYTES together, but always at least one."""
    group: dict[str, LayerStatistics] = {}
    held = 0
    for name, each in layers:
        if group and held + each.num_bytes > GROUP_BYTES:
            yield group
            group, held = {}, 0
        group[name] = each
        held += each.num_bytes
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
    names = list(group)
    offset = 0

    for inputs in calibration.fitting(0):
        batch = _Batch(group, batch_size(inputs), offset)
        with hooked(model, names, batch.observe, after=True):
            output = forward(model, placed(inputs, device))
            projection = torch.randn(output.shape, generator=generator).to(output)
            with blaming("the network has no gradients"):
                (output * centred(projection)).sum().backward()  # type: ignore[no-untyped-call]
        offset += 1
        if progress:
            done = min(offset * batch.num_images, calibration.num_images)
            progress("statistics", done, calibration.num_images)

    with torch.no_grad():
        for inputs in calibration.held_out():
            batch = _Batch(group, batch_size(inputs), offset)
            with hooked(model, names, batch.observe_held_out):
                forward(model, placed(inputs, device))
            offset += 1


@dataclass(frozen=True)
class _Batch:
    """Images on their way through a group of layers, at positions moved along by `offset`."""

    group: Statistics
    num_images: int
    offset: int

    def observe(self, name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Add the inputs of a layer to its moments, and the gradients at its outputs once they are known."""
        if not torch.is_grad_enabled():
            raise DataError(
                f"{name} runs without gradients, which calibration needs: exclude it, or leave out calib"
            )

        each = self.group[name]
        columns, each.positions = layer_inputs(module, x.detach(), self.offset)
        each.inputs.add(columns, weight=self.num_images)

        def observe_gradient(gradient: Tensor) -> None:
            each.outputs.add(layer_outputs(module, gradient), weight=self.num_images)

        # A leaf of its own, so that gradients flow from here on, whatever the input of the network is.
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        # And a copy of it, for a leaf may not be overwritten, as an in-place ReLU would.
        leaf = leaf.clone()
        leaf.register_hook(observe_gradient)  # type: ignore[no-untyped-call]
        return leaf

    def observe_held_out(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Add the inputs of a layer to its held-out moments."""
        columns, _ = layer_inputs(module, x, self.offset)
        self.group[name].held_out.add(columns, weight=self.num_images)
