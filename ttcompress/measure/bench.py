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
from ttcompress.files.shards import resolve
from ttcompress.files.writing import write_safetensors
from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.measure.multiply_adds import multiply_adds
from ttcompress.measure.plain_forms import fastest
from ttcompress.measure.runtimes import check_runtime, made_ready
from ttcompress.measure.timing import NOISE, Received, by_turns, device_name, received_by, runner
from ttcompress.networks.held import copied
from ttcompress.networks.opening import example_of, open_any
from ttcompress.networks.plain import plain_network
from ttcompress.networks.running import (
    NetworkInput,
    batch_size,
    blaming,
    call,
    input_dtype,
    run,
    tensors_of,
)
from ttcompress.networks.surgery import expand_layers
from ttcompress.networks.weights import tt_parts
from ttcompress.records.common import Json, Progress


def bench_file(
    source: Path,
    *,
    arch: str | None = None,
    input_size: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    device: torch.device | None = None,
    training: bool = False,
    runtime: str = "torch",
    layers: str | None = None,
    tune: bool = False,
    with_layers: bool = True,
    progress: Progress | None = None,
) -> Json:
    """Measure a compressed file: the network and each of its compressed layers, dense against compressed.

    Both sides run in the memory format that is faster for them, on random inputs. Inference is of the network in stock
    layers, as `to_plain` makes it for the batch size, unless `layers` says otherwise; training is of the TT layers.

    Args:
        runtime: `torch`, `compile`, `onnx` or `onnx-int8`; layers by themselves are timed in torch only.
        layers: `tt` or `plain`.
        tune: choose the forms of stock layers by measurement.
        with_layers: measure each compressed layer, too.

    Raises:
        PlanError: batch sizes below 1, a file without compressed layers, or a runtime that does not do what is asked.
        TTCompressError: a file that cannot be read, or whose input size is neither recorded nor given.
    """
    if min(batch_sizes) < 1:
        raise PlanError("--batch-sizes takes numbers from 1 on")
    where = device or torch.device("cpu")
    check_runtime(runtime, where, training)
    as_layers = layers or ("tt" if training else "plain")
    network = open_any(source, arch)
    example, shape = example_of(source, network, input_size)
    compressed = network.model.to(where).train(training)
    parts = tt_parts(compressed)
    # What is rebuilt has no calls of its own to be timed.
    names = [name for name, part in parts.items() if isinstance(part, TTLayer)]
    if not parts:
        raise PlanError(f"{source}: holds no compressed layers")
    # Cores may be stored in a narrower type than the network computes in; dense weights may not.
    dense = expand_layers(copied(compressed)).to(input_dtype(compressed))
    entries = []
    for number, batch in enumerate(batch_sizes):
        if progress:
            progress(f"batch size {batch}", number, len(batch_sizes))
        images = example.batch(dense, batch)
        with blaming(f"a batch of {batch} inputs of shape {shape}"):
            ours = compressed
            if as_layers == "plain":
                ours = plain_network(copied(compressed), example, batch, fastest if tune else None)
            with torch.no_grad():
                call(ours, images)
            measured = _Measured({"dense": dense, "compressed": ours}, images, training, runtime)
            entries.append(measured.entry(names if with_layers else ()))
    return {
        "file": source.name,
        "device": device_name(where),
        "torch": torch.__version__,
        "dtype": str(input_dtype(dense)).removeprefix("torch."),
        "input_size": list(shape),
        "what": "training step" if training else "inference",
        "runtime": runtime,
        "layers": as_layers,
        "batches": entries,
    }


def save_bench(source: Path, result: Json) -> None:
    """Write the figures into the report of the file that was measured, where a link leads to, for whom it was."""
    file = resolve(source).resolve()
    with writing_alone(file):
        metadata = read_metadata(file)
        mode = stat.S_IMODE(file.stat().st_mode)
        write_safetensors(file, load_compressed(file), {**metadata, "bench": result}, mode)


