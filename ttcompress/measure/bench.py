"""Time and memory of a compressed network against its dense one, both at their best, by turns in one process."""

from __future__ import annotations

import stat
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ttcompress.errors import PlanError
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import read_metadata
from ttcompress.files.output import writing_alone
from ttcompress.files.writing import write_safetensors
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.measure.multiply_adds import multiply_adds
from ttcompress.measure.timing import NOISE, at_its_best, by_turns, device_name, input_of, runner
from ttcompress.networks.held import copied
from ttcompress.networks.opening import input_shape, open_any
from ttcompress.networks.running import Example, blaming, forward, input_dtype
from ttcompress.networks.surgery import expand_layers
from ttcompress.records.common import Json, Progress


def bench_file(
    source: Path,
    *,
    arch: str | None = None,
    input_size: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    device: torch.device | None = None,
    training: bool = False,
    progress: Progress | None = None,
) -> Json:
    """Measure a compressed file: the network and each of its compressed layers, dense against compressed.

    Both sides run in the memory format that is faster for them, on random inputs.

    Raises:
        PlanError: batch sizes below 1, or a file without compressed layers.
        TTCompressError: a file that cannot be read, or whose input size is neither recorded nor given.
    """
    if min(batch_sizes) < 1:
        raise PlanError("--batch-sizes takes numbers from 1 on")
    where = device or torch.device("cpu")
    network = open_any(source, arch)
    shape = input_shape(source, network, input_size)
    compressed = network.model.to(where).train(training)
    names = [name for name, module in compressed.named_modules() if isinstance(module, TTLinear | TTConv2d)]
    if not names:
        raise PlanError(f"{source}: holds no compressed layers")
    # Cores may be stored in a narrower type than the network computes in; dense weights may not.
    dense = expand_layers(copied(compressed)).to(input_dtype(compressed))
    entries = []
    for number, batch in enumerate(batch_sizes):
        if progress:
            progress(f"batch size {batch}", number, len(batch_sizes))
        images = Example(shape).batch(dense, batch)
        with blaming(f"a batch of {batch} inputs of shape {shape}"):
            entries.append(_compare(dense, compressed, images, names, training))
    return {
        "file": source.name,
        "device": device_name(where),
        "torch": torch.__version__,
        "dtype": str(input_dtype(dense)).removeprefix("torch."),
        "input_size": list(shape),
        "what": "training step" if training else "inference",
        "batches": entries,
    }


def save_bench(source: Path, result: Json) -> None:
    """Write the figures into the report of the file that was measured, where a link leads to, for whom it was."""
    file = source.resolve()
    with writing_alone(file):
        metadata = read_metadata(file)
        mode = stat.S_IMODE(file.stat().st_mode)
        write_safetensors(file, load_compressed(file), {**metadata, "bench": result}, mode)


def is_slower(result: Json) -> bool:
    """Whether the compressed network takes longer at some batch size, by more than noise."""
    return any(entry["time_ratio"] > NOISE for entry in result["batches"])


def _compare(
    dense: nn.Module, compressed: nn.Module, images: Tensor, names: Sequence[str], training: bool
) -> Json:
    models = {"dense": dense, "compressed": compressed}
    with torch.no_grad():
        forward(compressed, images)
    inputs, formats = {}, {}
    for side, model in models.items():
        inputs[side], formats[side] = at_its_best(model, images, training)
    runs = [runner(models[side], inputs[side], training) for side in models]
    timings = by_turns(runs[0], runs[1], images.device)
    entry: Json = {"batch": len(images), "time_ratio": timings.ratio}
    for side, model in models.items():
        seconds = getattr(timings, side)
        entry[side] = {
            "median": median(seconds),
            "p90": quantiles(seconds, n=10)[-1],
            "throughput": len(images) / median(seconds),
            "memory_format": formats[side],
            "multiply_adds": multiply_adds(model, inputs[side]),
            "peak_memory": None if training else peak_memory(model, inputs[side]),
        }
    if not training:
        entry["memory_ratio"] = entry["compressed"]["peak_memory"] / entry["dense"]["peak_memory"]
    entry["layers"] = [_compare_layers(models, inputs, name, training) for name in names]
    return entry


def _compare_layers(
    models: dict[str, nn.Module], inputs: dict[str, Tensor], name: str, training: bool
) -> Json:
    layers = {side: model.get_submodule(name) for side, model in models.items()}
    received = {side: input_of(models[side], layers[side], inputs[side]) for side in models}
    runs = [runner(layers[side], received[side], training) for side in models]
    timings = by_turns(runs[0], runs[1], received["dense"].device, 1 / 10)
    return {
        "fqn": name,
        "dense": median(timings.dense),
        "compressed": median(timings.compressed),
        "time_ratio": timings.ratio,
        "multiply_adds": {side: multiply_adds(layers[side], received[side]) for side in models},
    }


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of weights, of what layers keep, and of the tensors of a forward pass that are alive together."""
    with torch.no_grad():
        model(images)
    held = [
        *model.parameters(),
        *model.buffers(),
        *(tensor for layer in model.modules() for tensor in _cached(layer)),
    ]
    fixed = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    if images.device.type == "cuda":
        # The other network, which is there too, does not count.
        before = torch.cuda.memory_allocated(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        with torch.no_grad():
            model(images)
        return sum(fixed.values()) + int(torch.cuda.max_memory_allocated(images.device)) - before
    with torch.no_grad(), _LiveTensors({*fixed, images.untyped_storage().data_ptr()}) as live:
        model(images)
    return sum(fixed.values()) + int(live.peak)


def _cached(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.cached_tensors() if isinstance(layer, TTLinear | TTConv2d) else ()


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that results of operators take together; what they use inside is not seen."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._known = known
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and follow its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self._follow(tensor)
        self.peak = max(self.peak, self._bytes)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._known:
            return
        if not self._alive.get(key):
            self._bytes += storage.nbytes()
        self._alive[key] = self._alive.get(key, 0) + 1
        weakref.finalize(tensor, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._alive[key] -= 1
        if not self._alive[key]:
            self._bytes -= size
