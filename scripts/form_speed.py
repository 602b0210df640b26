"""How well the cost model knows which forms are slow: python -m scripts.form_speed [--rounds N]

A training step of single layers run by their cores, with 1 and 32 inputs: time over that of the dense layer, as measured
and as the model has it. One thread, channels_last, by turns in one process, CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.spec import layer_spec
from ttcompress.tt.cost import Calls, LayerCosts
from ttcompress.tt.shapes import feasible_ranks, tensorize_shape

SHORTEST = 0.02
"""Seconds that a measurement takes at least."""
SIDE = 14
"""Of the images that convolutions get."""
FORMS = (
    ((1024, 1024), "lowrank", (64, 256, 400)),
    ((1024, 1024), "matrix", (32, 128)),
    ((256, 256, 3, 3), "chain", (96, 160, 208)),
    ((256, 256, 3, 3), "lowrank", (160,)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print("| layer | form, rank | batch 1, measured / model | batch 32 |\n|---|---|---|---|")
    for shape, name, ranks in FORMS:
        for rank in ranks:
            found = [compared(shape, name, rank, batch, arguments.rounds) for batch in (1, 32)]
            cells = " | ".join(f"{measured:.2f} / {model:.2f}" for measured, model in found)
            print(f"| {' x '.join(map(str, shape))} | `{name}` {rank} | {cells} |", flush=True)


def compared(shape: tuple[int, ...], name: str, rank: int, batch: int, rounds: int) -> tuple[float, float]:
    """Time of a step over that of the dense layer, measured and by the model."""
    dense, x = dense_layer(shape), inputs(shape, batch)
    spec, view = layer_spec(dense), tensorize_shape(name, shape)
    tt_ranks = feasible_ranks(view.sizes, view.expand_ranks(rank))
    layer = tt_layer(spec)(spec, view, tt_ranks)  # type: ignore[arg-type]
    layer.execution = layer.executions[1]

    ratios = []
    for _ in range(rounds):
        theirs = seconds(lambda: step(dense, x))
        ratios.append(seconds(lambda: step(layer, x)) / theirs)
    positions = batch * (SIDE * SIDE if len(shape) > 2 else 1)
    costs = LayerCosts(shape, Calls(positions, positions))
    return median(ratios), costs.step_ratio(view, tt_ranks, training=True)


def dense_layer(shape: tuple[int, ...]) -> nn.Linear | nn.Conv2d:
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0])
    made = nn.Conv2d(shape[1], shape[0], shape[2], padding=shape[2] // 2)
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def inputs(shape: tuple[int, ...], batch: int) -> Tensor:
    if len(shape) == 2:
        return torch.randn(batch, shape[1], requires_grad=True)
    images = torch.randn(batch, shape[1], SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    return images.requires_grad_()


def step(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def seconds(run: Callable[[], None]) -> float:
    run()
    start, count = time.process_time(), 0
    while time.process_time() - start < SHORTEST:
        run()
        count += 1
    return (time.process_time() - start) / count


if __name__ == "__main__":
    main()
