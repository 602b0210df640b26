"""TT-SVD against the plain one: time and memory. python scripts/decomposition_speed.py

The plain one interleaves the modes and goes from left to right: per cut the Gram matrix of the short side in float64
over blocks of 65,536 columns, eigh, remainder U^T C in float32. It has no error to tell; ours has. One thread, in
alternation in one process, CPU seconds, medians. Memory is the most anonymous memory above that of the process with the
matrix loaded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from pathlib import Path
from statistics import median
from threading import Event, Thread

import torch
from torch import Tensor

from ttcompress.tt.decompose import decompose_weight, tensorize
from ttcompress.tt.shapes import Tensorization, tensorize_shape

CASES = (
    ((4096, 25088), (4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4), 4),
    ((4096, 4096), (4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4, 4), 8),
    ((4096, 4096), (4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4, 4), 64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| matrix | max_rank | plain, s | ours / plain | memory, plain | ours |\n|" + "---|" * 6)
    for shape, outs, ins, rank in CASES:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        modes = tensorize_shape("matrix", shape, outs, ins)
        runs = (lambda: plain(weight, modes, rank)), (lambda: decompose_weight(weight, modes, rank))  # noqa: B023
        extra = [in_a_child(peak_extra_memory, run) / (weight.numel() * 4) for run in runs]
        seconds = [[cpu_seconds(run) for run in runs] for _ in range(rounds + 1)][1:]
        ratio = median(ours / reference for reference, ours in seconds)
        first = (
            f"| {shape[1]} x {shape[0]} | {rank} | {median(each[0] for each in seconds):.2f} | {ratio:.2f} "
        )
        print(first + f"| {extra[0]:.2f}x | {extra[1]:.2f}x |", flush=True)


def plain(weight: Tensor, tensorization: Tensorization, max_rank: int) -> list[Tensor]:
    rest, rank, cores = tensorize(weight, tensorization), 1, []
    for size in tensorization.sizes[:-1]:
        unfolding = rest.reshape(rank * size, -1)
        wide = unfolding.shape[0] <= unfolding.shape[1]
        short = unfolding if wide else unfolding.T
        gram = torch.zeros(len(short), len(short), dtype=torch.float64)
        for block in short.split(65_536, dim=1):
            exact = block.double()
            gram += exact @ exact.T
        vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :max_rank]
        basis = (vectors if wide else torch.linalg.qr(unfolding.double() @ vectors).Q).float()
        cores.append(basis.reshape(rank, size, -1))
        rest, rank = basis.T @ unfolding, basis.shape[1]
    return [*cores, rest.reshape(rank, -1, 1)]


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_a_child(measure: Callable[[Callable[[], object]], int], run: Callable[[], object]) -> int:
    """What another run left behind in the heap must not count as there before."""
    receiver, sender = Pipe(duplex=False)
    child = get_context("fork").Process(target=lambda: sender.send(measure(run)))
    child.start()
    most: int = receiver.recv()
    child.join()
    return most


def peak_extra_memory(run: Callable[[], object]) -> int:
    """Bytes of anonymous memory (Linux), sampled every two milliseconds."""
    before, most, stop = anonymous_memory(), 0, Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, anonymous_memory())

    thread = Thread(target=watch)
    thread.start()
    run()
    stop.set()
    thread.join()
    return most - before


def anonymous_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
