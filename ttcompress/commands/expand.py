"""Back from a compressed file to an ordinary dense checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import TensorInfo, blaming
from ttcompress.files.output import alone, check_output
from ttcompress.files.shards import Index, read_index, read_metadata
from ttcompress.files.tensors import DTYPE_NAMES, LazyTensors, tensor_infos
from ttcompress.files.writing import write_dense, write_shards
from ttcompress.networks.stored import check_cores, core_values
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
    check_output(output, force, index)
    metadata, tensors = read_metadata(source), load_compressed(source)
    with blaming(source):
        report = Report.from_json(metadata)
        dense = _expanded(report, tensors)
    if index is None:
        write_dense(output, dense)
    else:
        write_shards(output, _expanded_index(report, index), dense)
    return report


def _expanded(report: Report, tensors: Mapping[str, Tensor]) -> LazyTensors:
    layers = {f"{layer.fqn}.weight": layer for layer in report.plan.layers}
    for layer in layers.values():
        check_cores(tensors, layer)
    if missing := [kept.name for kept in report.plan.kept if kept.name not in tensors]:
        raise CheckpointError(f"lacks {shortlist(missing)}; of a sharded checkpoint name the folder")

    def make(name: str) -> Tensor:
        if name in report.tied:
            return make(report.tied[name]).clone()
        if name not in layers:
            return tensors[name]
        layer = layers[name]
        cores = [core.double() for core in core_values(tensors, layer).values()]
        weight = dense_weight(cores, layer.spec.weight_shape)
        return weight.to(getattr(torch, layer.weight_dtype)).contiguous()

    stored = {name for layer in layers.values() for name in layer.stored_shapes}
    infos = {
        **tensor_infos({name: tensor for name, tensor in tensors.items() if name not in stored}),
        **{name: _dense_info(layer) for name, layer in layers.items()},
    }
    return LazyTensors({**infos, **{alias: infos[name] for alias, name in report.tied.items()}}, make)


def _dense_info(layer: LayerPlan) -> TensorInfo:
    return TensorInfo(DTYPE_NAMES[getattr(torch, layer.weight_dtype)], layer.spec.weight_shape)


def _expanded_index(report: Report, index: Index) -> Index:
    """Every weight is where its cores are, every tied tensor where that is whose values it has."""
    homes = dict(index.homes)
    for layer in report.plan.layers:
        first, *_ = [homes.pop(name) for name in layer.stored_shapes]
        homes[f"{layer.fqn}.weight"] = first
    return index.moved({**homes, **{alias: homes[name] for alias, name in report.tied.items()}})
