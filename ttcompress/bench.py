"""Time and memory of a compressed network against its dense one, both at their best, by turns in one process."""

from __future__ import annotations

import copy
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ttcompress.checkpoint import load_compressed, write_safetensors
from ttcompress.errors import PlanError
from ttcompress.evaluate import forward, input_dtype
from ttcompress.header import read_metadata
from ttcompress.layers import TTConv2d, TTLinear
from ttcompress.network import input_shape, open_any
from ttcompress.surgery import expand_layers
from ttcompress.types import Json, Progress

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NOISE = 1.05
"""Ratios of time up to this one do not count as slower."""
SECONDS = 6.0
"""About as long is each network timed at each batch size."""
ROUNDS = 7, 60
Run = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Seconds of the same number of rounds of a dense and a compressed side, taken by turns."""

    dense: Sequence[float]
    compressed: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median over the rounds of compressed / dense."""
        return median(ours / theirs for ours, theirs in zip(self.compressed, self.dense, strict=True))


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
    dense = expand_layers(copy.deepcopy(compressed)).to(input_dtype(compressed))
    entries = []
    for number, batch in enumerate(batch_sizes):
        if progress:
            progress(f"batch size {batch}", number, len(batch_sizes))
        images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(where, input_dtype(dense))
        entries.append(_compare(dense, compressed, images, names, training))
    return {
        "file": source.name,
        "device": torch.cuda.get_device_name(where)
        if where.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": str(input_dtype(dense)).removeprefix("torch."),
        "input_size": list(shape),
        "what": "training step" if training else "inference",
        "batches": entries,
    }


def save_bench(source: Path, result: Json) -> None:
    """Write the figures into the report of the file that was measured."""
    metadata = read_metadata(source)
    write_safetensors(source, load_compressed(source), {**metadata, "bench": result})


def is_slower(result: Json) -> bool:
    """Whether the compressed network takes longer at some batch size, by more than noise."""
    return any(entry["time_ratio"] > NOISE for entry in result["batches"])


def _compare(dense: nn.Module, compressed: nn.Module, images: Tensor, names: Sequence[str], training: bool) -> Json:
    models = {"dense": dense, "compressed": compressed}
    with torch.no_grad():
        forward(compressed, images)
    formats = {side: _faster_format(model, images, training) for side, model in models.items()}
    for side, model in models.items():
        _set_format(model, formats[side])
    inputs = {side: _formatted(images, formats[side]) for side in models}
    runs = [_run(models[side], inputs[side], training) for side in models]
    timings = _by_turns(runs[0], runs[1], images.device)
    entry: Json = {"batch": len(images), "time_ratio": timings.ratio}
    for side, model in models.items():
        seconds = getattr(timings, side)
        entry[side] = {
            "median": median(seconds),
            "p90": quantiles(seconds, n=10)[-1],
            "throughput": len(images) / median(seconds),
            "memory_format": formats[side],
            "multiply_adds": _multiply_adds(model, inputs[side]),
            "peak_memory": None if training else _peak_memory(model, inputs[side]),
        }
    if not training:
        entry["memory_ratio"] = entry["compressed"]["peak_memory"] / entry["dense"]["peak_memory"]
    entry["layers"] = [_compare_layers(models, inputs, name, training) for name in names]
    return entry


def _compare_layers(models: dict[str, nn.Module], inputs: dict[str, Tensor], name: str, training: bool) -> Json:
    layers = {side: model.get_submodule(name) for side, model in models.items()}
    received = {side: _input_of(models[side], layers[side], inputs[side]) for side in models}
    runs = [_run(layers[side], received[side], training) for side in models]
    timings = _by_turns(runs[0], runs[1], received["dense"].device, SECONDS / 10)
    return {
        "fqn": name,
        "dense": median(timings.dense),
        "compressed": median(timings.compressed),
        "time_ratio": timings.ratio,
        "multiply_adds": {side: _multiply_adds(layers[side], received[side]) for side in models},
    }


def _input_of(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer receives in the network."""
    received: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: received.append(given[0].detach().clone()))
    with handle, torch.no_grad():
        model(images)
    if not received:
        return images
    return received[0]


def _run(module: nn.Module, x: Tensor, training: bool) -> Run:
    """A forward pass, or one with its backward pass."""

    @torch.inference_mode()
    def infer() -> None:
        module(x)

    def step() -> None:
        module.zero_grad()
        y = module(x)
        y.backward(torch.ones_like(y))

    return step if training else infer


def _faster_format(model: nn.Module, images: Tensor, training: bool) -> str:
    if images.dim() != 4:
        return "contiguous"
    seconds = {}
    for name in FORMATS:
        _set_format(model, name)
        run = _run(model, _formatted(images, name), training)
        run()
        seconds[name] = min(_seconds(run, images.device) for _ in range(3))
    return min(seconds, key=lambda name: seconds[name])


def _set_format(model: nn.Module, name: str) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=FORMATS[name])


def _formatted(images: Tensor, name: str) -> Tensor:
    return images.contiguous(memory_format=FORMATS[name]) if images.dim() == 4 else images


def _by_turns(dense: Run, compressed: Run, device: torch.device, seconds: float = SECONDS) -> Timings:
    """As many rounds as fit, after one that does not count."""
    for run in (dense, compressed):
        run()
    first = _seconds(dense, device) + _seconds(compressed, device)
    least, most = ROUNDS
    rounds = max(least, min(most, int(seconds / max(first, 1e-6))))
    pairs = [(_seconds(dense, device), _seconds(compressed, device)) for _ in range(rounds)]
    return Timings([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.no_grad()
def _multiply_adds(module: nn.Module, x: Tensor) -> int:
    # What layers keep is made in the first call and not counted.
    module(x)
    with FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops()) // 2


def _peak_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of weights, of what layers keep, and of the tensors of a forward pass that are alive together."""
    with torch.no_grad():
        model(images)
    held = [*model.parameters(), *model.buffers(), *(tensor for layer in model.modules() for tensor in _kept(layer))]
    fixed = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    if images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.device)
        with torch.no_grad():
            model(images)
        return int(torch.cuda.max_memory_allocated(images.device))
    with torch.no_grad(), _LiveTensors({*fixed, images.untyped_storage().data_ptr()}) as live:
        model(images)
    return sum(fixed.values()) + int(live.peak)


def _kept(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.kept_tensors() if isinstance(layer, TTLinear | TTConv2d) else ()


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
