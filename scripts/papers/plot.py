"""A scatter plot with lines as SVG by matplotlib, the same bytes for the same points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from math import ceil, floor, log10

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

SIZE = 760 / 72, 420 / 72
"""In inches; matplotlib's SVG has one unit a point."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0508f", "#b98300", "#2e97d6", "#5a5a5a")
MARKERS = "os^DvPX"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "ttcompress", "text.parse_math": False}
Points = Sequence[tuple[float, float]]


def chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points], most: float) -> str:
    """Series of (x, y) by name, x on a logarithmic axis in whole decades, y from 0 to `most`; points above are cut."""
    found = [x for points in series.values() for x, _ in points]
    out = StringIO()

    with rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, (name, points) in enumerate(series.items()):
            placed = [(x, min(y, most)) for x, y in sorted(points)]
            look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            axes.plot(*zip(*placed, strict=True), label=name, clip_on=False, gid=f"series-{number}", **look)

        axes.set_xscale("log")
        axes.set_xlim(10.0 ** floor(log10(min(found))), 10.0 ** ceil(log10(max(found))))
        axes.set_ylim(0, most)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside right upper", frameon=False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return out.getvalue()
