"""Back from a compressed file to an ordinary dense checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.files.compressed import dense_infos
from ttcompress.files.header import blaming
from ttcompress.files.output import alone, check_output
from ttcompress.files.shards import Index, read_index
from ttcompress.files.tensors import LazyTensors, tensor_infos
from ttcompress.files.writing import write_dense, write_shards
from ttcompress.layers.spec import viewed
from ttcompress.networks.stored import core_values, read_stored
from ttcompress.records.plan import LayerPlan
from ttcompress.records.report import Report
from ttcompress.tt.contract import dense_weight


@alone
def expand_file(source: Path, output: Path, force: bool = False) -> Report:
    """Turn a compressed file back into an ordinary dense checkpoint, with the original keys and types.

    Shards become shards in a folder, unless `output` is named as one file.

    Raises:
        CheckpointError: not a compressed file, or an output that cannot be written.
    """
    index = None if output.suffix in (".pt", ".pth", ".safetensors") else read_index(source)
    check_output(output, force, index, source)
    report, tensors = read_stored(source)
    with blaming(source):
        dense = _expanded(report, tensors)
    if index is None:
        write_dense(output, dense)
    else:
        write_shards(output, _expanded_index(report, index), dense)
    return report


def _expanded(report: Report, tensors: Mapping[str, Tensor]) -> LazyTensors:
    layers = {layer.weight_name: layer for layer in report.plan.layers}

    def make(name: str) -> Tensor:
        if name in report.tied:
            return make(report.tied[name]).clone()
        return _dense(tensors, layers[name]) if name in layers else tensors[name]

    return LazyTensors(dense_infos(report, tensor_infos(tensors)), make)


def _dense(tensors: Mapping[str, Tensor], layer: LayerPlan) -> Tensor:
    cores = [core.double() for core in core_values(tensors, layer).values()]
    weight = viewed(dense_weight(cores, layer.spec.view_shape), layer.spec)
    return weight.to(getattr(torch, layer.weight_dtype)).contiguous()


def _expanded_index(report: Report, index: Index) -> Index:
    """Every weight is where its cores are, every tied tensor where that is whose values it has."""
    homes = dict(index.homes)
    for layer in report.plan.layers:
        first, *_ = [homes.pop(name) for name in layer.stored_shapes]
        homes[layer.weight_name] = first
    return index.moved({**homes, **{alias: homes[name] for alias, name in report.tied.items()}})
