"""The pictures of a page, each of numbers that stand in a table beside it; None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ttcompress.records.common import Json, format_compression
from ttcompress.report.canvas import (
    ACCENT,
    GRID,
    HEAT,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    SERIES,
    Picture,
    picture,
)
from ttcompress.report.entries import Entry, cut_name, heat_of, ordered

RATIOS = (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 70, 100)
"""Where an axis of compression may have its marks, and at a hundred, ten thousand ... times as much."""
NAMED_LAYERS = 40
"""More names than this have no room below bars."""
FEW_LAYERS = 8
SINGLE_BARS = 150
"""More layers than this have no bar of their own."""
SPECTRUM_WIDTH = 340


def colour_of(entry: Entry) -> str:
    """Of a file among others."""
    return SERIES[entry.number % len(SERIES)]


def marker_of(entry: Entry) -> str:
    """Its mark, which tells it from others without colour."""
    return MARKERS[entry.number % len(MARKERS)]


# ---------------------------------------------------------------------------------------------------------------- curve


def curve(entries: Sequence[Entry]) -> Picture | None:
    """Quality against size: measured points with their intervals above, the error that spectra predict below."""
    measured = [entry for entry in entries if entry.points]
    predicted = [entry for entry in entries if entry.prediction]
    if not measured and not predicted:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        rows = bool(measured) + bool(predicted)
        heights = [3, 2] if rows == 2 else [1]
        found: Any = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights)
        panels: list[Axes] = list(found[:, 0])
        if measured:
            _measured(panels[0], measured)
        farthest = _farthest(entries)
        if predicted:
            _predicted(panels[-1], predicted, farthest)
        _compression_axis(panels[-1], farthest, narrow)

    parts = []
    if measured:
        parts.append(
            f"{measured[0].quality} of {_named(measured)} against compression, dense as a dashed line"
        )
    if predicted:
        parts.append("the error that singular spectra predict for every compression")
    return picture("curve", "; ".join(parts), draw, 380 if measured and predicted else 260)


def _named(entries: Sequence[Entry]) -> str:
    return ", ".join(entry.label for entry in entries)


def _measured(axes: Axes, entries: Sequence[Entry]) -> None:
    found = sorted({entry.dense for entry in entries if entry.dense is not None})
    for dense in found:
        axes.axhline(dense, color=MUTED, linestyle=(0, (5, 4)), linewidth=1.4)
    if found:
        # Networks measured on other samples have lines close to each other: one name does for all.
        axes.annotate(
            "dense", (1, found[-1]), (-2, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", va="bottom", color=MUTED, fontsize=9,
        )  # fmt: skip

    for line in _sweeps(entries):
        axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1.4, alpha=0.7, zorder=2)
    for entry in entries:
        for point in entry.points:
            chosen = point["chosen"]
            low, high = point["interval"] or (point["quality"],) * 2
            missing = [[point["quality"] - low], [high - point["quality"]]]
            axes.errorbar(
                point["compression"],
                point["quality"],
                yerr=missing if point["interval"] else None,
                fmt=marker_of(entry),
                color=colour_of(entry),
                markerfacecolor=colour_of(entry) if chosen else PAPER,
                markeredgewidth=1.8,
                markersize=9 if chosen else 7,
                capsize=4,
                elinewidth=1.6,
                zorder=4 if chosen else 3,
            )
    axes.set_ylabel(entries[0].quality_axis)
    axes.margins(y=0.14)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _sweeps(entries: Sequence[Entry]) -> list[list[tuple[float, float]]]:
    """Points of a sweep in the same format, which a line joins."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        if entry.has("page/format") and entry.points:
            result = entry.points[-1]
            lines.setdefault(entry.text("page/format"), []).append((result["compression"], result["quality"]))
    return [sorted(line) for line in lines.values() if len(line) > 1]


