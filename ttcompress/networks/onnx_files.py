"""ONNX files of networks: standard operators only, written by torch's exporter, run by onnxruntime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import ExportError, shortlist
from ttcompress.networks.running import call, input_dtype
from ttcompress.networks.structures import tensors_by_name
from ttcompress.networks.text_examples import Answering, answer_of, output_name

OPSET = 18
"""What torch's exporter writes without converting; any runtime since 2023 reads it."""
DTYPES = (torch.float32, torch.float16)
"""Types that runtimes have all operators for; networks of other types become float32."""
SMALL = 1024
"""Bytes of a constant, such as a shape, whose size does not matter."""


def check_installed() -> None:
    """See that the packages are there that write ONNX files.

    Raises:
        ExportError: they are not.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export needs {' and '.join(missing)}: pip install 'ttcompress[onnx]'")


def has_onnxruntime() -> bool:
    """Whether files can be run."""
    return importlib.util.find_spec("onnxruntime") is not None


def computable(model: nn.Module) -> nn.Module:
    """The network in a type that runtimes have all operators for: onnxruntime lacks the others' convolutions."""
    return model if input_dtype(model) in DTYPES else model.float()


def program_of(model: nn.Module, sample: Tensor | Mapping[str, Tensor]) -> Any:
    """The network as a torch.onnx.ONNXProgram with a free batch axis, optimized but no larger than it has to be.

    Of a network that reads texts the inputs have their names and the length is free too; the output is what counts of
    what it returns, under its name.

    Raises:
        ExportError: torch cannot export it.
    """
    inputs = {"input": sample} if isinstance(sample, Tensor) else dict(sample)
    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    with torch.no_grad():
        names = list(returned(model, sample))
    if not isinstance(sample, Tensor):
        axes[1] = torch.export.Dim("sequence")
        model = Answering(model, output_name(model, sample))
    elif names != ["output"]:
        # What is no single tensor becomes a row of tensors, each under its name.
        model = _Flat(model).eval()
    with torch.no_grad(), _silence():
        try:
            program: Any = torch.onnx.export(
                model,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=names,
                dynamic_shapes=tuple(axes for _ in inputs),
                optimize=False,
                verbose=False,
            )
        except (Exception, SystemExit) as error:
            raise ExportError(f"torch cannot export the network: {_reason(error)}") from error
    _optimize(program.model)
    return program


def returned(model: nn.Module, sample: Any) -> dict[str, Tensor]:
    """What a file has of the output for a batch, by name: all tensors, but of a network that reads text what counts."""
    output = call(model, sample)
    if isinstance(sample, Tensor):
        return {name or "output": each for name, each in tensors_by_name(output).items()}
    name = output_name(model, sample)
    return {name or "output": answer_of(output, name)}


class _Flat(nn.Module):
    """A network of one input that returns all its tensors as a tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_by_name(self.network(x)).values())


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
    line = first_line(error)
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


def operators(graph: Any) -> dict[str, int]:
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


def write_program(program: Any, path: Path) -> None:
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
        raise ExportError(f"the exported file is not valid ONNX: {first_line(error)}") from error


class Session:
    """A file in onnxruntime, on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Load a file.

        Raises:
            ExportError: onnxruntime does not take it.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        with _blaming_runtime():
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, x: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs for a batch, in order.

        Raises:
            ExportError: onnxruntime fails.
        """
        inputs = {"input": x} if isinstance(x, Tensor) else x
        with _blaming_runtime():
            arrays = {name: each.numpy() for name, each in inputs.items()}
            return [torch.from_numpy(each) for each in self._session.run(None, arrays)]


@contextmanager
def _blaming_runtime() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ExportError(f"onnxruntime does not run the exported network: {first_line(error)}") from error


def quantize_to_int8(path: Path, output: Path) -> None:
    """Write a file whose products of matrices and convolutions are of int8, inputs being scaled as they come.

    Raises:
        ExportError: onnxruntime cannot.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _blaming_runtime(), _silence():
        # Of convolutions onnxruntime has the int8 kernel for unsigned inputs and weights alone.
        quantize_dynamic(path, output, weight_type=QuantType.QUInt8)


def first_line(error: BaseException) -> str:
    """Of what an error says, or its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
