"""What ranks on a grid cost and bring: python scripts/rank_grid.py [NETWORK ...]

The error of a plan with TT-ranks that are multiples of 8 over that of one without a grid at the same budget, of
networks of torchvision with random weights and of published checkpoints (FILE), and the time of single layers at
ranks off the grid over that at the next ranks on it. One thread, by turns in one process, CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
import torchvision
from torch import nn

from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.opening import open_dense
from ttcompress.planning.planner import Planner
from ttcompress.recipe import Recipe
from ttcompress.records.layers import ConvSpec, LayerSpec, LinearSpec
from ttcompress.records.plan import CompressionPlan
from ttcompress.tt.shapes import tensorize_shape

RATIOS = 1.5, 2.0, 3.0, 5.0
MULTIPLES: tuple[int | str, ...] = (8, "auto")
LAYERS: list[tuple[str, LayerSpec, tuple[int, ...], tuple[int, ...]]] = [
    ("lowrank 4096 -> 4096", LinearSpec(4096, 4096, bias=True), (455,), (456,)),
    ("lowrank 1024 -> 1024", LinearSpec(1024, 1024, bias=True), (125,), (128,)),
    ("chain 128 -> 128, 28 x 28", ConvSpec(128, 128, (3, 3), padding=(1, 1)), (45, 45), (48, 48)),
    ("chain 256 -> 256, 14 x 14", ConvSpec(256, 256, (3, 3), padding=(1, 1)), (93, 93), (96, 96)),
    ("chain 512 -> 512, 7 x 7", ConvSpec(512, 512, (3, 3), padding=(1, 1)), (187, 187), (192, 192)),
    ("lowrank 1024 -> 256, 1x1, 14 x 14", ConvSpec(1024, 256, (1, 1)), (93,), (96,)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["resnet50"])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print("| network | ratio | multiples of 8 | auto |\n|---|---|---|---|")
    for name in arguments.networks:
        for ratio, errors in errors_of(name):
            print(f"| {name} | {ratio:g} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)

    print("\n| layer | ranks | batch 1 | batch 32 |\n|---|---|---|---|")
    for name, spec, off, on in LAYERS:
        ratios = [time_off_grid(name, spec, (off, on), batch, arguments.rounds) for batch in (1, 32)]
        cells = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"| {name} | {off[0]} / {on[0]} | {cells} |", flush=True)


def errors_of(name: str) -> list[tuple[float, list[float]]]:
    """By ratio: the total error on each grid over that without one."""
    is_file = Path(name).is_file()
    model = open_dense(Path(name), None, "").model if is_file else getattr(torchvision.models, name)()
    # The spectra of the first planner serve the others.
    first = Planner(model, Recipe(ratio=2))
    known = first._spectra

    found = []
    for ratio in RATIOS:
        errors = []
        for multiple in (1, *MULTIPLES):
            recipe = Recipe(ratio=ratio, rank_multiple=multiple)
            planner = Planner(model, recipe)
            planner.results = lambda sizes, compute: known
            errors.append(total_error(model, planner.plan(recipe)))
        found.append((ratio, [error / errors[0] for error in errors[1:]]))
    return found


def total_error(model: nn.Module, plan: CompressionPlan) -> float:
    """The root of the sum of the squared errors that the plan predicts."""
    squares = 0.0
    for layer in plan.layers:
        norm = float(model.get_submodule(layer.fqn).weight.detach().norm())
        squares += (norm * (layer.predicted_error or 0.0)) ** 2
    return squares**0.5


def time_off_grid(
    name: str, spec: LayerSpec, ranks: Sequence[tuple[int, ...]], batch: int, rounds: int
) -> float:
    """Time of a layer at the ranks off the grid over that at those on it."""
    side = int(name.rpartition(" ")[2]) if isinstance(spec, ConvSpec) else 0
    shape = (batch, spec.weight_shape[1], side, side) if side else (batch, spec.weight_shape[1])
    x = torch.randn(shape)
    if side:
        x = x.contiguous(memory_format=torch.channels_last)

    kind = tt_layer(spec)
    tensorization = tensorize_shape(name.split()[0], spec.weight_shape)
    layers = [kind(spec, tensorization, each).eval() for each in ranks]
    for layer in layers:
        layer.execution = layer.executions[1]

    seconds = [[seconds_of(layer, x) for layer in layers] for _ in range(rounds)]
    return median(off / on for off, on in seconds)


@torch.inference_mode()
def seconds_of(layer: TTLinear | TTConv2d, x: torch.Tensor) -> float:
    """CPU seconds of a call, over as many as take a hundredth of a second."""
    start, calls = time.process_time(), 0
    while time.process_time() - start < 0.01 or not calls:
        layer(x)
        calls += 1
    return (time.process_time() - start) / calls


if __name__ == "__main__":
    main()
