"""The cost model of a GPU, fitted to its rows: python -m scripts.gpu.fit docs/gpu.jsonl

Time is taken to be so much for each multiply-add, each element moved through memory and each kernel begun, as
`ttcompress/tt/cost.py` counts them. The three are fitted, by least squares of relative errors, to single layers in CUDA
graphs, whose ranks are multiples of 8. Prints them, `GPU_TIME` as it follows, and each time beside the fitted one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from scripts.gpu.speed import DTYPES, all_rows, chain, grid
from ttcompress.records.layers import ConvSpec, LayerSpec
from ttcompress.tt.cost import Calls, Cost, LayerCosts, Unit
from ttcompress.tt.shapes import Tensorization, tensorize_shape

BLOCK = 8
LARGE = 10**15
"""Multiply-adds by which kernels are told from the others."""
Work = tuple[float, float, float]
"""Multiply-adds, elements moved, kernels begun."""


class Point(NamedTuple):
    """What a layer has to do, and what it took."""

    name: str
    dtype: str
    work: Work
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    rows = read(parser.parse_args().rows)
    for dtype in DTYPES:
        found = [each for each in points(rows) if each.dtype == dtype]
        fitted = fit(found)
        madd, element, kernel = fitted
        print(
            f"{dtype}: {madd * 1e15:.2f} us a G multiply-adds, {element * 1e12:.2f} us a M elements,", end=" "
        )
        print(f"{kernel * 1e6:.2f} us a kernel: Unit({BLOCK}, {element / madd:.0f}, {kernel / madd:.3g})")
        for each in found:
            print(
                f"  {each.name:60} {each.seconds * 1e6:7.1f} us, fitted {work_seconds(each, fitted) * 1e6:7.1f}"
            )


def read(rows: Path) -> dict[str, dict[str, float]]:
    return {row["gpu_row"]: row for row in map(json.loads, rows.read_text().splitlines())}


def fit(found: list[Point]) -> NDArray[np.float64]:
    """Seconds of a multiply-add, an element and a kernel."""
    work = np.array([[*each.work] for each in found])
    seconds = np.array([each.seconds for each in found])
    solution, *_ = np.linalg.lstsq(work / seconds[:, None], np.ones(len(found)), rcond=None)
    return np.asarray(solution)


def work_seconds(point: Point, fitted: NDArray[np.float64]) -> float:
    return float(np.dot(point.work, fitted))


def points(rows: Mapping[str, Mapping[str, float]]) -> Iterator[Point]:
    """Layers in CUDA graphs: dense convolutions, and what runs by its cores."""
    for name, run in all_rows():
        if name not in rows or not isinstance(run, partial):
            continue
        if run.func is chain and run.args[-1] == "graph":
            channels, side, batch, ratio, dtype, _ = run.args
            dense = nn.Conv2d(channels, channels, 3, padding=1)
            # The dense layer of all ratios is one.
            if ratio == 4:
                calls = calls_of(batch, side)
                counted = work(lambda unit: LayerCosts(dense.weight.shape, calls, unit).dense())  # noqa: B023
                yield Point(f"dense, {name}", dtype, counted, rows[name]["dense"])
        elif run.func is grid:
            label, spec, _, on, batch, dtype = run.args
            view = tensorize_shape(label.split()[0], spec.weight_shape)
            side = int(label.rpartition(" ")[2]) if isinstance(spec, ConvSpec) else 1
            yield Point(name, dtype, cores_work(spec, view, on, calls_of(batch, side)), rows[name]["on"])


def calls_of(batch: int, side: int) -> Calls:
    pixels = batch * side * side
    return Calls(pixels, pixels)


def cores_work(spec: LayerSpec, view: Tensorization, ranks: tuple[int, ...], calls: Calls) -> Work:
    tt_ranks = view.expand_ranks(ranks)
    madds, elements, kernels = work(
        lambda unit: LayerCosts(spec.view_shape, calls, unit).by_cores(view, tt_ranks)
    )
    # With one input a Linear takes its time to read its cores.
    return madds, elements + view.num_params(tt_ranks), kernels


def work(cost: Callable[[Unit], Cost]) -> Work:
    """Multiply-adds, elements and kernels of a cost."""
    least, more = (cost(Unit(BLOCK, 1, kernel, kernel)) for kernel in (0, LARGE))
    return least.multiply_adds, least.elements, (more.multiply_adds - least.multiply_adds) / LARGE


if __name__ == "__main__":
    main()
