"""Least-squares sweeps over the cores of each layer, in forward order, on the inputs that it really gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttcompress.calibrate.decompose import weight_only
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.pairs import Pairs, pairs_by_layer
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.networks.weights import cores_of, weight_of
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import spread_norm
from ttcompress.tt.fit import fit_cores, output_error
from ttcompress.tt.whiten import Moments


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
            _sweep(reference, compressed, layer, pairs_of(layer, use), sweeps)


def _fitted_use(statistics: LayerStatistics) -> Use | None:
    """The one module at which a weight multiplies what is seen, where there is one.

    What is looked up does not depend on what came before, so that nothing is left to fit.
    """
    use = statistics.use
    return None if use is None or use.kind is Kind.LOOKUP or use.swapped else use


def _sweep(reference: Reference, compressed: nn.Module, layer: LayerPlan, pairs: Pairs, sweeps: int) -> None:
    """Fit one layer to pairs; its cores stay what they are where they do better on those held out."""
    statistics = reference.statistics[layer.fqn]
    # These are the largest matrices of a calibration: each is in memory only while it is needed.
    pairs.lay_aside()
    means = pairs.fitted.means
    if statistics.shift:
        # What takes up the mean error leaves the rest to the cores.
        pairs.fitted = pairs.fitted.centred()
    pairs.fitted = pairs.fitted.blended(statistics.unseen)
    pairs.lay_aside()

    own = cores_of(compressed, layer)
    start = [core.detach().double() for core in own]
    weight = weight_of(reference.dense, layer)
    metric = statistics.output_metric
    cores = fit_layer(weight, layer, start, pairs.fitted, metric, sweeps)
    held_out = pairs.held_out.centred() if statistics.shift else pairs.held_out
    best = min(start, cores, key=output_error(weight, held_out, metric).value)
    with torch.no_grad():
        for core, fitted in zip(own, spread_norm(best), strict=True):
            core.copy_(fitted)
    if statistics.shift:
        by = _missed_mean(weight, weight_of(compressed, layer), *means)
        statistics.shift.move(compressed, reference.dense, by)


def _missed_mean(weight: Tensor, fitted: Tensor, mean_ours: Tensor, mean_dense: Tensor) -> Tensor:
    """What the mean output of the dense layer is above that of the fitted one: W mean[x] - W~ mean[x~]."""
    wanted = weight.flatten(1).to(mean_dense) @ mean_dense
    given = fitted.flatten(1).to(mean_ours) @ mean_ours
    return wanted - given


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
