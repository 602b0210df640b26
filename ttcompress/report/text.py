"""Reports: read from files, and shown as text. No torch, no numpy, so that `ttcompress report` answers at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ttcompress.files.header import blaming
from ttcompress.files.shards import read_metadata, stored_bytes
from ttcompress.records.common import Json, compression, format_compression
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import Report

WIDTH = 200
"""Columns where the output is no terminal: wide enough that nothing is cut."""


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report of a compressed file or folder, with its name and its size on disk.

    Raises:
        CheckpointError: not a compressed file, damaged, or of another schema.
    """
    path = Path(path)
    with blaming(path):
        return with_file(Report.from_json(read_metadata(path)), path)


def with_file(report: Report, path: Path) -> Report:
    """The report with the name and the size on disk of the file that holds it."""
    return replace(report, file=path.absolute().name, file_bytes=stored_bytes(path))


def as_text(report: Report) -> str:
    """What the command line prints where its output is no terminal."""
    console = Console(file=StringIO(), highlight=False, width=WIDTH, color_system=None)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get().removesuffix("\n")


def render(report: Report) -> RenderableType:
    """One report as a table of layers with the totals under it."""
    parts: list[RenderableType] = []
    if report.layers:
        parts += [_layer_table(report.layers), Text()]
    parts += [Text(line) for line in _summary(report)]
    return Group(*parts)


