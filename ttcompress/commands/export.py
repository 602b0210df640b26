"""Networks as ONNX files: standard operators, weights still as cores, compared with torch before the file is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.errors import ExportError
from ttcompress.files.header import canonical_json
from ttcompress.files.output import alone, check_output, replacing
from ttcompress.files.tensors import tensor_bytes
from ttcompress.networks.onnx_files import (
    OPSET,
    Session,
    check_installed,
    computable,
    has_onnxruntime,
    operators,
    program_of,
    write_program,
)
from ttcompress.networks.opening import input_shape, open_any
from ttcompress.networks.plain import plain_network
from ttcompress.networks.running import Example, call, finite, input_dtype, made_up
from ttcompress.networks.stored import stored_tensors
from ttcompress.networks.structures import tensors_by_name
from ttcompress.records.common import Json

BATCHES = (1, 5)
"""Sizes at which onnxruntime is compared with torch."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Largest difference, over the largest output, by type of the input."""
LARGEST = 2_000_000_000
"""Bytes of tensors: a protobuf message ends at 2 GiB."""


@dataclass(frozen=True)
class Exported:
    """What was written: `input_shape` is without the batch, `difference` is None where onnxruntime is missing."""

    file: str
    file_bytes: int
    tensor_bytes: int
    opset: int
    dtype: str
    input_shape: tuple[int, ...]
    operators: Mapping[str, int]
    difference: float | None

    def to_json(self) -> Json:
        """As `--json` prints it."""
        return {**vars(self), "input_shape": list(self.input_shape), "operators": dict(self.operators)}


@alone
def export_file(
    source: Path,
    output: Path,
    *,
    arch: str | None = None,
    key: str | None = None,
    input_size: Sequence[int] | None = None,
    layers: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a compressed file or a dense checkpoint as one ONNX file with a free batch axis.

    Args:
        input_size: of one input, without the batch; by default what the file records or the architecture is known for.
        layers: `plain` to write the network in stock layers, `tt` as it is loaded.

    Raises:
        ExportError: packages are missing, the input size is unknown, the network does not export, or differs there.
        TTCompressError: a file that cannot be read or written, an input that the network does not take.
    """
    check_installed()
    check_output(output, force, source=source)
    network = open_any(source, arch, key or "")
    shape = input_shape(source, network, input_size)
    opened = network.model
    if layers == "plain":
        opened = plain_network(opened, Example(shape))
    model = computable(opened)
    stored = tensor_bytes(stored_tensors(model, network.tensors))
    if stored > LARGEST:
        raise ExportError(
            f"{source}: has {stored:,} bytes of tensors; an ONNX file holds {LARGEST:,} at most"
        )
    inputs = [_random(batch, shape, input_dtype(model)) for batch in BATCHES]
    with torch.inference_mode():
        wanted = [list(tensors_by_name(call(model, x)).values()) for x in inputs]
    for each in (tensor for of_batch in wanted for tensor in of_batch):
        finite(each)
    program = program_of(model, inputs[-1])
    counts = operators(program.model)
    if network.preprocessing:
        program.model.metadata_props["preprocessing"] = canonical_json(network.preprocessing.to_json())
    with replacing(output) as temporary:
        write_program(program, temporary)
        difference = _difference(temporary, inputs, wanted)
    dtype = str(input_dtype(model)).removeprefix("torch.")
    return Exported(output.name, output.stat().st_size, stored, OPSET, dtype, shape, counts, difference)


def _random(batch: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return made_up(torch.randn, (batch, *shape), generator=torch.Generator().manual_seed(batch)).to(dtype)


def _difference(path: Path, inputs: Sequence[Tensor], wanted: Sequence[Sequence[Tensor]]) -> float | None:
    """Of onnxruntime from torch, the largest over the largest output; None where onnxruntime is not installed.

    Raises:
        ExportError: it does not run the file, or the difference is beyond the tolerance.
    """
    if not has_onnxruntime():
        return None
    found = _run(path, inputs)
    differences = [
        _relative(one, other)
        for of_batch, wanted_of_batch in zip(found, wanted, strict=True)
        for one, other in zip(of_batch, wanted_of_batch, strict=True)
    ]
    # Unlike Python's, torch's maximum keeps NaN, and the comparison is written so that it fails.
    difference, most = float(torch.tensor(differences).max()), TOLERANCE[inputs[0].dtype]
    if not difference <= most:
        raise ExportError(
            f"onnxruntime differs from torch by {difference:.2g} of the largest output, more than {most:g}"
        )
    return difference


def _run(path: Path, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
    session = Session(path)
    return [session.run(x) for x in inputs]


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ExportError(f"onnxruntime returns {tuple(found.shape)}, torch {tuple(wanted.shape)}")
    if not wanted.numel():
        return 0.0
    scale = wanted.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((found.double() - wanted.double()).abs().max() / scale)
