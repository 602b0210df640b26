"""The complexity table of Novikov et al. 2015: time and memory of TT and FC layers as sizes, ranks and modes grow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import log
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor, nn

from scripts.papers.rows import Group, Row, Runs, Where, cells, header, on_cpu, paragraph
from ttcompress.layers.linear import TTLinear
from ttcompress.measure.bench import peak_memory
from ttcompress.records.layers import LinearSpec
from ttcompress.report.text import format_bytes
from ttcompress.tt.shapes import tensorize_shape

ROWS = 32
SIZES = (1024, 2048, 4096, 8192, 16384)
TT_RANKS = (2, 4, 8, 16, 32, 64)
NUMBERS_OF_MODES = (2, 3, 4, 6, 12)
SERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "FC, size": ("M = N", {}),
    "TT, size": ("M = N", {"modes": 4, "rank": 8}),
    "TT, rank": ("r", {"size": 4096, "modes": 4}),
    "TT, modes": ("d", {"size": 4096, "rank": 4}),
}
# Exponents of the paper's bounds in what grows: forward time, forward memory, backward time, backward memory.
EXPONENTS = {
    "FC, size": (2, 2, 2, 2),
    "TT, size": ("1 (+ that of m)", 1, "1 (+ that of m)", 1),
    "TT, rank": (2, 1, 4, 3),
    "TT, modes": ("1 (times m)", 0, "2 (times m)", 0),
}


def runs(where: Where) -> Runs:
    del where
    for size in SIZES:
        yield f"FC, size {size}", partial(fc_row, size)
    for size in SIZES:
        yield f"TT, size {size}", partial(tt_row, size, 4, 8)
    for rank in TT_RANKS:
        yield f"TT, rank {rank}", partial(tt_row, 4096, 4, rank)
    for number in NUMBERS_OF_MODES:
        yield f"TT, modes {number}", partial(tt_row, 4096, number, 4)


def fc_row(size: int) -> Row:
    return row_of(measured(nn.Linear(size, size)))


def tt_row(size: int, number: int, rank: int) -> Row:
    """M = N = size in `number` modes as equal as powers of two allow, all TT-ranks `rank`, cores contracted."""
    bits = size.bit_length() - 1
    modes = [2 ** (bits // number + (k < bits % number)) for k in range(number)]
    tensorization = tensorize_shape("matrix", (size, size), modes, modes)
    layer = TTLinear(LinearSpec(size, size, bias=True), tensorization, rank)
    layer.execution = "contract"
    return row_of({**measured(layer), "largest_mode": max(modes)})


def row_of(ours: Row) -> Row:
    return {"ours": ours, "hardware": on_cpu(1)}


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def measured(layer: nn.Module) -> Row:
    """Median seconds of a forward pass for ROWS inputs and of its backward pass; bytes at most, and saved for it."""
    torch.manual_seed(0)
    layer.train()
    x = torch.randn(ROWS, layer.in_features, requires_grad=True)  # type: ignore[arg-type]
    forward, backward = [], []
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient = torch.randn_like(layer(x))
    for _ in range(12):
        start = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        y.backward(gradient)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return {
        "params": sum(parameter.numel() for parameter in layer.parameters()),
        "forward": median(forward[2:]),
        "backward": median(backward[2:]),
        "forward_bytes": peak_memory(layer.eval(), x.detach()),
        "saved_bytes": sum(saved.values()),
    }


MEASURED = ("forward", "forward_bytes", "backward", "saved_bytes")


def section(rows: Sequence[Row]) -> Iterator[str]:
    yield from paragraph(f"""
        {ROWS} inputs, float32, one CPU thread, medians of ten. Forward memory is parameters and all tensors
        that are alive together; backward memory is what the forward pass keeps for it. TT layers are told to
        contract inputs with cores, merged where that is cheaper (by default they choose between that and the dense
        weight at every call). Two rows that are the same layer (rank 4 and modes 4; rank 8 and size 4096) show how
        much times vary.
        """)
    yield from header("layer", "parameters", "forward", "forward memory", "backward", "backward memory")
    for row in rows:
        ours = row["ours"]
        times = [milliseconds(ours[name]) for name in ("forward", "backward")]
        memory = [format_bytes(ours[name]) for name in ("forward_bytes", "saved_bytes")]
        yield cells(row["row"], f"{ours['params']:,}", times[0], memory[0], times[1], memory[1])
    yield ""
    yield from paragraph("""
        Slopes on double logarithmic axes (exponents, least squares over the rows above) beside the
        exponents of the paper's bounds. The bounds of the backward pass are those of the paper's own
        algorithm; automatic differentiation of a sweep stays at the order of its forward pass. Small cases
        take the time of their operations, not of their sizes, which flattens the slopes.
        """)
    yield from header(
        "what grows",
        *(f"{name}: paper's, ours" for name in ("forward", "its memory", "backward", "its memory")),
    )
    for series, (symbol, fixed) in SERIES.items():
        points = [row for row in rows if row["row"].startswith(series)]
        if len(points) > 1:
            slopes = [f"{slope(points, name):.2f}" for name in MEASURED]
            pairs = [f"{theirs}, {ours}" for theirs, ours in zip(EXPONENTS[series], slopes, strict=True)]
            held = ", ".join(f"{key} {value}" for key, value in fixed.items())
            yield cells(f"{symbol} of {series[:2]}" + (f" ({held})" if held else ""), *pairs)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


def slope(rows: Sequence[Row], name: str) -> float:
    grows = [log(float(row["row"].split()[-1])) for row in rows]
    return linear_regression(grows, [log(row["ours"][name]) for row in rows]).slope


GROUP = Group("Layer cost (Novikov et al. 2015, complexity table)", runs, section)
