"""Results of one measurement or export as lines of text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ttcompress.errors import shortlist
from ttcompress.records.common import Json
from ttcompress.records.report import Accuracy, Figure
from ttcompress.report.text import format_bytes


def accuracy_lines(accuracy: Accuracy | Figure, data: str) -> list[str]:
    """Top-1 with its interval, and top-5; or another figure with its interval."""
    if isinstance(accuracy, Figure):
        return [_figure_line(accuracy, data)]
    low, high = accuracy.interval
    measured_on = f"n = {accuracy.n:,}, {data}"
    return [
        f"{accuracy.top1:.2f} % top-1  (95 % interval {low:.2f} to {high:.2f}, {measured_on})",
        f"{accuracy.top5:.2f} % top-5",
    ]


def _figure_line(figure: Figure, data: str) -> str:
    interval = "95 % interval {:.5g} to {:.5g}, ".format(*figure.interval) if figure.interval else ""
    return f"{figure.metric} {figure.value:.6g}  ({interval}n = {figure.n:,} {figure.unit}, {data})"


def accuracy_json(accuracy: Accuracy | Figure, data: str) -> Json:
    """The same as JSON."""
    if isinstance(accuracy, Figure):
        return {**asdict(accuracy), "data": data}
    return {
        "accuracy": accuracy.top1,
        "top5": accuracy.top5,
        "n": accuracy.n,
        "interval": accuracy.interval,
        "data": data,
    }


def factors_lines(done: Json, output: Path) -> list[str]:
    """What the compressed layers of a file became."""
    made = f"{done['factored']} layers as rows of factors, {done['dense']} dense"
    lines = [f"{output}: {made}, {format_bytes(done['num_bytes'])}"]
    if names := done["contracted"]:
        lines.append(f"cores met one by one, a ttcompress ContractedLinear: {shortlist(names)}")
    return lines


def export_lines(done: Json, output: Path) -> list[str]:
    """What was written for other runtimes, and how far it computes the same."""
    operators = ", ".join(f"{count} {name}" for name, count in done["operators"].items())
    size, tensors = format_bytes(done["file_bytes"]), format_bytes(done["tensor_bytes"])
    shape = ", ".join(map(str, done["input_shape"]))

    lines = [
        f"file        {output}, {size} (tensors of the network {tensors})",
        f"input       {done['dtype']} (batch, {shape})",
        f"operators   opset {done['opset']}: {operators}",
    ]
    if done["difference"] is None:
        return [*lines, "difference  not measured: onnxruntime is not installed"]
    return [*lines, f"difference  {done['difference']:.1e} of the largest output, onnxruntime against torch"]
