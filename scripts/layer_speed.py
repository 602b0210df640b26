"""Single layers against the dense ones they replace: python scripts/layer_speed.py [linear] [conv] [kinds] [cached] [lookup]

fc6 of VGG-16 at rank 4 (Novikov et al. 2015), forward and training step; `chain` convolutions at 10x, and those of
other kinds at 4x, by their cores and as they choose themselves; and every format of a convolution at every size of
rank, which must never be slower than the dense one; rows of tables. One thread, in alternation in one process, CPU seconds, medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn

from ttcompress.layers.conv import CONV_LAYERS, TTConv
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.spec import layer_spec
from ttcompress.records.layers import EmbeddingSpec, LinearSpec
from ttcompress.tt.shapes import tensorize_shape

Run = Callable[[], object]
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", default=["linear", "conv", "kinds", "cached", "lookup"])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {"linear": linear, "conv": conv, "kinds": kinds, "cached": cached, "lookup": lookup}
    print("| layer | batch | dense, ms | ours / dense |\n|---|---|---|---|")
    for group in arguments.groups:
        for name, batch, dense, ours in cases[group]():
            theirs, ratio = compare(dense, ours, arguments.rounds)
            print(f"| {name} | {batch} | {1000 * theirs:.3g} | {ratio:.4f} |", flush=True)


def linear() -> Iterator[tuple[str, int, Run, Run]]:
    dense = nn.Linear(25088, 4096)
    modes = tensorize_shape("matrix", (4096, 25088), (4,) * 6, (2, 7, 8, 8, 7, 4))
    layer = TTLinear(LinearSpec(25088, 4096, bias=True), modes, 4)
    for batch in (1, 100):
        x = torch.randn(batch, 25088)
        yield "fc6, rank 4, forward", batch, evaluation(dense, x), evaluation(layer, x)
    x.requires_grad_()
    print(f"saved for backward: {saved_bytes(layer, x) / (4 * x.numel()):.2f}x the input")
    yield "fc6, rank 4, training step", 100, training(dense, x), training(layer, x)


def conv() -> Iterator[tuple[str, int, Run, Run]]:
    for channels, side in ((128, 16), (512, 14)):
        for name, memory_format in FORMATS.items():
            dense, x = pair(channels, side, 32, memory_format)
            layer = by_cores(dense, "chain", 10)
            layer.execution = "chain"
            yield (
                f"{channels} -> {channels}, chain 10x, {name}",
                32,
                evaluation(dense, x),
                evaluation(layer, x),
            )


KINDS = (
    (nn.Conv1d, (256, 256, 5), {"padding": 2}, (200,)),
    (nn.Conv1d, (512, 512, 9), {"padding": 4}, (400,)),
    (nn.Conv3d, (64, 64, 3), {"padding": 1}, (8, 28, 28)),
    (nn.Conv3d, (256, 256, 3), {"padding": 1}, (4, 14, 14)),
    (nn.ConvTranspose1d, (256, 128, 16), {"stride": 8, "padding": 4}, (64,)),
    (nn.ConvTranspose1d, (512, 256, 16), {"stride": 8, "padding": 4}, (128,)),
    (nn.ConvTranspose2d, (256, 128, 4), {"stride": 2, "padding": 1}, (16, 16)),
    (nn.ConvTranspose2d, (512, 256, 4), {"stride": 2, "padding": 1}, (8, 8)),
    (nn.ConvTranspose3d, (64, 32, 2), {"stride": 2}, (8, 16, 16)),
    (nn.ConvTranspose3d, (256, 128, 2), {"stride": 2}, (4, 8, 8)),
    (nn.Conv2d, (128, 128, 3), {"padding": 1, "groups": 32}, (56, 56)),
    (nn.Conv2d, (1024, 1024, 3), {"padding": 1, "groups": 32}, (14, 14)),
    (nn.Conv2d, (512, 512, 3), {"padding": 1, "groups": 8}, (14, 14)),
)
"""Convolutions of signals, videos, decoders and generators, and grouped ones: class, channels and kernel, geometry,
size of an input."""


def kinds() -> Iterator[tuple[str, int, Run, Run]]:
    for make, sizes, geometry, shape in KINDS:
        dense: nn.Module = make(*sizes, **geometry)
        for batch in (1, 8):
            x = torch.randn(batch, sizes[0], *shape)
            for execution in ("chain", "auto"):
                layer = by_cores(dense, "chain", 4)
                layer.execution = execution
                groups = f", {geometry['groups']} groups" if "groups" in geometry else ""
                name = f"{make.__name__}{sizes}{groups} on {'x'.join(map(str, shape))}, {execution}"
                yield name, batch, evaluation(dense, x), evaluation(layer, x)


def cached() -> Iterator[tuple[str, int, Run, Run]]:
    for channels, side in ((16, 32), (64, 16), (128, 16), (512, 14)):
        for weight_format in ("chain", "matrix", "naive", "lowrank"):
            for ratio in (1.1, 3, 10):
                for batch in (1, 32):
                    dense, x = pair(channels, side, batch, torch.channels_last)
                    layer = by_cores(dense, weight_format, ratio)
                    name = f"{channels} -> {channels}, {weight_format} {ratio}x"
                    yield name, batch, evaluation(dense, x), evaluation(layer, x)


def lookup() -> Iterator[tuple[str, int, Run, Run]]:
    for rows, dim in ((30_522, 384), (50_257, 768)):
        dense = nn.Embedding(rows, dim)
        for weight_format in ("lowrank", "matrix"):
            modes = tensorize_shape(weight_format, (dim, rows))
            for ratio in (2, 4, 8):
                most = modes.max_ranks()
                sizes = [tuple(min(rank, each) for each in most) for rank in range(1, max(most) + 1)]
                ranks = max(each for each in sizes if modes.num_params(each) * ratio <= rows * dim)
                layer = TTEmbedding(EmbeddingSpec(rows, dim), modes, ranks)
                size = 4 * sum(core.numel() for core in layer.cores) / 1e6
                name = f"{rows} x {dim}, {weight_format} {ratio}x, {size:.1f} of {4e-6 * rows * dim:.1f} MB"
                for count in (1, 128, 4096):
                    ids = torch.randint(rows, (count,))
                    yield name, count, evaluation(dense, ids), evaluation(layer, ids)
                assert not layer.cached_tensors()


def pair(
    channels: int, side: int, batch: int, memory_format: torch.memory_format
) -> tuple[nn.Conv2d, Tensor]:
    dense = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=memory_format)
    return dense, torch.randn(batch, channels, side, side).contiguous(memory_format=memory_format)


def by_cores(dense: nn.Module, weight_format: str, ratio: float) -> TTConv:
    """The format at the largest rank, the same at all cuts where it can be, that has this compression."""
    spec = layer_spec(dense)
    modes = tensorize_shape(weight_format, spec.view_shape, groups=spec.groups)
    sizes = range(1, max(modes.max_ranks()) + 1)
    ranks = [tuple(min(rank, most) for most in modes.max_ranks()) for rank in sizes]
    fitting = [each for each in ranks if modes.num_params(each) * ratio <= dense.weight.numel()]
    return CONV_LAYERS[spec.kind](spec, modes, max(fitting, default=ranks[0]))


def evaluation(module: nn.Module, x: Tensor) -> Run:
    module.eval()

    @torch.no_grad()
    def run() -> None:
        module(x)

    return run


def training(module: nn.Module, x: Tensor) -> Run:
    module.train()
    gradient = torch.randn_like(module(x))

    def run() -> None:
        x.grad = None
        module.zero_grad()
        module(x).backward(gradient)

    return run


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.train()(x)
    return sum(seen.values())


def compare(dense: Run, ours: Run, rounds: int) -> tuple[float, float]:
    """Seconds of the dense one, and the median ratio."""
    pairs = [(seconds(dense), seconds(ours)) for _ in range(rounds + 2)][2:]
    return median(theirs for theirs, _ in pairs), median(mine / theirs for theirs, mine in pairs)


def seconds(run: Run) -> float:
    """Of one run; short ones are repeated."""
    count, start = 0, time.process_time()
    while time.process_time() - start < 0.05:
        run()
        count += 1
    return (time.process_time() - start) / count


if __name__ == "__main__":
    main()
