"""Training steps by turns: python scripts/training_speed.py NETWORK... [--batch-size N] [--compile] [--teacher]

A NETWORK is a compressed file whose architecture is known by name, a recipe (.toml) of `finetune --from-scratch`, or the
name of an architecture, which then has no compressed side. Every way to train takes steps by turns on one CPU thread:
both memory formats in float32, bfloat16 autocast in channels_last and, where asked for, that through torch.compile. A
step is what `finetune` does with a batch: forward, backward, clipping, decay, SGD; with --teacher the answers of the
dense network too. Printed are medians of CPU time, which other processes disturb less than wall time, and medians over
the rounds of ratios: bfloat16 over the better format of float32, and each step over the dense network's in the same
precision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import ttcompress
from ttcompress.commands.starting_point import start_from_scratch
from ttcompress.commands.training import frozen
from ttcompress.data.training_batches import LoaderBatches
from ttcompress.files.header import read_metadata
from ttcompress.networks.opening import initialise, open_fresh
from ttcompress.processes import World
from ttcompress.recipe import Recipe
from ttcompress.settings import Settings
from ttcompress.train.optimize import make_optimizer, tt_layers, update
from ttcompress.train.options import TrainingOptions
from ttcompress.train.precision import lay_out
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State
from ttcompress.train.step import backward

CPU = torch.device("cpu")
WARM_UP = 2


@dataclass(frozen=True)
class Way:
    """One way to take a training step."""

    precision: str
    channels_last: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.precision}, {'compiled' if self.compiled else MEMORY_FORMATS[self.channels_last]}"


MEMORY_FORMATS = {False: "contiguous", True: "channels_last"}
WAYS = (Way("float32", False), Way("float32", True), Way("bfloat16", True))
COMPILED = Way("bfloat16", True, compiled=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32, help="height and width of an image")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="bfloat16 through torch.compile too")
    parser.add_argument("--teacher", action="store_true", help="with the answers of the dense network")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    ways = [*WAYS, COMPILED] if arguments.compile else [*WAYS]
    ratios = ["bfloat16 / float32", *(["compiled / float32"] if arguments.compile else [])]
    over_dense = ["over dense, float32", "over dense, bfloat16"]
    heads = ["network", "batch", *(f"{way.name}, s" for way in ways), *ratios, *over_dense]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    for network in arguments.networks:
        for row in rows(network, ways, arguments):
            print("| " + " | ".join(row) + " |", flush=True)


def rows(network: str, ways: Sequence[Way], arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The dense network, and the compressed one where there is one."""
    forms = [form for form in ("dense", "compressed") if opened(network, form) is not None]
    steps = {(form, way): Training(network, form, way, arguments) for form in forms for way in ways}
    times: dict[tuple[str, Way], list[float]] = {each: [] for each in steps}
    for at in range(arguments.rounds + WARM_UP):
        for each, step in steps.items():
            seconds = step.seconds()
            if at >= WARM_UP:
                times[each].append(seconds)

    dense = best_float32(times, "dense"), times["dense", WAYS[-1]]
    for form in forms:
        plain = best_float32(times, form)
        narrow = [times[form, way] for way in ways[2:]]
        cells = [f"{median(times[form, way]):.3f}" for way in ways]
        cells += [f"{ratio(each, plain):.2f}" for each in narrow]
        cells += [
            f"{ratio(ours, theirs):.2f}" for ours, theirs in zip((plain, narrow[0]), dense, strict=True)
        ]
        yield [f"{Path(network).stem} {form}", str(arguments.batch_size), *cells]


def best_float32(times: dict[tuple[str, Way], list[float]], form: str) -> list[float]:
    return min((times[form, way] for way in WAYS[:2]), key=median)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


class Training:
    """A network in training, whose steps can be timed."""

    def __init__(self, network: str, form: str, way: Way, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model: Any = opened(network, form)
        teacher: Any = frozen(opened(network, "dense"), CPU) if arguments.teacher else None  # type: ignore[arg-type]
        self.options = TrainingOptions(
            epochs=30, lr=1e-3, precision=way.precision, channels_last=way.channels_last
        )
        lay_out(model.train(), self.options)

        size = arguments.batch_size
        self.images = torch.rand(size, 3, arguments.side, arguments.side)
        self.labels = torch.arange(size) % 10
        batches = LoaderBatches([(self.images, self.labels)], CPU)
        self.setup = TrainingSetup(batches, lambda _: 0.0, World(CPU), teacher)

        scaler = torch.amp.GradScaler("cpu", enabled=False)
        optimizer = make_optimizer(model, "sgd", self.options.lr, self.options.weight_decay)
        self.state = State(model, optimizer, scaler, None)
        self.layers = tt_layers(model)
        self.forward = torch.compile(model) if way.compiled else model
        if way.compiled and teacher is not None:
            teacher.compile()

    def seconds(self) -> float:
        """CPU time of a step."""
        start = time.process_time()
        backward(self.state, self.forward, self.options, self.setup, self.images, self.labels)
        optimizer, options = self.state.optimizer, self.options
        update(self.state.model, optimizer, self.layers, options.clip, options.weight_decay, optimizer.step)
        return time.process_time() - start


def opened(network: str, form: str) -> nn.Module | None:
    """The network in one form, in memory of its own; None where there is no compressed one."""
    path = Path(network)
    if path.suffix == ".toml":
        recipe = Recipe.from_toml(path).override(from_scratch=True)
        if form == "compressed":
            return start_from_scratch(Settings.of(recipe)).network.model
        network = str(recipe.arch)
    elif path.suffix == ".safetensors":
        if form == "compressed":
            return ttcompress.load(path)
        network = read_metadata(path)["architecture"]["name"]
    elif form == "compressed":
        return None

    model = open_fresh(network).model
    initialise(model)
    return model


if __name__ == "__main__":
    main()
