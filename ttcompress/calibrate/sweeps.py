"""Least-squares sweeps over the cores of each layer, in forward order, on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.decompose import weight_only
from ttcompress.calibrate.statistics import EVEN, Statistics, hooked, layer_inputs
from ttcompress.data.calibration_images import Calibration
from ttcompress.networks.running import device_of
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import spread_norm
from ttcompress.tt.fit import fit_cores, output_error
from ttcompress.tt.whiten import Moments

SWEEP_IMAGES = 512
"""Images that a layer's least-squares fit sees."""


def sweep_layers(
    dense: nn.Module,
    compressed: nn.Module,
    plan: CompressionPlan,
    statistics: Statistics,
    calibration: Calibration,
    sweeps: int,
    progress: Progress | None = None,
) -> None:
    """Fit the cores of every layer in forward order, in place, to the outputs of the dense network.

    A layer's inputs are those of the compressed network so far, so that each corrects what the earlier ones lost.
    """
    layers = {layer.fqn: layer for layer in plan.layers}
    order = [name for name in statistics if name in layers]
    for done, name in enumerate(order):
        if progress:
            progress(f"fitting {name}", done, len(order))
        module: Any = dense.get_submodule(name)
        pairs = input_pairs(dense, compressed, name, calibration)
        fitting = pairs.centred() if module.bias is not None else pairs
        swapped: Any = compressed.get_submodule(name)
        start = [core.detach().double() for core in swapped.cores]
        cores = fit_layer(module.weight.detach(), layers[name], start, fitting, statistics[name].outputs, sweeps)
        for core, fitted in zip(swapped.cores, spread_norm(cores), strict=True):
            core.data = fitted.to(core)
        if module.bias is not None:
            mean_x, mean_t = pairs.means
            lost = (
                module.weight.detach().flatten(1).to(mean_t) @ mean_t
                - swapped.weight.detach().flatten(1).to(mean_x) @ mean_x
            )
            swapped.bias.data = (module.bias.detach() + lost).to(module.bias)


def fit_layer(
    weight: Tensor, layer: LayerPlan, start: Sequence[Tensor], pairs: Moments, outputs: Moments, sweeps: int
) -> list[Tensor]:
    """Cores after least-squares sweeps in the metric of the outputs, never worse than weight-only TT-SVD without it.

    Where the metric would make the plain output error larger than that of weight-only TT-SVD at the same inputs, the
    sweeps run without it, from the better of both starts.
    """
    fitted, _ = fit_cores(start, output_error(weight, pairs, outputs.blended(EVEN)), sweeps)
    unweighted = output_error(weight, pairs)
    plain = weight_only(weight, layer)
    if unweighted.value(fitted) <= unweighted.value(plain):
        return fitted
    return fit_cores(min(start, plain, key=unweighted.value), unweighted, sweeps)[0]


class _ReachedError(Exception):
    """The layer whose input is wanted has been reached; what follows it need not run."""


def input_pairs(dense: nn.Module, compressed: nn.Module, name: str, calibration: Calibration) -> Moments:
    """Paired moments of a layer's inputs in the compressed network (own) and in the dense one (crossed)."""
    module: Any = dense.get_submodule(name)
    pairs = Moments(prod(module.weight.shape[1:]), paired=True)
    device, seen = device_of(dense), 0
    for offset, batch in enumerate(calibration.fitting(0)):
        if seen >= SWEEP_IMAGES:
            break
        seen += len(batch)
        images = batch.to(device)
        ours, theirs = _inputs_of(compressed, name, images), _inputs_of(dense, name, images)
        for x, t in zip(ours, theirs, strict=True):
            pairs.add(layer_inputs(module, x, offset)[0], layer_inputs(module, t, offset)[0], len(batch))
    return pairs


@torch.no_grad()
def _inputs_of(model: nn.Module, name: str, images: Tensor) -> list[Tensor]:
    """The inputs of the first call of a layer; the rest of the network does not run."""
    caught: list[Tensor] = []

    def catch(_: str, module: nn.Module, x: Tensor) -> None:
        caught.append(x.detach())
        raise _ReachedError

    with hooked(model, [name], catch), suppress(_ReachedError):
        model(images)
    return caught
