"""Times on a GPU: single layers and networks against the dense ones, by turns, and the decomposition itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import ttcompress
from scripts.decomposition_speed import CASES
from scripts.gpu import step
from scripts.gpu.rows import Place, Row, Run
from scripts.layer_speed import by_cores
from scripts.rank_grid import LAYERS
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.opening import initialise, open_fresh
from ttcompress.records.layers import ConvSpec, LayerSpec, LinearSpec
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import tensorize_shape

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = "eager", "graph", "compiled"
"""As torch runs them; all kernels begun at once, as a CUDA graph; and what torch.compile makes of them."""
ROUNDS, LEAST_SECONDS = 15, 0.004
"""Each way to time is repeated until it takes so long, and so many times by turns."""
Call = Callable[[], object]


# ----------------------------------------------------------------------------------------------------------- the clock


def compared(dense: nn.Module, ours: nn.Module, x: Tensor, way: str) -> Row:
    """Median seconds of both, and the median of the ratios, by turns."""
    if way == "compiled":
        # So many kinds of one layer are compiled that torch would give up after some.
        torch._dynamo.reset()
    modules = [each.eval().requires_grad_(False) for each in (dense, ours)]
    runs = [ready(each, x, way) for each in modules]
    counts = [repeats(run, x.device) for run in runs]
    pairs = []
    for number in range(ROUNDS):
        # Each is the first as often as the other.
        order = (0, 1) if number % 2 else (1, 0)
        found = {each: seconds_of(runs[each], counts[each], x.device) for each in order}
        pairs.append((found[0], found[1]))
    return {
        "dense": median(one for one, _ in pairs),
        "ours": median(other for _, other in pairs),
        "ratio": median(other / one for one, other in pairs),
    }


def ready(module: nn.Module, x: Tensor, way: str) -> Call:
    """A forward pass, after some that do not count."""

    def eager() -> None:
        with torch.no_grad():
            module(x)

    if way == "compiled":
        mode = "reduce-overhead" if x.is_cuda else None
        compiled = torch.compile(module, mode=mode, dynamic=False)

        def run() -> None:
            with torch.no_grad():
                compiled(x)

        for _ in range(3):
            run()
        return run

    for _ in range(3):
        eager()
    return eager if way == "eager" or not x.is_cuda else graph_of(eager)


def graph_of(run: Call) -> Call:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def repeats(run: Call, device: torch.device) -> int:
    """How often a run is repeated for one look at the clock."""
    return max(1, round(LEAST_SECONDS / max(1e-6, min(seconds_of(run, 3, device) for _ in range(3)))))


def seconds_of(run: Call, count: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000 / count

    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


# -------------------------------------------------------------------------------------------------------------- layers


def fc6(batch: int, dtype: str, way: str, place: Place) -> Row:
    """Of VGG-16 at rank 4 (Novikov et al. 2015, table 3)."""
    outs, ins = ((4,) * 6, (2, 7, 8, 8, 7, 4)) if not place.is_tiny else ((4, 4), (8, 7))
    shape = (4 ** len(outs), 56 if place.is_tiny else 25088)
    dense = nn.Linear(shape[1], shape[0], device=place.device, dtype=DTYPES[dtype])
    layer = TTLinear(
        LinearSpec(shape[1], shape[0], bias=True), tensorize_shape("matrix", shape, outs, ins), 4
    )
    x = torch.randn(batch, shape[1], device=place.device, dtype=DTYPES[dtype])
    return compared(dense, layer.to(place.device, DTYPES[dtype]), x, way)


def chain(channels: int, side: int, batch: int, ratio: int, dtype: str, way: str, place: Place) -> Row:
    if place.is_tiny:
        channels, side = 16, 6
    dense = nn.Conv2d(channels, channels, 3, padding=1)
    layer = by_cores(dense, "chain", ratio)
    layer.execution = "chain"
    x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    moved = dense.to(place.device, DTYPES[dtype], memory_format=torch.channels_last)
    return compared(moved, layer.to(place.device, DTYPES[dtype]), x.to(place.device, DTYPES[dtype]), way)


def grid(
    name: str,
    spec: LayerSpec,
    off: tuple[int, ...],
    on: tuple[int, ...],
    batch: int,
    dtype: str,
    place: Place,
) -> Row:
    """A layer at ranks that are no multiples of 8 (`ours`) against the next that are (`dense`)."""
    side = int(name.rpartition(" ")[2]) if isinstance(spec, ConvSpec) else 0
    x = torch.randn(batch, spec.weight_shape[1], *[side] * (2 if side else 0))
    if side:
        x = x.contiguous(memory_format=torch.channels_last)
    view = tensorize_shape(name.split()[0], spec.weight_shape)
    layers = [tt_layer(spec)(spec, view, ranks).to(place.device, DTYPES[dtype]) for ranks in (on, off)]
    for layer in layers:
        layer.execution = layer.executions[1]
    found = compared(layers[0], layers[1], x.to(place.device, DTYPES[dtype]), "graph")
    return {"on": found["dense"], "off": found["ours"], "ratio": found["ratio"]}


# ------------------------------------------------------------------------------------------------------------ networks


def networks(name: str, batches: tuple[int, ...], place: Place) -> Row:
    """A network of random weights at 2x, in stock layers as it is deployed."""
    if place.is_tiny:
        name, batches = "resnet20", (1, 2)
    side = 32 if name == "resnet20" else 224
    torch.manual_seed(0)
    if name == "resnet20":
        model = open_fresh(name).model
        initialise(model)
    else:
        model = getattr(torchvision.models, name)(weights=None)
    begin = time.perf_counter()
    size = (3, side, side)
    small, report = ttcompress.compress(model.eval(), ratio=2, device=str(place.device))
    found: Row = {"compression": report.compression, "compress_seconds": time.perf_counter() - begin}

    for batch in batches:
        plain = ttcompress.to_plain(small, input_size=size, batch_size=batch)
        for dtype, kind in DTYPES.items():
            x = torch.randn(batch, *size).to(place.device, kind, memory_format=torch.channels_last)
            pair = [
                deepcopy(each).to(place.device, kind, memory_format=torch.channels_last)
                for each in (model, plain)
            ]
            for way in WAYS[:2]:
                found[f"batch {batch}, {dtype}, {way}"] = compared(pair[0], pair[1], x, way)
    return found


def decomposition(case: int, place: Place) -> Row:
    """TT-SVD of the matrices of scripts/decomposition_speed.py on the device."""
    shape, outs, ins, rank = CASES[case]
    if place.is_tiny:
        shape, outs, ins = (64, 56), (8, 8), (8, 7)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(place.device)
    view = tensorize_shape("matrix", shape, outs, ins)
    decompose_weight(weight, view, rank)
    seconds, result = [], None
    for _ in range(3):
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
        begin = time.perf_counter()
        result = decompose_weight(weight, view, rank)
        seconds.append(time.perf_counter() - begin)
    assert result is not None
    return {"shape": list(shape), "rank": rank, "seconds": median(seconds), "error": result.relative_error}


def calibration(effort: str, place: Place) -> Row:
    """ResNet-20 of random weights at 2x, calibrated on random images."""
    torch.manual_seed(0)
    model = open_fresh("resnet20").model
    initialise(model)
    images = torch.randn(64 if place.is_tiny else 1024, 3, 32, 32)
    begin = time.perf_counter()
    _, report = ttcompress.compress(
        model.eval(), ratio=2, calib=images, effort=effort, device=str(place.device)
    )
    seconds = time.perf_counter() - begin
    stages = (report.calibration or {})["stages"]
    return {"seconds": seconds, "errors": {each["stage"]: each["error"] for each in stages}}


def all_rows() -> Iterator[tuple[str, Run]]:
    """By name, in order of worth."""
    ways: list[Any] = [(dtype, way) for dtype in DTYPES for way in WAYS]
    for dtype, way in ways:
        for batch in (1, 100):
            yield f"fc6 rank 4, batch {batch}, {dtype}, {way}", partial(fc6, batch, dtype, way)
    for case in range(len(CASES)):
        yield f"TT-SVD {case}", partial(decomposition, case)
    yield from step.ROWS.items()
    for effort in ("fast", "default"):
        yield f"calibration of resnet20 2x, {effort}", partial(calibration, effort)
    yield "network resnet20", partial(networks, "resnet20", (1, 128))
    yield "network resnet50", partial(networks, "resnet50", (1, 64))
    for channels, side in ((128, 28), (512, 14)):
        for dtype, way in ways:
            for ratio in (4, 10):
                name = f"chain {ratio}x, {channels} channels on {side} x {side}, batch 32, {dtype}, {way}"
                yield name, partial(chain, channels, side, 32, ratio, dtype, way)
    for name, spec, off, on in LAYERS:
        for dtype in DTYPES:
            for batch in (1, 32):
                yield f"grid {name}, batch {batch}, {dtype}", partial(grid, name, spec, off, on, batch, dtype)
    yield "network vgg16", partial(networks, "vgg16", (1, 64))
    yield "network vit_b_16", partial(networks, "vit_b_16", (1, 64))
