"""From a compressed file to an ordinary checkpoint: the dense one, or one of stock layers that are factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ttcompress.commands.outputs import FILE_SUFFIXES, library_folder, write_dense_folder
from ttcompress.errors import CheckpointError
from ttcompress.files.compressed import dense_infos, stored_report
from ttcompress.files.header import PLAIN_KEY, blaming
from ttcompress.files.model_folder import COMPRESSED, CONFIG, GENERATION, written_names
from ttcompress.files.output import alone, check_folder_output, check_output
from ttcompress.files.shards import Index, read_index
from ttcompress.files.tensors import LazyTensors, tensor_infos
from ttcompress.files.writing import write_dense, write_safetensors, write_shards
from ttcompress.layers.plain import ContractedLinear, described
from ttcompress.layers.spec import unviewed
from ttcompress.measure.plain_forms import fastest
from ttcompress.networks.opening import factory_for, in_stock_layers, of_tensors, open_compressed
from ttcompress.networks.plain import tt_layers
from ttcompress.networks.stored import core_values, read_stored, stored_tensors
from ttcompress.records.plain import PlainRecord
from ttcompress.records.plan import LayerPlan
from ttcompress.records.report import LIBRARIES, Architecture, Report
from ttcompress.tt.contract import dense_weight
from ttcompress.version import __version__


@alone
def expand_file(source: Path, output: Path, force: bool = False) -> Report:
    """Turn a compressed file back into an ordinary dense checkpoint, with the original keys and types.

    Shards become shards in a folder, unless `output` is named as one file; a network of a library becomes a folder
    that the library itself loads.

    Raises:
        CheckpointError: not a compressed file, or an output that cannot be written.
    """
    architecture = stored_report(source).architecture
    in_one_file = output.suffix in FILE_SUFFIXES
    if architecture is not None and architecture.kind in LIBRARIES and not in_one_file:
        return _expand_to_folder(source, output, architecture, force)
    index = None if in_one_file else read_index(source)
    check_output(output, force, index, source)
    report, tensors = read_stored(source)
    with blaming(source):
        dense = _expanded(report, tensors)
    if index is None:
        write_dense(output, dense)
    else:
        write_shards(output, _expanded_index(report, index), dense)
    return report


def _expand_to_folder(source: Path, output: Path, architecture: Architecture, force: bool) -> Report:
    folder = library_folder(source, None)
    names = written_names(folder.path) if folder else {COMPRESSED, CONFIG, GENERATION}
    check_folder_output(output, names, force, folder.path if folder else None, compressed=False)

    report, tensors = read_stored(source)
    with blaming(source):
        model = of_tensors(architecture, dict(_expanded(report, tensors)))
    write_dense_folder(output, model, architecture, folder)
    return report


@dataclass(frozen=True)
class Expanded:
    """What became of the TT layers of a network: how many are rows of factors, how many dense."""

    factored: int
    dense: int
    contracted: tuple[str, ...]
    """Layers that are a `ContractedLinear`, which torch itself does not have."""
    num_bytes: int


@alone
def expand_to_factors(
    source: Path,
    output: Path,
    *,
    arch: str | None = None,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
    tune: bool = False,
    force: bool = False,
) -> Expanded:
    """Write the network of a compressed file with stock layers in the place of its TT layers, as `to_plain` has it.

    Raises:
        CheckpointError: not a compressed file, or an output that cannot be written or is no `.safetensors`.
        ArchitectureError: what builds the network, or the size of its input, is not known.
    """
    if output.suffix != ".safetensors":
        raise CheckpointError(f"{output}: end the name in .safetensors, which says how the layers are made")
    check_output(output, force, source=source)

    model, report = open_compressed(source, factory_for(stored_report(source).architecture, arch))
    before = tt_layers(model)
    with blaming(source):
        model = in_stock_layers(model, report, input_size or (), batch_size, fastest if tune else None)
    made = {fqn: model.get_submodule(fqn) for fqn in before}

    factors = {fqn: each for fqn, each in made.items() if isinstance(each, nn.Sequential | ContractedLinear)}
    layers = {fqn: tuple(described(each)) for fqn, each in factors.items()}
    record = PlainRecord(__version__, layers, report.source, report.architecture, report.preprocessing)
    tensors = stored_tensors(model, model.state_dict())
    write_safetensors(output, tensors, record.to_json(), key=PLAIN_KEY)

    contracted = [fqn for fqn, each in factors.items() if isinstance(each, ContractedLinear)]
    return Expanded(
        len(factors) - len(contracted), len(made) - len(factors), tuple(contracted), output.stat().st_size
    )


def _expanded(report: Report, tensors: Mapping[str, Tensor]) -> LazyTensors:
    layers = {layer.weight_name: layer for layer in report.plan.layers}

    def make(name: str) -> Tensor:
        if name in report.tied:
            return make(report.tied[name]).clone()
        return _dense(tensors, layers[name]) if name in layers else tensors[name]

    return LazyTensors(dense_infos(report, tensor_infos(tensors)), make)


def _dense(tensors: Mapping[str, Tensor], layer: LayerPlan) -> Tensor:
    cores = [core.double() for core in core_values(tensors, layer).values()]
    weight = unviewed(dense_weight(cores, layer.spec.view_shape), layer.spec)
    return weight.to(getattr(torch, layer.weight_dtype)).contiguous()


def _expanded_index(report: Report, index: Index) -> Index:
    """Every weight is where its cores are, every tied tensor where that is whose values it has."""
    homes = dict(index.homes)
    for layer in report.plan.layers:
        first, *_ = [homes.pop(name) for name in layer.stored_shapes]
        homes[layer.weight_name] = first
    return index.moved({**homes, **{alias: homes[name] for alias, name in report.tied.items()}})
