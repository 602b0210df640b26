"""Networks as ONNX files: standard operators, weights still as cores, compared with torch before the file is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from ttcompress.networks.opening import example_of, open_any
from ttcompress.networks.plain import plain_network
from ttcompress.networks.reader import Reader
from ttcompress.networks.running import call, finite, forward, input_dtype, made_up, tensors_of
from ttcompress.networks.stored import stored_tensors
from ttcompress.networks.text_examples import answer_of, half_masked, output_name, text_example
from ttcompress.records.common import Json

BATCHES = (1, 5)
"""Sizes at which onnxruntime is compared with torch."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Largest difference, over the largest output, by its type."""
LARGEST = 2_000_000_000
"""Bytes of tensors: a protobuf message ends at 2 GiB."""


@dataclass(frozen=True)
class Exported:
    """What was written: `input_shape` is without the batch, `difference` is None where onnxruntime is missing.

    Of texts the length is free like the batch; `input_shape` is what it was tried with, among others.
    """

    file: str
    file_bytes: int
    tensor_bytes: int
    opset: int
    dtype: str
    input_shape: tuple[int, ...]
    operators: Mapping[str, int]
    difference: float | None
    inputs: tuple[str, ...] = ("input",)
    output: str = "output"

    def to_json(self) -> Json:
        """As `--json` prints it."""
        return {
            **vars(self),
            "input_shape": list(self.input_shape),
            "operators": dict(self.operators),
            "inputs": list(self.inputs),
        }


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
    """Write a compressed file or a dense checkpoint as one ONNX file with a free batch axis, and a free length of texts.

    Args:
        input_size: of one input, without the batch, or tokens of a text; by default what the file records or the architecture is known for.
        layers: `plain` to write the network in stock layers, `tt` as it is loaded.

    Raises:
        ExportError: packages are missing, the input size is unknown, the network does not export, or differs there.
        TTCompressError: a file that cannot be read or written, an input that the network does not take.
    """
    check_installed()
    check_output(output, force, source=source)
    network = open_any(source, arch, key or "")
    example, shape = example_of(source, network, input_size)
    opened = network.model
    if layers == "plain":
        opened = plain_network(opened, example)
    model = computable(opened)
    stored = tensor_bytes(stored_tensors(model, network.tensors))
    if stored > LARGEST:
        raise ExportError(
            f"{source}: has {stored:,} bytes of tensors; an ONNX file holds {LARGEST:,} at most"
        )
    inputs = _inputs(model, network.reader, shape)
    name = output_name(model, inputs[0])
    if network.reader is None and name == "":
        # Says that it is no tensor, and what it is.
        forward(model, inputs[0])
    with torch.inference_mode():
        wanted = [finite(answer_of(call(model, x), name)) for x in inputs]
    program = program_of(model, inputs[-1])
    counts = operators(program.model)
    if network.preprocessing:
        program.model.metadata_props["preprocessing"] = canonical_json(network.preprocessing.to_json())
    with replacing(output) as temporary:
        write_program(program, temporary)
        difference = _difference(temporary, inputs, wanted)
    dtype = str(tensors_of(inputs[0])[0].dtype).removeprefix("torch.")
    names = tuple(inputs[0]) if network.reader is not None else ("input",)
    return Exported(
        *(output.name, output.stat().st_size, stored, OPSET, dtype, shape, counts, difference),
        inputs=names,
        output=name or "output",
    )


def _inputs(model: nn.Module, reader: Reader | None, shape: Sequence[int]) -> list[Any]:
    """Batches to compare by: of several sizes, and for texts of several lengths, some masked in part."""
    if reader is None:
        return [_random(batch, shape, input_dtype(model)) for batch in BATCHES]
    lengths = sorted({max(2, shape[0] // 3), min(shape[0] + 5, reader.longest), shape[0]})
    examples = [text_example(model, reader, length) for length in lengths]
    batches = [example.batch(model, batch) for example in examples for batch in BATCHES]
    masked = half_masked(examples[0].batch(model, BATCHES[-1]))
    return [*batches, masked, examples[-1].batch(model, BATCHES[-1])]


def _random(batch: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return made_up(torch.randn, (batch, *shape), generator=torch.Generator().manual_seed(batch)).to(dtype)


def _difference(path: Path, inputs: Sequence[Any], wanted: Sequence[Tensor]) -> float | None:
    """Of onnxruntime from torch, the largest over the largest output; None where onnxruntime is not installed.

    Raises:
        ExportError: it does not run the file, or the difference is beyond the tolerance.
    """
    if not has_onnxruntime():
        return None
    found = _run(path, inputs)
    differences = [_relative(one, other) for one, other in zip(found, wanted, strict=True)]
    # Unlike Python's, torch's maximum keeps NaN, and the comparison is written so that it fails.
    difference, most = float(torch.tensor(differences).max()), TOLERANCE[wanted[0].dtype]
    if not difference <= most:
        raise ExportError(
            f"onnxruntime differs from torch by {difference:.2g} of the largest output, more than {most:g}"
        )
    return difference


def _run(path: Path, inputs: Sequence[Any]) -> list[Tensor]:
    session = Session(path)
    return [session.run(x) for x in inputs]


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ExportError(f"onnxruntime returns {tuple(found.shape)}, torch {tuple(wanted.shape)}")
    scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    return float((found.double() - wanted.double()).abs().max() / scale.double())
