"""In which precision a training runs where that is left to `auto`: what a few timed steps show."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import inf

import torch
from torch import Tensor, nn

from ttcompress.processes import World
from ttcompress.train.options import TrainingOptions
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State
from ttcompress.train.step import backward

GAIN = 0.9
"""A step in bfloat16 takes at most this share of the time of one in float32, or the training stays in float32."""
SHORT = 30.0
"""Seconds: what float32 does in less is not worth its rounding, nor a choice by the clock."""
ROUNDS, LONGEST = 3, 60.0
"""So many steps of each are timed, fewer where they take longer together than so many seconds."""


def settled(options: TrainingOptions, precision: str, device: torch.device) -> TrainingOptions:
    """The options with the precision and the memory format that the training runs in."""
    channels_last = options.channels_last
    if channels_last is None:
        # Where convolutions run faster so (docs/finetune.md).
        channels_last = device.type == "cpu" or precision != "float32"
    return replace(options, precision=precision, channels_last=channels_last)


def lay_out(model: nn.Module, options: TrainingOptions) -> None:
    """Bring the parameters of a network into the memory format that settled options ask for, in place."""
    if not options.channels_last:
        return
    for parameter in _kernels(model):
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _kernels(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a memory format."""
    return [each for each in model.parameters() if each.dim() == 4]


def chosen_precision(state: State, options: TrainingOptions, setup: TrainingSetup) -> str:
    """The precision that is stated, or for `auto` the faster of float32 and bfloat16, the same in all processes.

    The steps that are timed leave the network, its running statistics and the random numbers as they are. Under
    `deterministic` nothing is timed, since time is not the same twice.
    """
    if options.precision != "auto":
        return options.precision
    if options.deterministic:
        return "float32"

    world, stream = setup.world, setup.stream
    # Each process times steps of its own, which exchange nothing.
    alone = replace(setup, world=World(world.device))
    with _untouched(state, world.device):
        images, labels = stream.sample
        steps = {
            name: partial(_step, state, settled(options, name, world.device), alone, images, labels)
            for name in ("float32", "bfloat16")
        }
        steps["float32"]()
        whole_training = steps["float32"]() * stream.steps * options.epochs
        if _mean(whole_training, world) < SHORT:
            return "float32"

        share = _mean(_share(steps["bfloat16"], steps["float32"]), world)
    return "bfloat16" if share <= GAIN else "float32"


def _step(
    state: State,
    options: TrainingOptions,
    setup: TrainingSetup,
    images: Tensor,
    labels: Tensor | None,
) -> float:
    """Seconds of the gradients of one batch; what follows them is the same in any precision."""
    kernels = [(each, each.data) for each in _kernels(state.model)]
    lay_out(state.model, options)
    setup.world.synchronize()
    begin = time.perf_counter()
    backward(state, state.model, options, setup, images, labels)
    setup.world.synchronize()
    seconds = time.perf_counter() - begin

    for parameter, values in kernels:
        parameter.data = values
    return seconds


def _share(ours: partial[float], theirs: partial[float]) -> float:
    """Time of one kind of steps over that of another, by turns; infinite where the first cannot be taken."""
    begin = time.perf_counter()
    pairs: list[tuple[float, float]] = []
    try:
        ours()
        while len(pairs) < ROUNDS and (not pairs or time.perf_counter() - begin < LONGEST):
            pairs.append((ours(), theirs()))
    except RuntimeError:
        # An operator that the device does not have in this type; float32 has been seen to run.
        return inf

    # What else the machine does makes steps slower only: the best of each are those least disturbed.
    our_times, their_times = zip(*pairs, strict=True)
    return float(min(our_times) / min(their_times))


def _mean(value: float, world: World) -> float:
    """Over all processes, so that all decide alike."""
    return float(world.total(torch.tensor(value, dtype=torch.float64, device=world.device))) / world.size


@contextmanager
def _untouched(state: State, device: torch.device) -> Iterator[None]:
    """Train the network within, and have it afterwards as it was before."""
    model = state.model
    before = {name: each.detach().clone() for name, each in model.named_buffers()}
    devices = [device] if device.type == "cuda" else []
    model.train()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        state.optimizer.zero_grad(set_to_none=True)
        _put_back(model, before)


@torch.no_grad()
def _put_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give buffers the values of before."""
    for name, now in model.named_buffers():
        then = before.get(name)
        # A table that grew with the input is right as it is now.
        if then is not None and then.shape == now.shape and not torch.equal(then, now):
            now.copy_(then)
