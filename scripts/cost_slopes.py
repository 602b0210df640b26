"""How the cost of a compression grows: python -m scripts.cost_slopes [width] [depth] [images] [--largest N]

CPU seconds and peak memory of planning, decomposing and calibrating against the width of fully-connected layers, the
depth of CIFAR ResNets and the number of calibration images, each point in a process of its own, one thread; and the
slope of each in a plot of logarithms beside the one that the work has.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from math import log

import torch
from torch import nn

import ttcompress
from ttcompress.networks.surgery import apply_plan
from ttcompress.networks.zoo import CifarResNet
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe

SIZES = {
    "width": (256, 512, 1024, 2048, 4096, 8192),
    "depth": (20, 32, 56, 110),
    "images": (128, 256, 512, 1024, 2048),
}
WORK = {
    "width": {"plan": (3, 2), "decompose": (3, 2)},
    "depth": {"plan": (1, 1), "decompose": (1, 1), "calibrate": (1, 1)},
    "images": {"calibrate": (1, 1)},
}
"""By what grows and stage, the powers that time and memory should grow with: eigenvalues of a width take its cube."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(SIZES))
    parser.add_argument("--largest", type=int, default=10**9, help="leave sizes beyond out")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        kind, stage, size = arguments.point
        print(json.dumps(measured(kind, stage, int(size))))
        return

    print("| what grows | stage | CPU s | MB | slope of time | should be | slope of memory | should be |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in arguments.kinds:
        sizes = [size for size in SIZES[kind] if size <= arguments.largest]
        for stage, powers in WORK[kind].items():
            points = [in_own_process(kind, stage, size) for size in sizes]
            print(row(kind, stage, sizes, points, powers), flush=True)


def in_own_process(kind: str, stage: str, size: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "scripts.cost_slopes", "--point", kind, stage, str(size)]
    seconds, memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, memory


def row(
    kind: str, stage: str, sizes: list[int], points: list[tuple[float, float]], powers: tuple[int, int]
) -> str:
    seconds, memory = zip(*points, strict=True)
    slopes = [slope(sizes, values) for values in (seconds, memory)]
    listed = [", ".join(f"{value:.3g}" for value in values) for values in (seconds, memory)]
    named = f"{kind} {', '.join(map(str, sizes))}"
    return (
        f"| {named} | {stage} | {listed[0]} | {listed[1]} "
        f"| {slopes[0]:.2f} | {powers[0]} | {slopes[1]:.2f} | {powers[1]} |"
    )


def slope(sizes: list[int], values: tuple[float, ...]) -> float:
    """Of the last doublings, where what does not grow is small beside what does."""
    (x, y), (u, v) = [
        (log(size), log(max(value, 1e-9))) for size, value in list(zip(sizes, values, strict=True))[-2:]
    ]
    return (v - y) / (u - x)


# --------------------------------------------------------------------------------------------------------- a point


def measured(kind: str, stage: str, size: int) -> tuple[float, float]:
    """CPU seconds of a stage, and by how many MB the process grew beyond its network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = prepared(kind, stage, size)
    before = resident()
    start = time.process_time()
    run()
    return time.process_time() - start, resident() - before


def resident() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prepared(kind: str, stage: str, size: int) -> Callable[[], object]:
    model = network(kind, size)
    if stage == "plan":
        return lambda: make_plan(model, Recipe(ratio=2.0, include=("*",)))
    if stage == "decompose":
        # By hand: what a plan costs is measured apart.
        plan = make_plan(model, Recipe(ranks=32, conv_ranks=8, include=("*",)))
        return lambda: apply_plan(model, plan)
    images = torch.rand(size if kind == "images" else 256, 3, 32, 32)
    return lambda: ttcompress.compress(model, ratio=2.0, calib=images, effort="fast")


def network(kind: str, size: int) -> nn.Module:
    if kind == "width":
        return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
    depth = size if kind == "depth" else 20
    return CifarResNet((depth - 2) // 6, 10).eval()


if __name__ == "__main__":
    main()
