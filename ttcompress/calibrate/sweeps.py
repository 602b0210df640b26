"""Least-squares sweeps over the cores of each layer, in forward order, on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.decompose import weight_only
from ttcompress.calibrate.in_step import in_step
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.observe import Call, hooked
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.networks.running import NetworkInput, batch_size, call, device_of, placed, tensors_of
from ttcompress.networks.weights import cores_of, weight_of
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
    order = [(layers[fqn], _fitted_use(each)) for fqn, each in reference.statistics.items() if fqn in layers]
    fitted = [(layer, use) for layer, use in order if use is not None]
    with pairs_by_layer(reference, compressed, [use.fqn for _, use in fitted]) as pairs_of:
        for done, (layer, use) in enumerate(fitted):
            if progress:
                progress(f"fitting {layer.fqn}", done, len(fitted))
            _sweep(reference, compressed, layer, use, pairs_of(layer, use), sweeps)


def _fitted_use(statistics: LayerStatistics) -> Use | None:
    """The one module at which a weight multiplies what is seen, where there is one.

    What is looked up does not depend on what came before, so that nothing is left to fit.
    """
    use = statistics.use
    return None if use is None or use.kind is Kind.LOOKUP or use.swapped else use


def _sweep(
    reference: Reference, compressed: nn.Module, layer: LayerPlan, use: Use, pairs: Moments, sweeps: int
) -> None:
    # Where there is a bias it takes up the mean error, so that the cores need not.
    theirs, ours = (_bias(each, layer, use) for each in (reference.dense, compressed))
    fitting = pairs if theirs is None else pairs.centred()

    own = cores_of(compressed, layer)
    start = [core.detach().double() for core in own]
    weight = weight_of(reference.dense, layer)
    metric = reference.statistics[layer.fqn].output_metric
    cores = fit_layer(weight, layer, start, fitting, metric, sweeps)
    with torch.no_grad():
        for core, fitted in zip(own, spread_norm(cores), strict=True):
            core.copy_(fitted)
        if theirs is not None and ours is not None:
            ours.copy_(_bias_for_mean(theirs, weight, weight_of(compressed, layer), pairs))


def _bias(model: nn.Module, layer: LayerPlan, use: Use) -> nn.Parameter | None:
    return getattr(model.get_submodule(layer.module_fqn), use.bias) if use.bias else None


def _bias_for_mean(bias: Tensor, weight: Tensor, fitted: Tensor, pairs: Moments) -> Tensor:
    """The bias with which the mean output is that of the dense layer: b + W mean[x] - W~ mean[x~]."""
    mean_ours, mean_dense = pairs.means
    wanted = weight.flatten(1).to(mean_dense) @ mean_dense
    given = fitted.flatten(1).to(mean_ours) @ mean_ours
    return (bias.detach() + (wanted - given)).to(bias)


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
) -> Iterator[Callable[[LayerPlan, Use], Moments]]:
    """What gives the paired moments of a weight's inputs, to be asked for in this order of modules."""
    dense = reference.dense
    one_by_one = partial(input_pairs, dense, compressed, calibration=reference.calibration)
    batches = _fitted_batches(reference) if reference.in_step else []
    if not batches:
        yield one_by_one
        return

    with in_step([compressed, dense], order, [batch for batch, _ in batches]) as walks:

        def together(layer: LayerPlan, use: Use) -> Moments:
            ours, theirs = (walk.calls(use.fqn) if walk.is_on_time else None for walk in walks)
            # A network that comes by its modules in another order is run anew for each.
            if ours is None or theirs is None:
                return one_by_one(layer, use)

            geometry = dense.get_submodule(use.fqn)
            pairs = Pairs(layer)
            for (batch, offset), *calls in zip(batches, ours, theirs, strict=True):
                models = zip((compressed, dense), calls, strict=True)
                mine, other = (
                    use.inputs(model.get_submodule(use.fqn), at, offset, geometry) for model, at in models
                )
                pairs.add(mine, other, batch_size(batch))
            return pairs.moments

        yield together


def _fitted_batches(reference: Reference) -> list[tuple[NetworkInput, int]]:
    """The batches that weights are fitted to, and their numbers; none where so many at once would take much memory."""
    calibration = reference.calibration
    batches, held = [], 0
    for piece, number in _swept(calibration):
        held += sum(tensor.nbytes for tensor in tensors_of(piece))
        # What is cut to pieces would be halted in all of them at once.
        if held > IN_STEP_BYTES or len(calibration.pieces(piece)) > 1:
            return []
        batches.append((placed(piece, device_of(reference.dense)), number))
    return batches


def _swept(calibration: Calibration) -> Iterator[tuple[NetworkInput, int]]:
    """The images that weights are fitted to, in pieces, with the number of the batch."""
    seen = 0
    for number, batch in enumerate(calibration.fitting(0)):
        if seen >= SWEEP_IMAGES:
            break
        seen += batch_size(batch)
        for piece in calibration.pieces(batch, gradients=False):
            yield piece, number


class Pairs:
    """Paired moments of a weight's inputs, every position of which counts as much as another."""

    def __init__(self, layer: LayerPlan) -> None:
        self.moments = Moments(prod(layer.spec.view_shape[1:]), paired=True)
        self._usual = 0

    def add(self, ours: tuple[Tensor, int], theirs: tuple[Tensor, int], count: int) -> None:
        """Add the columns of so many images in both networks, each with the positions that an image has."""
        columns, positions = ours
        self._usual = self._usual or positions
        self.moments.add(columns, theirs[0], count * (positions / self._usual))


def input_pairs(
    dense: nn.Module, compressed: nn.Module, layer: LayerPlan, use: Use, calibration: Calibration
) -> Moments:
    """Paired moments of a weight's inputs in the compressed network (own) and in the dense one (crossed)."""
    pairs = Pairs(layer)
    geometry = dense.get_submodule(use.fqn)
    for piece, number in _swept(calibration):
        inputs = placed(piece, device_of(dense))
        ours, theirs = (_columns(each, geometry, use, inputs, number) for each in (compressed, dense))
        pairs.add(ours, theirs, batch_size(piece))
    return pairs.moments


@torch.no_grad()
def _columns(
    model: nn.Module, geometry: nn.Module, use: Use, inputs: NetworkInput, offset: int
) -> tuple[Tensor, int]:
    """What the weight multiplies at the first call of its module, as `Use.inputs`; the rest of the network does not run.

    A layer that runs several times for a batch is fitted at its first call.
    """
    caught: list[tuple[Tensor, int]] = []

    def catch(_: str, module: nn.Module, at: Call) -> None:
        caught.append(use.inputs(module, at, offset, geometry))
        raise _Reached

    with hooked(model, [use.fqn], catch), suppress(_Reached):
        call(model, inputs)
    return caught[0]