def render_side_by_side(reports: Sequence[Report]) -> Table:
    """Several reports as one table, a column each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for report in reports:
        table.add_column(Text(str(report.file)), justify="right", overflow="fold")

    for label, values in _comparison_rows(reports):
        table.add_row(label, *values)
    return table


def _comparison_rows(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    accuracies = [report.accuracy or {} for report in reports]
    return [
        ("compression", [format_compression(report.compression) for report in reports]),
        ("parameters before", [f"{report.params_before:,}" for report in reports]),
        ("parameters after", [f"{report.params_after:,}" for report in reports]),
        ("tensors", [format_bytes(report.bytes_after) for report in reports]),
        ("file", [format_bytes(report.file_bytes) for report in reports]),
        ("layers replaced", [str(len(report.layers)) for report in reports]),
        ("largest relative error", [_largest_error(report) for report in reports]),
        ("accuracy dense", [_percent(each.get("dense"), each) for each in accuracies]),
        ("accuracy compressed", [_percent(each.get("compressed"), each) for each in accuracies]),
        ("measured on", [_measured_on(each) for each in accuracies]),
    ]


def _largest_error(report: Report) -> str:
    errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
    return f"{max(errors):.3g}" if errors else "-"


def _percent(value: float | None, accuracy: Json) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if "metric" in accuracy else f"{value:.2f} %"


def _measured_on(accuracy: Json) -> str:
    if not accuracy:
        return "-"
    return str(accuracy["metric"]) if "metric" in accuracy else f"{accuracy['data']}, n = {accuracy['n']:,}"


def _layer_table(layers: Sequence[LayerPlan]) -> Table:
    calibrated = any(layer.output_error for layer in layers)
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "weight", "format", "modes (out x in)", "TT-ranks"):
        table.add_column(name, overflow="fold")
    for name in ("params before", "after", "compression", "rel. error", *(["output error"] if calibrated else [])):
        table.add_column(name, justify="right", overflow="fold")
    for layer in layers:
        table.add_row(
            Text(layer.fqn),  # A plain string would be searched for markup.
            "x".join(map(str, layer.spec.weight_shape)),
            layer.tensorization.format + ("" if layer.execution == "auto" else f" run {layer.execution}"),
            _modes(layer),
            ",".join(map(str, layer.tt_ranks[1:-1])),
            f"{layer.params_before:,}",
            f"{layer.params_after:,}",
            format_compression(compression(layer.params_before, layer.params_after)),
            _error(layer),
            *([_output_error(layer)] if calibrated else []),
        )
    return table


def _modes(layer: LayerPlan) -> str:
    shown = layer.tensorization
    windows = [str(size) for size in shown.window_modes if size > 1]
    pairs = [f"{m}x{n}" for m, n, _ in shown.modes if m * n > 1]
    window = f" window {','.join(windows)}" if windows else ""
    return " ".join(pairs) + window


def _error(layer: LayerPlan) -> str:
    if layer.relative_error is not None:
        return f"{layer.relative_error:.4f}" if layer.relative_error >= 1e-4 else f"{layer.relative_error:.1e}"
    return "-" if layer.predicted_error is None else f"<= {layer.predicted_error:.4f}"


def _output_error(layer: LayerPlan) -> str:
    """From the first stage to the last one that was kept."""
    errors = list((layer.output_error or {}).values())
    return " -> ".join(f"{error:.3f}" for error in (errors[0], errors[-1])) if errors else "-"


def _summary(report: Report) -> list[str]:
    plan = report.plan
    lines = []
    if plan.layers:
        before = sum(layer.params_before for layer in plan.layers)
        after = sum(layer.params_after for layer in plan.layers)
        lines.append(f"replaced weights  {before:,} -> {after:,}  {format_compression(compression(before, after))}")
    total = format_compression(plan.compression)
    lines.append(f"all parameters    {plan.params_before:,} -> {plan.params_after:,}  {total}")
    lines.append(f"tensors           {format_bytes(report.bytes_before)} -> {format_bytes(report.bytes_after)}")
    if types := sorted({layer.core_dtype for layer in plan.layers if layer.core_dtype}):
        lines.append(f"cores             {', '.join(types)}")
    lines += _running_lines(plan)

    if report.file_bytes is not None:
        lines.append(f"file              {report.file}, {format_bytes(report.file_bytes)}")
        lines += _accuracy_lines(report.accuracy)
    # A network that was trained from scratch was never decomposed.
    if not report.finetuning or report.source:
        lines += _calibration_lines(report.calibration)
    lines += _search_lines(report)
    lines += _finetuning_lines(report.finetuning)
    lines += _bench_lines(report.bench)

    lines += [f"kept dense        {line}" for line in _kept(report)]
    lines += [f"note              {layer.fqn}: {layer.note}" for layer in plan.layers if layer.note]
    lines += [f"note              {note}" for note in plan.notes]
    return lines


def _running_lines(plan: CompressionPlan) -> list[str]:
    lines = []
    if plan.multiply_adds:
        madds, fewer = plan.multiply_adds
        lines.append(f"multiply-adds     {madds:,} -> {fewer:,}  {format_compression(compression(madds, fewer))}")
    if latency := plan.latency:
        times = f"{_time(latency['dense'])} -> {_time(latency['compressed'])}"
        lines.append(f"latency           {times}  {latency['ratio']:.2f}x (one input, {latency['device']})")
    return lines


def _accuracy_lines(accuracy: Json | None) -> list[str]:
    if accuracy is None:
        return ["accuracy          not measured (--data measures it)"]
    if "metric" in accuracy:
        return [f"{accuracy['metric']:<17} {accuracy['dense']:.6g} -> {accuracy['compressed']:.6g}"]
    low, high = accuracy["interval"]
    top1, top5 = (_change(accuracy[f"dense{end}"], accuracy[f"compressed{end}"]) for end in ("", "_top5"))
    lines = [
        f"top-1 accuracy    {top1}  (95 % interval {low:.2f} to {high:.2f}, n = {accuracy['n']:,}, {accuracy['data']})",
        f"top-5 accuracy    {top5}",
    ]
    if accuracy["agreement"] is not None:
        lines.append(
            f"agreement         {accuracy['agreement']:.2f} % of images get the same answer from both networks"
        )
    return lines


def _change(dense: float | None, compressed: float) -> str:
    return f"{compressed:.2f} %" if dense is None else f"{dense:.2f} % -> {compressed:.2f} %"


def _calibration_lines(calibration: Json | None) -> list[str]:
    if calibration is None:
        return ["decomposed by     weight error (--calib takes output error instead)"]
    stages = [f"{each['stage']} {_stage_error(each)}" for each in calibration["stages"]]
    images = f"{calibration['images']:,} images of {calibration['data']}"
    lines = [f"decomposed by     output error on {images}, effort {calibration['effort']}"]
    if stages:
        lines.append(
            f"held-out images   error of the network's outputs: {', '.join(stages)} (n = {calibration['held_out']:,})"
        )
    return lines


def _stage_error(stage: Json) -> str:
    value = "not finite" if stage["error"] is None else f"{stage['error']:.4f}"
    return value if stage["kept"] else f"{value} (not kept)"


def _finetuning_lines(finetuning: Json | None) -> list[str]:
    if finetuning is None:
        return []
    history, best = finetuning["history"], finetuning["best"]
    scores = {epoch["epoch"]: f"{epoch['val']:.2f} %" for epoch in history}
    taught = f", taught by {finetuning['teacher']}" if finetuning["teacher"] else ""
    lines = [f"fine-tuned        {len(history) - 1} epochs on {finetuning['train']}{taught}"]
    before = finetuning["before"]
    if before and before.get("n"):
        lines.append(f"before it         {before['compressed']:.2f} % top-1 (n = {before['n']:,}, {before['data']})")
    result = f"{scores[0]} before, {scores[best]} after," if finetuning["start_counts"] else scores[best]
    return [*lines, f"best epoch        {best}: {result} on {finetuning['val']}"]


def render_bench(result: Json) -> RenderableType:
    """Time and memory, dense against compressed: the whole network by batch size, then its layers."""
    parts: list[RenderableType] = [Text(f"{result['file']}: {result['what']} on {result['device']}, {result['dtype']}")]
    network = Table("batch", "network", "median", "p90", "images/s", "multiply-adds", "peak memory", "memory format")
    layers = Table("layer", *(f"batch {entry['batch']}: {of}" for entry in result["batches"] for of in _BENCHED))
    for entry in result["batches"]:
        for side in ("dense", "compressed"):
            network.add_row(str(entry["batch"]), side, *_bench_cells(entry[side]))
        memory = f"{entry['memory_ratio']:.2f}" if "memory_ratio" in entry else "-"
        work = entry["compressed"]["multiply_adds"] / max(1, entry["dense"]["multiply_adds"])
        network.add_row("", "ratio", f"{entry['time_ratio']:.2f}", "", "", f"{work:.2f}", memory, "", style="bold")
    for rows in zip(*(entry["layers"] for entry in result["batches"]), strict=True):
        cells = [(_time(row["dense"]), _time(row["compressed"]), f"{row['time_ratio']:.2f}") for row in rows]
        layers.add_row(rows[0]["fqn"], *(cell for triple in cells for cell in triple))
    return Group(*parts, network, layers)


_BENCHED = ("dense", "compressed", "ratio")


def _bench_cells(side: Json) -> list[str]:
    memory = format_bytes(side["peak_memory"])
    times = [_time(side["median"]), _time(side["p90"])]
    return [*times, f"{side['throughput']:,.0f}", f"{side['multiply_adds']:,}", memory, side["memory_format"]]


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _bench_lines(bench: Json | None) -> list[str]:
    if bench is None:
        return []
    return [
        f"{bench['what']:<17} batch {entry['batch']}: {entry['time_ratio']:.2f} of the dense network's time, "
        f"{bench['device']}"
        for entry in bench["batches"]
    ]


def _search_lines(report: Report) -> list[str]:
    return [
        f"searched          {point['compression']:.2f}x: {point['accuracy']:.2f} %, {point['drop']:+.2f} points lost"
        for point in report.search
    ]


def _kept(report: Report) -> list[str]:
    """Weights of Linear and Conv2d layers that stay dense, grouped by reason."""
    groups: dict[str, list[str]] = {}
    for kept in report.plan.kept:
        if kept.kind:
            groups.setdefault(kept.reason, []).append(kept.name.removesuffix(".weight"))
    return [f"{_some(names)}: {reason}" for reason, names in groups.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def format_bytes(count: int | None) -> str:
    """Bytes with a decimal unit: 553.4 MB."""
    if count is None:
        return "-"
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for larger in ("MB", "GB"):
        if round(value, 1) >= 1000:
            value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"
