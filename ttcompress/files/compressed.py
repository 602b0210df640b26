"""A compressed file without its tensors: its report, and whether these are the ones that it speaks of; no torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import TensorInfo, blaming, canonical_json, read_header
from ttcompress.files.shards import checkpoint_files, read_metadata
from ttcompress.records.decoding import decode, refusing_as
from ttcompress.records.forms import StoredForm
from ttcompress.records.plan import LayerPlan
from ttcompress.records.report import Architecture, Report

TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int8": "I8"}
"""Types of weights and cores as safetensors spells them."""
CORE_NAME = re.compile(r"(^|[._])(cores|core_scales)\.[0-9]+$")
USUAL_ARGUMENT = 1000
"""Arguments of networks up to here, such as a size of images, need not be a dimension of a tensor."""
SMALL = 2**30
"""Bytes of dense weights that any file may stand for."""
MOST_TIMES = 10_000
"""Of more bytes, a file stands for at most this many times its own tensors."""
TRUST = "TTCOMPRESS_TRUST"


@dataclass(frozen=True)
class Stored:
    """A report, the types and shapes of the tensors beside it, and which of these may hold NaN or Inf."""

    report: Report
    infos: Mapping[str, TensorInfo]
    non_finite: tuple[str, ...] = ()


def stored_report(path: Path) -> Report:
    """The report of a compressed file or folder.

    Raises:
        CheckpointError: see `open_stored`.
    """
    return open_stored(path).report


def open_stored(path: Path) -> Stored:
    """The report of a compressed file or of a folder of shards, checked against the headers.

    Raises:
        CheckpointError: not a compressed file, damaged, of another schema, or with other tensors than it says.
    """
    with blaming(path):
        metadata = read_metadata(path)
        infos: dict[str, TensorInfo] = {}
        for file in checkpoint_files(path):
            infos |= read_header(file)[0]

        report = Report.from_json(metadata)
        with refusing_as(CheckpointError):
            form = decode(metadata, StoredForm)
        check_stored(report, infos)
        _check_architecture(report, infos)
        _check_layout(report, infos, form.layout)
    return Stored(report, infos, tuple(form.non_finite))


def check_stored(report: Report, infos: Mapping[str, TensorInfo]) -> None:
    """See that tensors of these types and shapes are those that a report speaks of.

    Raises:
        CheckpointError: they are not, naming them.
    """
    expected = core_infos(report)
    needed = [*expected, *(kept.name for kept in report.kept)]
    if missing := sorted(name for name in needed if name not in infos):
        raise CheckpointError(f"lacks {shortlist(missing)}; of a sharded checkpoint name the folder")

    wrong = []
    for name, info in expected.items():
        if infos[name] != info:
            wrong.append(f"{name} is {_words(infos[name])}, not {_words(info)}")
    for kept in report.kept:
        if infos[kept.name].params != kept.params:
            wrong.append(f"{kept.name} has {infos[kept.name].params:,} entries, not {kept.params:,}")
    wrong += [f"{name} is not to be there" for name in _stored_otherwise(report) if name in infos]
    if wrong:
        raise CheckpointError(f"holds other tensors than its metadata say: {shortlist(sorted(wrong))}")


def _stored_otherwise(report: Report) -> list[str]:
    """Names of the dense checkpoint whose values come from other tensors."""
    return [*report.tied, *(layer.weight_name for layer in report.layers)]


def _check_architecture(report: Report, infos: Mapping[str, TensorInfo]) -> None:
    """See that no width of the network is beyond all of its tensors: building it would fill the memory."""
    shapes = [info.shape for info in dense_infos(report, infos).values()]
    check_arguments(report.architecture, shapes)


def check_arguments(architecture: Architecture | None, shapes: Iterable[Sequence[int]]) -> None:
    """See that no argument of an architecture is beyond all dimensions of its tensors.

    Raises:
        CheckpointError: one is.
    """
    if architecture is None:
        return
    largest = max([USUAL_ARGUMENT, *(size for shape in shapes for size in shape)])
    for name, value in architecture.arguments.items():
        if value > largest:
            raise CheckpointError(
                f"architecture.arguments.{name} is {value:,}, its tensors have at most {largest:,}"
            )


def _check_layout(report: Report, infos: Mapping[str, TensorInfo], stated: str) -> None:
    if stated:
        if stated != layout(report, infos):
            raise CheckpointError(
                "holds tensors of other names, types or shapes than when it was written; get it anew"
            )
        return

    # Older files do not state it: at least no core may be left that belongs to no layer.
    named = {*core_infos(report), *(kept.name for kept in report.kept)}
    if extra := sorted(name for name in infos if CORE_NAME.search(name) and name not in named):
        raise CheckpointError(f"holds other tensors than its metadata say: {shortlist(extra)} of no layer")


def core_infos(report: Report) -> dict[str, TensorInfo]:
    """Types and shapes of the TT-cores of all weights, and of their scales."""
    infos: dict[str, TensorInfo] = {}
    for layer in report.layers:
        infos |= {
            name: TensorInfo(TYPES[layer.stored_dtype], shape) for name, shape in layer.core_shapes.items()
        }
        infos |= {name: TensorInfo("F32", shape) for name, shape in layer.scale_shapes.items()}
    return infos


def dense_infos(report: Report, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Types and shapes of the tensors of the dense checkpoint that a file stands for."""
    cores = core_infos(report)
    dense = {name: info for name, info in infos.items() if name not in cores}
    dense |= {layer.weight_name: _dense_info(layer) for layer in report.layers}
    return dense | {alias: dense[name] for alias, name in report.tied.items()}


def layout(report: Report, infos: Mapping[str, TensorInfo]) -> str:
    """A sum over names, types and shapes of all tensors, as they are stored and as they are dense (docs/format.md)."""
    kept = {each.name: infos[each.name] for each in report.kept}
    parts = {"stored": infos, "dense": dense_infos(report, infos), "kept": kept}
    listed = {
        part: {name: [info.dtype, info.shape] for name, info in of.items()} for part, of in parts.items()
    }
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()


def check_size(report: Report, infos: Mapping[str, TensorInfo]) -> None:
    """See that a file does not stand for weights out of all proportion to it, which would fill the memory.

    Raises:
        CheckpointError: it does, and nobody said to trust it.
    """
    dense = sum(_dense_info(layer).num_bytes for layer in report.layers)
    stored = sum(info.num_bytes for info in infos.values())
    if dense <= max(SMALL, MOST_TIMES * stored) or os.environ.get(TRUST) == "1":
        return
    stands = f"stands for {dense:,} bytes of dense weights, over {MOST_TIMES:,} times its {stored:,} bytes of tensors"
    raise CheckpointError(f"{stands}; if that is meant, set {TRUST}=1")


def _dense_info(layer: LayerPlan) -> TensorInfo:
    return TensorInfo(TYPES[layer.weight_dtype], layer.spec.weight_shape)


def _words(info: TensorInfo) -> str:
    return f"{info.dtype} {'x'.join(map(str, info.shape)) or 'scalar'}"