def is_slower(result: Json) -> bool:
    """Whether the compressed network takes longer at some batch size, by more than noise."""
    return any(entry["time_ratio"] > NOISE for entry in result["batches"])


class _Measured:
    """Both networks on one batch in one runtime."""

    def __init__(self, models: dict[str, nn.Module], images: Any, training: bool, runtime: str) -> None:
        self._models, self._training, self._runtime = models, training, runtime
        self._device = tensors_of(images)[0].device
        self._batch = batch_size(images)
        self._ready = {side: made_ready(runtime, model, images, training) for side, model in models.items()}

    def entry(self, names: Sequence[str]) -> Json:
        """What is reported of the networks and of the layers of these names."""
        dense, compressed = self._ready["dense"], self._ready["compressed"]
        timings = by_turns(dense.run, compressed.run, self._device)
        found: Json = {"batch": self._batch, "time_ratio": timings.ratio}
        for side in self._models:
            found[side] = self._side(side, getattr(timings, side))

        peaks = [found[side]["peak_memory"] for side in ("dense", "compressed")]
        if None not in peaks:
            found["memory_ratio"] = peaks[1] / peaks[0]
        in_torch = self._runtime == "torch"
        found["layers"] = list(self._layers(names)) if in_torch else []
        return found

    def _side(self, side: str, seconds: Sequence[float]) -> Json:
        model, ready = self._models[side], self._ready[side]
        is_seen = self._runtime == "torch" and not self._training
        return {
            "median": median(seconds),
            "p90": quantiles(seconds, n=10)[-1],
            "throughput": self._batch / median(seconds),
            "memory_format": ready.memory_format,
            "multiply_adds": multiply_adds(model, ready.images),
            "peak_memory": peak_memory(model, ready.images) if is_seen else None,
            "file_bytes": ready.file_bytes,
        }

    def _layers(self, names: Sequence[str]) -> Iterator[Json]:
        received = {
            side: received_by(model, names, self._ready[side].images) for side, model in self._models.items()
        }
        for name in names:
            # One that does not run, as heads for training alone do not, takes no time.
            if all(name in of_side for of_side in received.values()):
                yield self._layer(name, {side: _made_up(received[side][name]) for side in received})

    def _layer(self, name: str, received: dict[str, Tensor]) -> Json:
        models = self._models
        layers = {side: model.get_submodule(name) for side, model in models.items()}
        runs = [runner(layers[side], received[side], self._training) for side in models]
        timings = by_turns(runs[0], runs[1], self._device, 1 / 10)
        return {
            "fqn": name,
            "dense": median(timings.dense),
            "compressed": median(timings.compressed),
            "time_ratio": timings.ratio,
            "multiply_adds": {side: multiply_adds(layers[side], received[side]) for side in models},
        }


def _made_up(received: Tensor | Received) -> Tensor:
    return received.made_up() if isinstance(received, Received) else received


def peak_memory(model: nn.Module, images: NetworkInput) -> int:
    """Bytes of weights, of what layers keep, and of the tensors of a forward pass that are alive together."""
    with torch.no_grad():
        run(model, images)
    held = [
        *model.parameters(),
        *model.buffers(),
        *(tensor for layer in model.modules() for tensor in _cached(layer)),
    ]
    fixed = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    given = tensors_of(images)
    device = given[0].device
    if device.type == "cuda":
        # The other network, which is there too, does not count.
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            run(model, images)
        return sum(fixed.values()) + int(torch.cuda.max_memory_allocated(device)) - before
    known = {*fixed, *(each.untyped_storage().data_ptr() for each in given)}
    with torch.no_grad(), _LiveTensors(known) as live:
        run(model, images)
    return sum(fixed.values()) + int(live.peak)


def _cached(layer: nn.Module) -> Iterator[Tensor]:
    yield from layer.cached_tensors() if isinstance(layer, TTLayer | TTWeight) else ()


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
