"""Least-squares sweeps over the cores of each layer, in forward order, on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.decompose import weight_only
from ttcompress.calibrate.in_step import in_step
from ttcompress.calibrate.observe import hooked, layer_inputs, weight_size
from ttcompress.calibrate.reference import Reference
from ttcompress.data.calibration_images import Calibration
from ttcompress.networks.running import NetworkInput, batch_size, call, device_of, placed, tensors_of
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import spread_norm
from ttcompress.tt.fit import fit_cores, output_error
from ttcompress.tt.whiten import Moments

IN_STEP_BYTES = 2**25
"""Of all inputs together, up to which passes over them may be halted side by side."""
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
    order = [name for name in reference.statistics if name in layers]
    with pairs_by_layer(reference, compressed, order) as pairs_of:
        for done, name in enumerate(order):
            if progress:
                progress(f"fitting {name}", done, len(order))
            _fit(reference, compressed, layers[name], pairs_of(name), sweeps)


def _fit(reference: Reference, compressed: nn.Module, layer: LayerPlan, pairs: Moments, sweeps: int) -> None:
    name = layer.fqn
    module: Any = reference.dense.get_submodule(name)
    swapped: Any = compressed.get_submodule(name)
    # Where there is a bias it takes up the mean error, so that the cores need not.
    has_bias = module.bias is not None
    fitting = pairs.centred() if has_bias else pairs

    start = [core.detach().double() for core in swapped.cores]
    metric = reference.statistics[name].output_metric
    cores = fit_layer(module.weight.detach(), layer, start, fitting, metric, sweeps)
    for core, fitted in zip(swapped.cores, spread_norm(cores), strict=True):
        core.data = fitted.to(core)
    if has_bias:
        swapped.bias.data = _bias_for_mean(module, swapped, pairs)


def _bias_for_mean(module: Any, swapped: Any, pairs: Moments) -> Tensor:
    """The bias with which the mean output is that of the dense layer: b + W mean[x] - W~ mean[x~]."""
    mean_ours, mean_dense = pairs.means
    wanted = module.weight.detach().flatten(1).to(mean_dense) @ mean_dense
    given = swapped.weight.detach().flatten(1).to(mean_ours) @ mean_ours
    bias: Tensor = module.bias.detach() + (wanted - given)
    return bias.to(module.bias)


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


@contextmanager
def pairs_by_layer(
    reference: Reference, compressed: nn.Module, order: Sequence[str]
) -> Iterator[Callable[[str], Moments]]:
    """What gives the paired moments of a layer's inputs, to be asked for in the order of the network."""
    dense = reference.dense
    one_by_one = partial(input_pairs, dense, compressed, calibration=reference.calibration)
    batches = _fitted_batches(reference) if reference.in_step else []
    if not batches:
        yield one_by_one
        return

    with in_step([compressed, dense], order, batches) as walks:

        def together(name: str) -> Moments:
            ours, theirs = (walk.inputs(name) if walk.is_on_time else None for walk in walks)
            # A network that comes by its layers in another order is run anew for each.
            if ours is None or theirs is None:
                return one_by_one(name)
            pairs = _no_pairs(dense, name)
            for offset, (batch, x, t) in enumerate(zip(batches, ours, theirs, strict=True)):
                _add_pair(pairs, dense, name, offset, batch_size(batch), x, t)
            return pairs

        yield together


def _fitted_batches(reference: Reference) -> list[NetworkInput]:
    """The batches that layers are fitted to, none where so many at once would take much memory."""
    batches, seen, held = [], 0, 0
    for batch in reference.calibration.fitting(0):
        if seen >= SWEEP_IMAGES:
            break
        seen += batch_size(batch)
        held += sum(tensor.nbytes for tensor in tensors_of(batch))
        batches.append(placed(batch, device_of(reference.dense)))
    return batches if held <= IN_STEP_BYTES else []


def _no_pairs(dense: nn.Module, name: str) -> Moments:
    _, size = weight_size(dense.get_submodule(name))
    return Moments(size, paired=True)


def _add_pair(
    pairs: Moments, dense: nn.Module, name: str, offset: int, count: int, x: Tensor, t: Tensor
) -> None:
    module = dense.get_submodule(name)
    columns, partners = layer_inputs(module, x, offset)[0], layer_inputs(module, t, offset)[0]
    pairs.add(columns, partners, count)


def input_pairs(dense: nn.Module, compressed: nn.Module, name: str, calibration: Calibration) -> Moments:
    """Paired moments of a layer's inputs in the compressed network (own) and in the dense one (crossed)."""
    pairs = _no_pairs(dense, name)
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
            _add_pair(pairs, dense, name, offset, size, x, t)
    return pairs


@torch.no_grad()
def _inputs_of(model: nn.Module, name: str, inputs: NetworkInput) -> list[Tensor]:
    """The inputs of the first call of a layer; the rest of the network does not run."""
    caught: list[Tensor] = []

    def catch(_: str, module: nn.Module, x: Tensor) -> None:
        caught.append(x.detach())
        raise _Reached

    with hooked(model, [name], catch), suppress(_Reached):
        call(model, inputs)
    return caught
