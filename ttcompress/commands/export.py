"""Networks as ONNX files: standard operators, weights still as cores, compared with torch before the file is there."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import ExportError, shortlist
from ttcompress.files.header import canonical_json
from ttcompress.files.output import alone, check_output, replacing
from ttcompress.files.tensors import tensor_bytes
from ttcompress.networks.opening import input_shape, open_any
from ttcompress.networks.running import forward, input_dtype, made_up
from ttcompress.networks.stored import stored_tensors
from ttcompress.records.common import Json

OPSET = 18
"""What torch's exporter writes without converting; any runtime since 2023 reads it."""
BATCHES = (1, 5)
"""Sizes at which onnxruntime is compared with torch."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Largest difference, over the largest output, by type of the input; networks of other types become float32."""
LARGEST = 2_000_000_000
"""Bytes of tensors: a protobuf message ends at 2 GiB."""
SMALL = 1024
"""Bytes of a constant, such as a shape, whose size does not matter."""


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
    force: bool = False,
) -> Exported:
    """Write a compressed file or a dense checkpoint as one ONNX file with a free batch axis.

    Args:
        input_size: of one input, without the batch; by default what the file records or the architecture is known for.

    Raises:
        ExportError: packages are missing, the input size is unknown, the network does not export, or differs there.
        TTCompressError: a file that cannot be read or written, an input that the network does not take.
    """
    _check_installed()
    check_output(output, force, source=source)
    network = open_any(source, arch, key or "")
    shape = input_shape(source, network, input_size)
    model = _computable(network.model)
    stored = tensor_bytes(stored_tensors(model, network.tensors))
    if stored > LARGEST:
        raise ExportError(
            f"{source}: has {stored:,} bytes of tensors; an ONNX file holds {LARGEST:,} at most"
        )
    inputs = [_random(batch, shape, input_dtype(model)) for batch in BATCHES]
    with torch.inference_mode():
        wanted = [forward(model, x) for x in inputs]
    program = _program(model, inputs[-1])
    operators = _operators(program.model)
    if network.preprocessing:
        program.model.metadata_props["preprocessing"] = canonical_json(network.preprocessing.to_json())
    with replacing(output) as temporary:
        _write(program, temporary)
        difference = _difference(temporary, inputs, wanted)
    dtype = str(input_dtype(model)).removeprefix("torch.")
    return Exported(output.name, output.stat().st_size, stored, OPSET, dtype, shape, operators, difference)


def _check_installed() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {' and '.join(missing)}: pip install 'ttcompress[onnx]'")


def _computable(model: nn.Module) -> nn.Module:
    """The network in a type that runtimes have all operators for: onnxruntime lacks the others' convolutions."""
    return model if input_dtype(model) in TOLERANCE else model.float()


def _random(batch: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return made_up(torch.randn, (batch, *shape), generator=torch.Generator().manual_seed(batch)).to(dtype)


def _program(model: nn.Module, sample: Tensor) -> Any:
    """The network as a torch.onnx.ONNXProgram, optimized but no larger than it has to be."""
    with torch.no_grad(), _silence():
        try:
            program: Any = torch.onnx.export(
                model,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                optimize=False,
                verbose=False,
            )
        except (Exception, SystemExit) as error:
            raise ExportError(f"torch cannot export the network: {_reason(error)}") from error
    _optimize(program.model)
    return program


@contextmanager
def _silence() -> Iterator[None]:
    """Without what torch's exporter prints, logs and warns on its way: of a failure that is hundreds of lines."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first line of what was wrong at first; the exporter puts what it tried around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = _first_line(error)
    name = type(error).__name__
    return line if name in line else f"{name}: {line}"


def _optimize(graph: Any) -> None:
    """Compute in advance what only depends on the weights, unless that makes the file larger; drop torch's notes.

    The notes hold paths of this machine.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize_ir

    optimize_ir(graph, should_fold=_is_worth_folding)
    ClearMetadataAndDocStringPass()(graph)


def _is_worth_folding(node: Any) -> bool | None:
    """Not where narrow cores would be stored wide, or several cores as one; None leaves it to the optimizer."""
    (result, *_) = node.outputs
    if result.shape is None or result.dtype is None or not result.shape.is_static():
        return None
    replaced = sum(
        value.const_value.nbytes for value in node.inputs if value is not None and len(value.uses()) == 1
    )
    return bool(prod(result.shape.numpy()) * result.dtype.itemsize <= max(replaced, SMALL))


def _operators(graph: Any) -> dict[str, int]:
    """How often each operator occurs, most frequent first.

    Raises:
        ExportError: one is not of the standard.
    """
    nodes = [*graph.graph.all_nodes(), *(node for function in graph.functions.values() for node in function)]
    foreign = sorted(
        {f"{node.domain}::{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")}
    )
    if foreign:
        raise ExportError(
            f"the network needs operators that are not of the ONNX standard: {shortlist(foreign)}"
        )
    return dict(Counter(sorted(node.op_type for node in nodes)).most_common())


def _write(program: Any, path: Path) -> None:
    """One file, without the shapes between operators: they can be inferred, and take a tenth of a small file.

    Raises:
        ExportError: what torch made is not valid.
    """
    import onnx

    proto = program.model_proto
    del proto.graph.value_info[:]
    onnx.save(proto, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported file is not valid ONNX: {_first_line(error)}") from error


def _difference(path: Path, inputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | None:
    """Of onnxruntime from torch, the largest over the largest output; None where onnxruntime is not installed.

    Raises:
        ExportError: it does not run the file, or the difference is beyond the tolerance.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    found = _run(path, inputs)
    differences = [_relative(one, other) for one, other in zip(found, wanted, strict=True)]
    # Unlike Python's, torch's maximum keeps NaN, and the comparison is written so that it fails.
    difference, most = float(torch.tensor(differences).max()), TOLERANCE[inputs[0].dtype]
    if not difference <= most:
        raise ExportError(
            f"onnxruntime differs from torch by {difference:.2g} of the largest output, more than {most:g}"
        )
    return difference


def _run(path: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run(None, {"input": x.numpy()})[0]) for x in inputs]
    except Exception as error:
        raise ExportError(f"onnxruntime does not run the exported network: {_first_line(error)}") from error


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ExportError(f"onnxruntime returns {tuple(found.shape)}, torch {tuple(wanted.shape)}")
    scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    return float((found.double() - wanted.double()).abs().max() / scale.double())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