def _predicted(axes: Axes, entries: Sequence[Entry], farthest: float) -> None:
    largest = 0.0
    curves = [entry.prediction["points"] for entry in entries]
    for entry, points in zip(entries, curves, strict=True):
        # Files of one network have one curve.
        shared = curves.count(points) > 1
        axes.plot(*zip(*points, strict=True), color=MUTED if shared else colour_of(entry), zorder=2)
        largest = max(largest, _between(points, farthest))
        at = entry.compression
        if points[0][0] <= at <= points[-1][0]:
            axes.plot(
                at, _between(points, at), marker_of(entry), color=colour_of(entry), markersize=9, zorder=4,
                markeredgecolor=PAPER, markeredgewidth=1.5,
            )  # fmt: skip
    kinds = " or ".join(dict.fromkeys(str(entry.prediction["by"]) for entry in entries))
    axes.set_ylabel(f"predicted error\nof {kinds}")
    axes.set_ylim(0, 1.08 * largest or 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _between(points: Sequence[Sequence[float]], at: float) -> float:
    for (left, low), (right, high) in pairwise(points):
        if left <= at <= right:
            share = (at - left) / (right - left)
            return float(low + (high - low) * share)
    return float(points[-1][1])


def _farthest(entries: Sequence[Entry]) -> float:
    """Compression as far as anything of interest goes."""
    reached = [point["compression"] for entry in entries for point in entry.points]
    reached += [entry.compression for entry in entries]
    return max(3.0, 2.5 * float(max(reached)))


def _compression_axis(axes: Axes, farthest: float, narrow: bool) -> None:
    """Compression from 1 on, logarithmic."""
    axes.set_xscale("log")
    axes.set_xlim(0.97, farthest)
    scale = 1
    while farthest / scale > 200:
        scale *= 10
    marks = [1, *(mark * scale for mark in RATIOS if mark * scale > 1 and mark * scale <= farthest)]
    axes.set_xticks(_spread(marks, farthest, 5 if narrow else 9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda ratio, _: format_compression(ratio).replace(".0x", "x"))
    )
    axes.set_xlabel("compression: parameters before over after")


def _spread(marks: Sequence[float], farthest: float, most: int) -> list[float]:
    """Marks far enough from each other for their texts."""
    step = farthest ** (1 / most)
    kept: list[float] = []
    for mark in marks:
        if not kept or mark >= kept[-1] * min(step, 1.9) * 0.97:
            kept.append(mark)
    return kept


# --------------------------------------------------------------------------------------------------------------- layers


def layers(entries: Sequence[Entry]) -> Picture | None:
    """Parameters of every layer before, as outlines, and after: those replaced in the order of the network, then the rest."""
    names = ordered(*([row["fqn"] for row in entry.layers] for entry in entries))
    if not names:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        if len(names) > SINGLE_BARS:
            _outlined(axes, entries, names)
        else:
            _barred(axes, entries, names)
        _layer_names(axes, names, narrow)
        axes.set_ylabel("parameters")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.yaxis.set_major_locator(MaxNLocator(5))

    alt = f"parameters of each of {len(names)} layers before and after"
    return picture("layers", alt, draw, 300)


def _barred(axes: Axes, entries: Sequence[Entry], names: Sequence[str]) -> None:
    """A bar a layer and file."""
    width = 0.84 / len(entries)
    for place, entry in enumerate(entries):
        rows = {row["fqn"]: row for row in entry.layers}
        shown = [(index, rows[name]) for index, name in enumerate(names) if name in rows]
        before, after = ([row[side] for _, row in shown] for side in ("before", "after"))
        if place == 0:
            axes.bar([at for at, _ in shown], before, 0.84, color="none", edgecolor=MUTED, linewidth=0.9)

        shift = (place - (len(entries) - 1) / 2) * width
        colours = [_colour(row) if len(entries) == 1 else colour_of(entry) for _, row in shown]
        axes.bar([at + shift for at, _ in shown], after, width, color=colours)


def _outlined(axes: Axes, entries: Sequence[Entry], names: Sequence[str]) -> None:
    """Hundreds of layers as few lines: bars of one colour are one."""
    for place, entry in enumerate(entries):
        rows = {row["fqn"]: row for row in entry.layers}
        if place == 0:
            before = [rows[name]["before"] if name in rows else 0 for name in names]
            axes.stairs(before, color=MUTED, linewidth=0.7)
        if len(entries) > 1:
            after = [rows[name]["after"] if name in rows else 0 for name in names]
            axes.stairs(after, color=colour_of(entry), linewidth=1.2)
            continue
        for colour in dict.fromkeys(_colour(row) for row in entry.layers):
            own = [rows[name]["after"] if _colour(rows[name]) == colour else 0 for name in names]
            axes.stairs(own, fill=True, color=colour, linewidth=0)


def _colour(row: Json) -> str:
    if row["kept"]:
        return GRID
    heat = heat_of(row["share"])
    return ACCENT if heat is None else HEAT[heat]


def _layer_names(axes: Axes, names: Sequence[str], narrow: bool) -> None:
    axes.margins(x=0.01)
    if len(names) < FEW_LAYERS:
        # Bars as broad as the page say nothing more.
        spare = (FEW_LAYERS - len(names)) / 2
        axes.set_xlim(-0.6 - spare, len(names) - 0.4 + spare)
    most = NAMED_LAYERS // 2 if narrow else NAMED_LAYERS
    if len(names) > most:
        axes.set_xlabel(f"{len(names)} layers")
        axes.set_xticks([])
        return
    shown = [name if len(name) <= 24 else f"…{name[-23:]}" for name in names]
    if len(names) < FEW_LAYERS and max(map(len, names)) < FEW_LAYERS:
        axes.set_xticks(range(len(names)), shown)
    else:
        axes.set_xticks(range(len(names)), shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.tick_params(axis="x", length=0)


def _short(value: float) -> str:
    """12,500,000 as 12.5 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


# ------------------------------------------------------------------------------------------------------------ one layer


def spectrum(name: str, layer: Json) -> Picture:
    """The singular values of one layer's cuts, over the largest, with the ranks that were taken."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        for number, cut in enumerate(layer["cuts"]):
            colour = SERIES[number % len(SERIES)]
            dash = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))[number % 4]
            # Beyond the numerical rank there is only round-off.
            pairs = zip(cut["places"], cut["values"], strict=True)
            known = [(place, value) for place, value in pairs if value > 1e-6]
            axes.plot(*zip(*known, strict=True), color=colour, linestyle=dash, linewidth=1.7)
            taken = dict(known).get(cut["rank"])
            if taken is not None:
                axes.plot(
                    cut["rank"], taken, MARKERS[number % len(MARKERS)], color=colour, markersize=8,
                    markeredgecolor=PAPER, markeredgewidth=1.2,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("singular value, by size")
        axes.set_ylabel("over the largest")

    taken = ", ".join(
        f"{cut['rank']} of {cut['size']} at {cut_name(layer, k)}" for k, cut in enumerate(layer["cuts"])
    )
    alt = f"singular values of {layer['fqn']}, {layer['format']}; taken: {taken}"
    return picture(name, alt, draw, 220, (SPECTRUM_WIDTH,))


# --------------------------------------------------------------------------------------------------- stages and training


def stages(entries: Sequence[Entry]) -> Picture | None:
    """The error of the network's outputs after each stage of the calibration; what was not kept is hatched."""
    shown = [entry for entry in entries if entry.stages]
    if not shown:
        return None
    names = list(dict.fromkeys(stage["stage"] for entry in shown for stage in entry.stages))

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        width = 0.7 / len(shown)
        for place, entry in enumerate(shown):
            for stage in entry.stages:
                if stage["error"] is None:
                    continue
                at = names.index(stage["stage"]) + (place - (len(shown) - 1) / 2) * width
                kept = stage["kept"]
                axes.bar(
                    at, stage["error"], width * 0.94, color=colour_of(entry) if kept else "none",
                    edgecolor=colour_of(entry) if kept else MUTED, hatch=None if kept else "///", linewidth=1,
                )  # fmt: skip
                if len(shown) == 1:
                    text = f"{stage['error']:.4f}"
                    axes.annotate(
                        text,
                        (at, stage["error"]),
                        (0, 3),
                        textcoords="offset points",
                        ha="center",
                        fontsize=9,
                    )
        axes.set_xticks(range(len(names)), names, color=INK)
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("error of the outputs")
        axes.margins(y=0.12)
        axes.yaxis.set_major_locator(MaxNLocator(4))

    words = [f"{stage['stage']} {_stage_words(stage)}" for stage in shown[0].stages]
    return picture("stages", f"error of the network's outputs by stage: {', '.join(words)}", draw, 230)


def _stage_words(stage: Json) -> str:
    value = "not finite" if stage["error"] is None else f"{stage['error']:.4f}"
    return value if stage["kept"] else f"{value}, not kept"


def training(entries: Sequence[Entry]) -> Picture | None:
    """Loss and accuracy by epoch, the best epoch marked."""
    shown = [entry for entry in entries if entry.history]
    if not shown:
        return None

    def draw(figure: Figure, narrow: bool) -> None:
        found: Any = figure.subplots(2 if narrow else 1, 1 if narrow else 2, squeeze=False, sharex=narrow)
        accuracy, loss = found.flatten()
        for entry in shown:
            colour, best = colour_of(entry), entry.best_epoch
            epochs = [(each["epoch"], each["val"]) for each in entry.history]
            accuracy.plot(*zip(*epochs, strict=True), color=colour)
            own = [(e["epoch"], e["train"]) for e in entry.history if e.get("train") is not None]
            if own and len(shown) == 1:
                accuracy.plot(*zip(*own, strict=True), color=MUTED, linestyle=(0, (4, 3)), linewidth=1.4)
            accuracy.plot(
                best, dict(epochs)[best], marker_of(entry), color=colour, markersize=9, markeredgecolor=PAPER,
                markeredgewidth=1.5, zorder=4,
            )  # fmt: skip
            losses = [(e["epoch"], e["loss"]) for e in entry.history if e.get("loss") is not None]
            if losses:
                loss.plot(*zip(*losses, strict=True), color=colour)
        accuracy.set_title("accuracy, %")
        loss.set_title("loss of the training")
        for axes in (accuracy, loss):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axes in found[-1]:
            axes.set_xlabel("epoch")

    best = shown[0].best_epoch
    return picture("training", f"accuracy and loss by epoch; the best is epoch {best}", draw, 300)


# ------------------------------------------------------------------------------------------------------ time and memory


def times(entries: Sequence[Entry]) -> Picture | None:
    """Time and memory of the compressed network over those of the dense one, by batch size."""
    shown = [entry for entry in entries if entry.batches]
    if not shown:
        return None
    sizes = sorted({batch["batch"] for entry in shown for batch in entry.batches})
    has_memory = any(batch.get("memory_ratio") for entry in shown for batch in entry.batches)
    wanted = [("time_ratio", "time"), ("memory_ratio", "peak memory")][: 1 + has_memory]

    def draw(figure: Figure, narrow: bool) -> None:
        found: Any = figure.subplots(
            len(wanted) if narrow else 1, 1 if narrow else len(wanted), squeeze=False
        )
        for axes, (key, title) in zip(found.flatten(), wanted, strict=True):
            width = 0.7 / len(shown)
            for place, entry in enumerate(shown):
                for batch in entry.batches:
                    if batch.get(key) is None:
                        continue
                    at = sizes.index(batch["batch"]) + (place - (len(shown) - 1) / 2) * width
                    axes.bar(at, batch[key], width * 0.94, color=colour_of(entry))
                    axes.annotate(
                        f"{batch[key]:.2f}", (at, batch[key]), (0, 3), textcoords="offset points", ha="center",
                        fontsize=9,
                    )  # fmt: skip
            axes.axhline(1, color=MUTED, linestyle=(0, (5, 4)), linewidth=1.4)
            axes.set_title(f"{title}, over the dense network's (dashed)")
            axes.set_xticks(range(len(sizes)), [f"batch {size:,}" for size in sizes])
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.6, len(sizes) - 0.4)
            axes.margins(y=0.14)
            axes.yaxis.set_major_locator(MaxNLocator(4))

    alt = "time and peak memory of the compressed network over those of the dense one, by batch size"
    return picture("times", alt, draw, 260)
