"""Time of networks and layers: by turns in one process, each in the memory format that is faster for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.networks.running import NetworkInput, run

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NOISE = 1.05
"""Ratios of time up to this one do not count as slower."""
SECONDS = 6.0
"""About as long is each network timed at each batch size."""
ROUNDS = 7, 60
SHARE = 0.05
"""Of that time, to find the memory format that is faster."""
LEAST_TRIES = 3
"""Of each memory format, however long one takes."""
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


def input_of(model: nn.Module, layer: nn.Module, images: NetworkInput) -> Any:
    """What a layer receives in the network."""
    received: list[Tensor] = []

    def remember(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = given[0] if given else named["input"]
        received.append(x.detach().clone())

    with layer.register_forward_pre_hook(remember, with_kwargs=True), torch.no_grad():
        run(model, images)
    if not received:
        return images
    return received[0]


@dataclass(frozen=True)
class Received:
    """What a layer receives in a network, without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made_up(self) -> Tensor:
        """Random numbers in that memory format; time does not depend on values."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.normal_()


def received_by(model: nn.Module, names: Sequence[str], images: NetworkInput) -> dict[str, Tensor | Received]:
    """What each of these layers receives, in one pass; whole numbers are held, as they may be indices.

    Layers that do not run are left out.
    """
    found: dict[str, Tensor | Received] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = given[0] if given else named["input"]
            is_real = x.is_floating_point()
            found[name] = Received(x.shape, x.stride(), x.dtype, x.device) if is_real else x.detach().clone()

        return hook

    layers = [model.get_submodule(name) for name in names]
    hooks = [
        layer.register_forward_pre_hook(remember(name), with_kwargs=True)
        for name, layer in zip(names, layers, strict=True)
    ]
    try:
        with torch.no_grad():
            run(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def runner(module: nn.Module, x: NetworkInput, training: bool) -> Run:
    """A forward pass, or one with its backward pass."""

    @torch.inference_mode()
    def infer() -> None:
        run(module, x)

    def step() -> None:
        module.zero_grad()
        y = run(module, x)
        y.backward(torch.ones_like(y))

    return step if training else infer


def at_its_best(model: nn.Module, images: NetworkInput, training: bool = False) -> tuple[Any, str]:
    """Bring a network into the memory format that is faster for it; the images in that format, and its name."""
    name = _faster_format(model, images, training)
    _set_format(model, name)
    return _formatted(images, name), name


def _faster_format(model: nn.Module, images: NetworkInput, training: bool) -> str:
    """By turns, so that a slow moment of the machine does not decide."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        return "contiguous"
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    start = time.perf_counter()
    while len(seconds["contiguous"]) < LEAST_TRIES or time.perf_counter() - start < SHARE * SECONDS:
        for name in FORMATS:
            _set_format(model, name)
            once = runner(model, _formatted(images, name), training)
            once()
            seconds[name].append(_seconds_of(once, images.device))
    return min(seconds, key=lambda name: median(seconds[name]))


def _set_format(model: nn.Module, name: str) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=FORMATS[name])


def _formatted(images: NetworkInput, name: str) -> NetworkInput:
    if not isinstance(images, Tensor) or images.dim() != 4:
        return images
    return images.contiguous(memory_format=FORMATS[name])


def by_turns(dense: Run, compressed: Run, device: torch.device, share: float = 1.0) -> Timings:
    """As many rounds as fit into this share of SECONDS, after one that does not count."""
    for once in (dense, compressed):
        once()
    first = _seconds_of(dense, device) + _seconds_of(compressed, device)
    least, most = ROUNDS
    rounds = max(least, min(most, int(share * SECONDS / max(first, 1e-6))))
    seconds: dict[Run, list[float]] = {dense: [], compressed: []}
    for number in range(rounds):
        # Each is the first one as often as the other: what comes back in a rhythm meets both.
        order = (dense, compressed) if number % 2 else (compressed, dense)
        for once in order:
            seconds[once].append(_seconds_of(once, device))
    return Timings(seconds[dense], seconds[compressed])


def device_name(device: torch.device) -> str:
    """As results name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _seconds_of(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        # Of several GPUs this one, whichever is the current one.
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record(stream)
        run()
        end.record(stream)
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000
    # On one thread the time of this process alone: what others do on the machine then does not count.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin
