"""A training step, compressed against dense: python scripts/training_speed.py FILE... [--batch-size N]

Every FILE is a compressed network whose architecture is known by name. Both networks, in both memory formats, take
steps by turns on one CPU thread. Printed are medians of CPU time, which other processes disturb less than wall time,
and the median over the rounds of the ratio of the faster formats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.files.header import read_metadata
from ttcompress.networks.opening import open_fresh
from ttcompress.train.optimize import make_optimizer, tt_layers, update

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Step = tuple[nn.Module, torch.optim.Optimizer, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32, help="height and width of an image")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| file | " + " | ".join(f"{of} {name}, s" for of in ("dense", "compressed") for name in FORMATS),
        end="",
    )
    print(" | compressed / dense |\n|" + "---|" * 6)
    for file in arguments.files:
        times = measure(file, arguments)
        dense, compressed = (
            min((times[of, name] for name in FORMATS), key=median) for of in ("dense", "compressed")
        )
        ratio = median(ours / theirs for ours, theirs in zip(compressed, dense, strict=True))
        cells = [f"{median(each):.3f}" for each in times.values()]
        print(f"| {file.stem} | " + " | ".join([*cells, f"{ratio:.2f}"]) + " |", flush=True)


def measure(file: Path, arguments: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    architecture = read_metadata(file)["architecture"]["name"]
    images = torch.rand(arguments.batch_size, 3, arguments.side, arguments.side)
    steps: dict[tuple[str, str], Step] = {}
    for of in ("dense", "compressed"):
        for name, memory_format in FORMATS.items():
            model = open_fresh(architecture).model if of == "dense" else ttcompress.load(file)
            for parameter in model.train().parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=memory_format)
            optimizer = make_optimizer(model, "sgd", 1e-3, 1e-4)
            steps[of, name] = model, optimizer, images.contiguous(memory_format=memory_format)
    times: dict[tuple[str, str], list[float]] = {each: [] for each in steps}
    for at in range(arguments.rounds + 2):
        for each, step in steps.items():
            seconds = timed(*step)
            if at >= 2:
                times[each].append(seconds)
    return times


def timed(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    start = time.process_time()
    optimizer.zero_grad()
    model(images).logsumexp(1).mean().backward()
    update(model, optimizer, tt_layers(model), clip=5.0, decay=1e-4, step=optimizer.step)
    return time.process_time() - start


if __name__ == "__main__":
    main()
