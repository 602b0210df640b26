"""Reports are read from files and shown as text, without torch and numpy, so that it is done at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from math import ceil
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ttcompress.files.compressed import stored_report
from ttcompress.files.shards import stored_bytes
from ttcompress.records.common import Json, compression, format_compression, printable
from ttcompress.records.layers import WeightSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import Report, fall

KINDS = {"embedding": " (embedding)", "weight": " (would be rebuilt)"}
"""What is said of a kept weight that no Linear or convolution runs by."""
HEIGHTS = "▁▂▃▄▅▆▇█"
WIDTH = 200
"""Columns where the output is no terminal: wide enough that nothing is cut."""


def read_report(path: str | os.PathLike[str]) -> Report:
    """The report of a compressed file or folder, with its name and its size on disk.

    Raises:
        CheckpointError: not a compressed file, damaged, or of another schema.
    """
    return with_file(stored_report(Path(path)), Path(path))


def with_file(report: Report, path: Path) -> Report:
    """The report with the name and the size on disk of the file that holds it."""
    return replace(report, file=path.absolute().name, file_bytes=stored_bytes(path))


def as_text(report: Report) -> str:
    """What the command line prints where its output is no terminal."""
    console = Console(file=StringIO(), highlight=False, width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get().removesuffix("\n")


def render(report: Report) -> RenderableType:
    """One report as a table of layers with the totals under it."""
    parts: list[RenderableType] = []
    if report.layers:
        parts += [_layer_table(report.layers), Text()]
        parts.append(Blocks([layer.params_after for layer in report.layers]))
    parts += map(_text, _summary(report))
    return Group(*parts)


@dataclass(frozen=True)
class Blocks:
    """A block a layer, as high as its share of what is left of all; on terminals that have room for them."""

    sizes: Sequence[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line, or nothing where it would be broken or not be drawn."""
        label = f"{'share of each':<18}"
        has_room = len(label) + len(self.sizes) <= options.max_width
        if console.is_terminal and has_room and not options.ascii_only:
            yield Text(label + self.line)

    @property
    def line(self) -> str:
        """The blocks, the largest share a whole one.

        >>> Blocks([1, 4, 8]).line
        '▁▄█'
        """
        largest = max(self.sizes, default=0) or 1
        return "".join(HEIGHTS[max(0, ceil(size * len(HEIGHTS) / largest) - 1)] for size in self.sizes)


def _text(words: str) -> Text:
    """What comes from outside, for a table: in a plain string rich would look for markup."""
    return Text(printable(words))


