"""Cores of a weight in the metric of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.tables import UNSEEN_LIMIT, error_of, never_seen
from ttcompress.networks.surgery import install
from ttcompress.networks.weights import parameter_of, tied_names
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.decompose import decompose_weight, spread_norm
from ttcompress.tt.whiten import output_cost, whitened_svd


def decompose(weight: Tensor, layer: LayerPlan, statistics: LayerStatistics) -> list[Tensor]:
    """Cores at the planned TT-ranks: the best on held-out images of whitened and weight-only TT-SVD.

    The input metric is full or diagonal: the full one knows more, the diagonal one is estimated better from
    few images. What misses the outputs on the calibration images by more than weight-only TT-SVD does is not
    considered, nor what gives up the rows of a table that these do not look up.
    """
    if layer.spec.groups > 1:
        one = _of_one_group(layer)
        groups = [decompose(block, one, statistics) for block in weight]
        return [torch.stack(cores) for cores in zip(*groups, strict=True)]

    plain = weight_only(weight, layer)
    missed = weight - _dense(plain, weight)
    rows = never_seen(statistics)
    most = inf if rows is None else UNSEEN_LIMIT * error_of(weight, weight - missed, rows)
    limit = output_cost(missed, statistics.input_metric)

    outputs, held_out = statistics.output_metric, statistics.held_out_metric
    best, least = plain, output_cost(missed, held_out, outputs)
    # Of a table there is but a diagonal.
    for diagonal in (False, True)[: 1 if statistics.inputs.is_diagonal else 2]:
        metrics = statistics.metrics(layer.tensorization, diagonal)
        cores = whitened_svd(weight, layer.tensorization, layer.tt_ranks, metrics)
        missed = weight - _dense(cores, weight)
        if rows is not None and error_of(weight, weight - missed, rows) > most:
            continue
        cost = output_cost(missed, held_out, outputs)
        if cost < least and output_cost(missed, statistics.input_metric) <= limit:
            best, least = cores, cost
    return best


def _of_one_group(layer: LayerPlan) -> LayerPlan:
    spec: Any = layer.spec
    channels = {
        "in_channels": spec.in_channels // spec.groups,
        "out_channels": spec.out_channels // spec.groups,
    }
    return replace(
        layer, spec=replace(spec, groups=1, **channels), tensorization=replace(layer.tensorization, groups=1)
    )


def weight_only(weight: Tensor, layer: LayerPlan) -> list[Tensor]:
    """Cores by TT-SVD of the weight itself, float64."""
    result = decompose_weight(weight, layer.tensorization, layer.tt_ranks)
    return [core.double() for core in result.cores]


def _dense(cores: Sequence[Tensor], weight: Tensor) -> Tensor:
    return dense_weight([core.to(weight) for core in cores], tuple(weight.shape))


def swap_in(model: nn.Module, dense: nn.Module, layer: LayerPlan, cores: Sequence[Tensor]) -> None:
    """Put these cores, in the type of the weight, in its place."""
    like = parameter_of(dense, layer)
    spread = [core.to(like) for core in spread_norm(cores)]
    install(model, dense, layer, spread, tied_names(dense).get(layer.weight_name, ()))
