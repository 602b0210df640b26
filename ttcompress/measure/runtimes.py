"""Networks made ready to be timed in a runtime: torch as it is, torch.compile, onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import ExportError, PlanError
from ttcompress.measure.timing import Run, at_its_best, runner
from ttcompress.networks.held import copied
from ttcompress.networks.onnx_files import (
    Session,
    check_installed,
    computable,
    has_onnxruntime,
    program_of,
    quantize_to_int8,
    write_program,
)
from ttcompress.networks.running import NetworkInput, batch_size, blaming, map_tensors, placed

IN_ONNXRUNTIME = ("onnx", "onnx-int8")


@dataclass(frozen=True)
class Ready:
    """A network with an input, ready to be timed."""

    run: Run
    memory_format: str
    images: Any
    """In that memory format."""
    file_bytes: int | None = None
    """Of the file that the runtime reads, if it reads one."""


def check_runtime(runtime: str, device: torch.device, training: bool) -> None:
    """See that a runtime is there and does what is asked for.

    Raises:
        PlanError: it does not.
        ExportError: packages are missing.
    """
    if runtime not in IN_ONNXRUNTIME:
        return
    if training or device.type != "cpu":
        what = "--training" if training else f"--device {device.type}"
        raise PlanError(f"--runtime {runtime} is for inference on the CPU; leave {what} out")
    check_installed()
    if not has_onnxruntime():
        raise ExportError("--runtime onnx needs onnxruntime: pip install 'ttcompress[onnx]'")


def made_ready(runtime: str, model: nn.Module, images: NetworkInput, training: bool) -> Ready:
    """A network at its best in a runtime: in the memory format that is faster for it, with torch's number of threads.

    Raises:
        TTCompressError: the runtime does not take it.
    """
    if runtime in IN_ONNXRUNTIME:
        return _in_onnxruntime(model, images, is_quantized=runtime == "onnx-int8")

    inputs, memory_format = at_its_best(model, images, training)
    if runtime == "torch":
        return Ready(runner(model, inputs, training), memory_format, inputs)

    with blaming("torch.compile does not take the network"):
        run = runner(torch.compile(copied(model), dynamic=False), inputs, training)  # type: ignore[arg-type]
        # It compiles at the first call, and once more for what it then knows.
        for _ in range(2):
            run()
    return Ready(run, memory_format, inputs)


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def _in_onnxruntime(model: nn.Module, images: NetworkInput, is_quantized: bool) -> Ready:
    model = computable(copied(model)).eval()
    dtype = next(model.parameters()).dtype
    x = map_tensors(Tensor.contiguous, placed(images, "cpu", dtype))
    # A batch of one would be taken for a size that is always one.
    sample = map_tensors(_twice, x) if batch_size(x) == 1 else x

    with TemporaryDirectory(prefix="ttcompress-bench-") as folder:
        path = Path(folder) / "network.onnx"
        write_program(program_of(model, sample), path)
        if is_quantized:
            path, floating = path.with_name("int8.onnx"), path
            quantize_to_int8(floating, path)
        session = Session(path, torch.get_num_threads())
        size = path.stat().st_size

    return Ready(lambda: session.run(x), "contiguous", x, size)