def render_side_by_side(reports: Sequence[Report]) -> Table:
    """Several reports as one table, a column each."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for report in reports:
        table.add_column(_text(str(report.file)), justify="right", overflow="fold")

    columns = [_comparison(report) for report in reports]
    for label in columns[0]:
        table.add_row(label, *(_text(column[label]) for column in columns))
    return table


def render_sweep(result: Json) -> Table:
    """The points of a sweep, a row each."""
    points = result["points"]
    table = Table(box=None, pad_edge=False)
    for name in ("asked", "format"):
        table.add_column(name)
    for name in (
        "compression",
        "parameters",
        "file size",
        "accuracy",
        "lost",
        "its 95 % interval",
        "agreement",
    ):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("file", overflow="fold")
    table.add_column("")

    for point in points:
        lost_interval = point["drop_interval"]
        mark = f"smallest within {result['max_drop']:g} points" if point["smallest"] else ""
        cells = [
            f"{point['ratio']:g}x",
            point["format"],
            format_compression(point["compression"]),
            f"{point['params_after']:,}",
            format_bytes(point["file_bytes"]),
            _percent(point["accuracy"]),
            "-" if point["drop"] is None else f"{point['drop']:+.2f}",
            "-" if lost_interval is None else "{:+.2f} to {:+.2f}".format(*lost_interval),
            _percent(point["agreement"]),
            str(point["file"]),
            mark,
        ]
        table.add_row(*map(_text, cells), style="bold" if mark else None)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _comparison(report: Report) -> dict[str, str]:
    """The cells of one report, by the labels of their rows."""
    accuracy = report.accuracy or {}
    return {
        "compression": format_compression(report.compression),
        "parameters before": f"{report.params_before:,}",
        "parameters after": f"{report.params_after:,}",
        "tensors": format_bytes(report.bytes_after),
        "file": format_bytes(report.file_bytes),
        "layers replaced": str(len(report.layers)),
        "largest relative error": _largest_error(report),
        "accuracy dense": _score(accuracy, "dense"),
        "accuracy compressed": _score(accuracy, "compressed"),
        "measured on": _measured_on(accuracy),
    }


def _largest_error(report: Report) -> str:
    errors = [layer.relative_error for layer in report.layers if layer.relative_error is not None]
    return f"{max(errors):.3g}" if errors else "-"


def _score(accuracy: Json, side: str) -> str:
    value = accuracy.get(side)
    if value is None:
        return "-"
    # A user's own metric need not be a percentage.
    return f"{value:.4g}" if "metric" in accuracy else f"{value:.2f} %"


def _measured_on(accuracy: Json) -> str:
    if not accuracy:
        return "-"
    if "metric" in accuracy:
        return str(accuracy["metric"])
    return f"{accuracy['data']}, n = {accuracy['n']:,}"


def _layer_table(layers: Sequence[LayerPlan]) -> Table:
    texts = ["layer", "weight", "format", "modes (out x in)", "TT-ranks"]
    numbers = ["params before", "after", "compression", "rel. error"]
    is_calibrated = any(layer.output_error for layer in layers)
    if is_calibrated:
        numbers.append("output error")

    table = Table(box=None, pad_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    for layer in layers:
        errors = [_error(layer)]
        if is_calibrated:
            errors.append(_output_error(layer))
        table.add_row(*map(_text, [*_layer_cells(layer), *errors]))
    return table


def _layer_cells(layer: LayerPlan) -> list[str]:
    way = "" if layer.execution == "auto" else f" run {layer.execution}"
    return [
        layer.fqn,
        _shape(layer),
        layer.tensorization.format + way,
        _modes(layer),
        ",".join(map(str, layer.tt_ranks[1:-1])),
        f"{layer.params_before:,}",
        f"{layer.params_after:,}",
        format_compression(compression(layer.params_before, layer.params_after)),
    ]


def _shape(layer: LayerPlan) -> str:
    """Of the weight, with the kind of its layer where two or four dimensions do not tell it."""
    shape = "x".join(map(str, layer.spec.weight_shape))
    is_usual = layer.spec.kind in ("linear", "conv2d")
    return shape if is_usual else f"{layer.spec.kind} {shape}"


def _modes(layer: LayerPlan) -> str:
    shown = layer.tensorization
    windows = [str(size) for size in shown.window_modes if size > 1]
    pairs = [f"{m}x{n}" for m, n, _ in shown.modes if m * n > 1]
    window = f" window {','.join(windows)}" if windows else ""
    return " ".join(pairs) + window


def _error(layer: LayerPlan) -> str:
    """The measured error, or else its bound."""
    error, bound = layer.relative_error, layer.predicted_error
    if error is not None:
        return f"{error:.4f}" if error >= 1e-4 else f"{error:.1e}"
    return "-" if bound is None else f"<= {bound:.4f}"


def _output_error(layer: LayerPlan) -> str:
    """From the first stage to the last one that was kept."""
    if not layer.output_error:
        return "-"
    errors = list(layer.output_error.values())
    return f"{errors[0]:.3f} -> {errors[-1]:.3f}"


def _summary(report: Report) -> list[str]:
    plan = report.plan
    lines = []
    if plan.layers:
        before = sum(layer.params_before for layer in plan.layers)
        after = sum(layer.params_after for layer in plan.layers)
        lines.append(f"replaced weights  {_fewer(before, after)}")
    lines.append(f"all parameters    {_fewer(plan.params_before, plan.params_after)}")
    if plan.params_able:
        share = 100 * plan.params_able / plan.params_before
        lines.append(f"could be touched  {plan.params_able:,}  {share:.1f} % of all parameters")
    size_before, size_after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    lines.append(f"tensors           {size_before} -> {size_after}")
    if types := sorted({layer.core_dtype for layer in plan.layers if layer.core_dtype}):
        lines.append(f"cores             {', '.join(types)}")
    lines += _running_lines(plan)
    lines += _rebuilt_lines(plan)

    if report.file_bytes is not None:
        lines.append(f"file              {report.file}, {format_bytes(report.file_bytes)}")
        lines += _accuracy_lines(report.accuracy)
    # A network that was trained from scratch was never decomposed.
    if not report.finetuning or report.source:
        lines += _calibration_lines(report.calibration)
    lines += _search_lines(report)
    lines += _finetuning_lines(report.finetuning)
    lines += _bench_lines(report.bench)

    lines += [f"kept dense        {line}" for line in _dense_lines(report)]
    lines += [f"note              {layer.fqn}: {layer.note}" for layer in plan.layers if layer.note]
    lines += [f"note              {note}" for note in plan.notes]
    return lines


def _fewer(before: int, after: int) -> str:
    return f"{before:,} -> {after:,}  {format_compression(compression(before, after))}"


def _running_lines(plan: CompressionPlan) -> list[str]:
    lines = []
    if plan.multiply_adds:
        lines.append(f"multiply-adds     {_fewer(*plan.multiply_adds)}")
    if latency := plan.latency:
        times = f"{_time(latency['dense'])} -> {_time(latency['compressed'])}"
        lines.append(f"latency           {times}  {latency['ratio']:.2f}x (one input, {latency['device']})")
    return lines


def _rebuilt_lines(plan: CompressionPlan) -> list[str]:
    rebuilt = [layer for layer in plan.layers if isinstance(layer.spec, WeightSpec)]
    if not rebuilt:
        return []
    params = sum(layer.params_before for layer in rebuilt)
    what = f"{params:,} parameters of {_some([layer.fqn for layer in rebuilt])}"
    return [f"rebuilt to run    {what}: fewer bytes on disk and in transit, not less time"]


def _accuracy_lines(accuracy: Json | None) -> list[str]:
    if accuracy is None:
        return ["accuracy          not measured (--data measures it)"]
    if "metric" in accuracy:
        return _metric_lines(accuracy)

    top1 = _change(accuracy["dense"], accuracy["compressed"])
    top5 = _change(accuracy["dense_top5"], accuracy["compressed_top5"])
    low, high = accuracy["interval"]
    interval = f"95 % interval {low:.2f} to {high:.2f}, n = {accuracy['n']:,}, {accuracy['data']}"
    lines = [f"top-1 accuracy    {top1}  ({interval})", *_lost(accuracy), f"top-5 accuracy    {top5}"]

    agreement = accuracy["agreement"]
    if agreement is not None:
        lines.append(f"agreement         {agreement:.2f} % of images get the same answer from both networks")
    return lines


def _metric_lines(accuracy: Json) -> list[str]:
    dense, compressed = accuracy["dense"], accuracy["compressed"]
    change = f"{compressed:.6g}" if dense is None else f"{dense:.6g} -> {compressed:.6g}"
    about = []
    if accuracy.get("interval"):
        about.append("95 % interval {:.5g} to {:.5g}".format(*accuracy["interval"]))
    if accuracy.get("n"):
        about.append(f"n = {accuracy['n']:,} {accuracy.get('unit', '')}".rstrip())
    if accuracy.get("data"):
        about.append(accuracy["data"])

    measured = f"{accuracy['metric']:<17} {change}" + (f"  ({', '.join(about)})" if about else "")
    beside = [f"{name:<17} {value:.4g}" for name, value in accuracy.get("beside", {}).items()]
    return [measured, *_lost(accuracy), *beside]


def _lost(accuracy: Json) -> list[str]:
    """What was lost, where its interval is known: both networks saw the same inputs, so it is surer than either figure."""
    if accuracy["dense"] is None or not accuracy.get("lost_interval"):
        return []
    what, form = ("", "{:.4g}") if "metric" in accuracy else (" points", "{:.2f}")
    lost, low, high = map(form.format, (fall(accuracy), *accuracy["lost_interval"]))
    return [f"lost              {lost}{what}  (95 % interval {low} to {high}, of the same inputs)"]


def _change(dense: float | None, compressed: float) -> str:
    return f"{compressed:.2f} %" if dense is None else f"{dense:.2f} % -> {compressed:.2f} %"


def _calibration_lines(calibration: Json | None) -> list[str]:
    if calibration is None:
        return ["decomposed by     weight error (--calib takes output error instead)"]
    unit = calibration.get("unit", "images")
    images = f"{calibration['images']:,} {unit} of {calibration['data']}"
    lines = [f"decomposed by     output error on {images}, effort {calibration['effort']}"]

    at_a_time = calibration.get("at_a_time")
    if at_a_time:
        lines.append(f"memory            batches pass {at_a_time:,} images at a time, to fit")

    stages = ", ".join(f"{stage['stage']} {_stage_error(stage)}" for stage in calibration["stages"])
    if stages:
        held_out = f"n = {calibration['held_out']:,}"
        lines.append(f"{f'held-out {unit}':<17} error of the network's outputs: {stages} ({held_out})")
    return lines


def _stage_error(stage: Json) -> str:
    value = "not finite" if stage["error"] is None else f"{stage['error']:.4f}"
    return value if stage["kept"] else f"{value} (not kept)"


def _finetuning_lines(finetuning: Json | None) -> list[str]:
    if finetuning is None:
        return []
    history, teacher = finetuning["history"], finetuning["teacher"]
    taught = f", taught by {teacher}" if teacher else ""
    # The first is the network as it was.
    precision = finetuning.get("precision")
    narrow = f", in {precision}" if precision not in (None, "float32") else ""
    lines = [f"fine-tuned        {len(history) - 1} epochs on {finetuning['train']}{taught}{narrow}"]

    before = finetuning["before"]
    if before and before.get("n"):
        images = f"n = {before['n']:,}, {before['data']}"
        lines.append(f"before it         {before['compressed']:.2f} % top-1 ({images})")

    scores = {epoch["epoch"]: f"{epoch['val']:.2f} %" for epoch in history}
    best = finetuning["best"]
    result = scores[best]
    if finetuning["start_counts"]:
        result = f"{scores[0]} before, {result} after,"
    lines.append(f"best epoch        {best}: {result} on {finetuning['val']}")
    return lines


def render_bench(result: Json) -> RenderableType:
    """Time and memory, dense against compressed: the whole network by batch size, then its layers."""
    where = f"{result['device']}, {result['dtype']}{_in_runtime(result)}"
    title = _text(
        f"{result['file']} in {LAYER_WORDS.get(str(result.get('layers')), 'TT layers')}: {result['what']} on {where}"
    )
    batches = result["batches"]
    tables = [_network_times(batches)]
    if batches[0]["layers"]:
        tables.append(_layer_times(batches))
    return Group(title, *tables)


LAYER_WORDS = {"plain": "stock layers"}
"""Older files know of TT layers only."""
RUNTIME_WORDS = {
    "torch": "",
    "compile": ", torch.compile",
    "onnx": ", onnxruntime",
    "onnx-int8": ", onnxruntime, int8",
}


def _in_runtime(bench: Json) -> str:
    runtime = bench.get("runtime", "torch")
    return RUNTIME_WORDS.get(runtime, f", {runtime}")


def _network_times(batches: Sequence[Json]) -> Table:
    measured = ("median", "p90", "images/s", "multiply-adds", "peak memory", "file", "memory format")
    table = Table("batch", "network", *measured)
    for batch in batches:
        dense, compressed = batch["dense"], batch["compressed"]
        number = str(batch["batch"])
        table.add_row(number, "dense", *map(_text, _network_cells(dense)))
        table.add_row(number, "compressed", *map(_text, _network_cells(compressed)))

        time = f"{batch['time_ratio']:.2f}"
        work = f"{compressed['multiply_adds'] / max(1, dense['multiply_adds']):.2f}"
        memory = f"{batch['memory_ratio']:.2f}" if "memory_ratio" in batch else "-"
        file = _file_ratio(dense, compressed)
        table.add_row("", "ratio", time, "", "", work, memory, file, "", style="bold")
    return table


def _file_ratio(dense: Json, compressed: Json) -> str:
    return f"{compressed['file_bytes'] / dense['file_bytes']:.2f}" if dense.get("file_bytes") else "-"


def _network_cells(side: Json) -> list[str]:
    return [
        _time(side["median"]),
        _time(side["p90"]),
        f"{side['throughput']:,.0f}",
        f"{side['multiply_adds']:,}",
        format_bytes(side["peak_memory"]),
        format_bytes(side.get("file_bytes")),
        side["memory_format"],
    ]


def _layer_times(batches: Sequence[Json]) -> Table:
    """A row a layer, three columns a batch size."""
    table = Table("layer")
    for batch in batches:
        for name in ("dense", "compressed", "ratio"):
            table.add_column(f"batch {batch['batch']}: {name}")

    # By layer, what was measured of it at each batch size.
    for layer in zip(*(batch["layers"] for batch in batches), strict=True):
        cells: list[str] = []
        for times in layer:
            cells += [_time(times["dense"]), _time(times["compressed"]), f"{times['time_ratio']:.2f}"]
        table.add_row(_text(layer[0]["fqn"]), *cells)
    return table


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _bench_lines(bench: Json | None) -> list[str]:
    if bench is None:
        return []
    lines = []
    for batch in bench["batches"]:
        ratio = f"{batch['time_ratio']:.2f} of the dense network's time"
        where = f"{bench['device']}{_in_runtime(bench)}"
        lines.append(f"{bench['what']:<17} batch {batch['batch']}: {ratio}, {where}")
    return lines


def _search_lines(report: Report) -> list[str]:
    lines = []
    is_metric = "metric" in (report.accuracy or {})
    for point in report.search:
        found = f"{point['accuracy']:.2f} %, {point['drop']:+.2f} points lost"
        if is_metric:
            found = f"{point['accuracy']:.4g}, {point['drop']:+.4g} lost"
        lines.append(f"searched          {point['compression']:.2f}x: {found}")
    return lines


def _dense_lines(report: Report) -> list[str]:
    """Weights that stay dense, grouped by reason and kind."""
    groups: dict[tuple[str, str], list[str]] = {}
    for kept in report.plan.kept:
        if kept.kind:
            groups.setdefault((kept.reason, KINDS.get(kept.kind, "")), []).append(kept.fqn)
    return [f"{_some(names)}{kind}: {reason}" for (reason, kind), names in groups.items()]


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
