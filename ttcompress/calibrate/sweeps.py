"""Least-squares sweeps over the cores of each layer, in forward order, on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.decompose import weight_only
from ttcompress.calibrate.observe import Call, hooked, layer_inputs
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.uses import Use, uses_of
from ttcompress.data.calibration_images import Calibration
from ttcompress.networks.running import NetworkInput, batch_size, call, device_of, placed
from ttcompress.networks.weights import cores_of, tied_names, weight_of
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import spread_norm
from ttcompress.tt.fit import fit_cores, output_error
from ttcompress.tt.whiten import Moments

SWEEP_IMAGES = 512
"""Images that a layer's least-squares fit sees."""


def sweep_layers(
    reference: Reference,
    compressed: nn.Module,
    plan: CompressionPlan,
    sweeps: int,
    progress: Progress | None = None,
) -> None:
    """Fit the cores of every layer in forward order, in place, to the outputs of the dense network.

    A layer's inputs are those of the compressed network so far, so that each corrects what the earlier ones
    lost.
    """
    layers = {layer.fqn: layer for layer in plan.layers}
    order = [layers[fqn] for fqn in reference.statistics if fqn in layers]
    order = [layer for layer in order if _sole_use(reference.dense, layer)]
    for done, layer in enumerate(order):
        if progress:
            progress(f"fitting {layer.fqn}", done, len(order))
        _sweep(reference, compressed, layer, sweeps)


def _sole_use(model: nn.Module, layer: LayerPlan) -> Use | None:
    """The one module that multiplies by a weight, where there is one.

    What is looked up does not depend on what came before, so that nothing is left to fit.
    """
    uses = uses_of(model, layer.fqn, layer.spec, tied_names(model))
    if len(uses) != 1 or uses[0].is_lookup or uses[0].swapped:
        return None
    return uses[0]


def _sweep(reference: Reference, compressed: nn.Module, layer: LayerPlan, sweeps: int) -> None:
    module: Any = reference.dense.get_submodule(layer.module_fqn)
    swapped: Any = compressed.get_submodule(layer.module_fqn)
    pairs = input_pairs(reference.dense, compressed, layer.module_fqn, reference.calibration)
    # A module that does not run has another one read its weight.
    if pairs.is_empty:
        return

    # Where there is a bias it takes up the mean error, so that the cores need not.
    has_bias = module.bias is not None
    fitting = pairs.centred() if has_bias else pairs

    own = cores_of(compressed, layer)
    start = [core.detach().double() for core in own]
    weight, metric = weight_of(reference.dense, layer), reference.statistics[layer.fqn].output_metric
    cores = fit_layer(weight, layer, start, fitting, metric, sweeps)
    for core, fitted in zip(own, spread_norm(cores), strict=True):
        core.data = fitted.to(core)
    if has_bias:
        mean_ours, mean_dense = pairs.means
        wanted = weight.flatten(1).to(mean_dense) @ mean_dense
        given = weight_of(compressed, layer).flatten(1).to(mean_ours) @ mean_ours
        # With it the mean output is that of the dense layer: b + W mean[x] - W~ mean[x~].
        swapped.bias.data = (module.bias.detach() + (wanted - given)).to(module.bias)


def fit_layer(
    weight: Tensor, layer: LayerPlan, start: Sequence[Tensor], pairs: Moments, metric: Moments, sweeps: int
) -> list[Tensor]:
    """Cores after least-squares sweeps in the metric of the outputs, never worse than weight-only TT-SVD.

    Where the metric would make the plain output error larger than that of weight-only TT-SVD at the same
    inputs, the sweeps run without it, from the better of both starts.
    """
    fitted, _ = fit_cores(start, output_error(weight, pairs, metric), sweeps)

    # The metric is estimated from few images, and may trade what matters for what does not seem to.
    unweighted = output_error(weight, pairs)
    plain = weight_only(weight, layer)
    if unweighted.value(fitted) <= unweighted.value(plain):
        return fitted

    better = min(start, plain, key=unweighted.value)
    return fit_cores(better, unweighted, sweeps)[0]


class _Reached(BaseException):
    """The layer whose input is wanted has been reached; what follows it need not run.

    It is no error, so that a network that catches errors does not catch it.
    """


def input_pairs(dense: nn.Module, compressed: nn.Module, name: str, calibration: Calibration) -> Moments:
    """Paired moments of a layer's inputs in the compressed network (own) and in the dense one (crossed)."""
    module: Any = dense.get_submodule(name)
    pairs = Moments(module.weight[0].numel(), paired=True)

    device, seen = device_of(dense), 0
    for offset, batch in enumerate(calibration.fitting(0)):
        if seen >= SWEEP_IMAGES:
            break
        size = batch_size(batch)
        seen += size
        inputs = placed(batch, device)
        ours, theirs = _inputs_of(compressed, name, inputs), _inputs_of(dense, name, inputs)
        # A layer that runs several times for a batch is fitted at its first call.
        for x, t in zip(ours, theirs, strict=True):
            columns, partners = layer_inputs(module, x, offset)[0], layer_inputs(module, t, offset)[0]
            pairs.add(columns, partners, size)
    return pairs


@torch.no_grad()
def _inputs_of(model: nn.Module, name: str, inputs: NetworkInput) -> list[Tensor]:
    """The inputs of the first call of a layer; the rest of the network does not run."""
    caught: list[Tensor] = []

    def catch(_: str, module: nn.Module, call: Call) -> None:
        caught.append(call.first.detach())
        raise _Reached

    with hooked(model, [name], catch), suppress(_Reached):
        call(model, inputs)
    return caught
