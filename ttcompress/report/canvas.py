"""Figures by matplotlib as SVG that takes its colours and its type from the page that it stands in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER, ACCENT = "#010203", "#010204", "#010205", "#010206", "#010207"
"""Colours that no figure has: each becomes a variable of the page's style sheet, which differs in the dark."""
SERIES = tuple(f"#01030{place}" for place in range(8))
HEAT = tuple(f"#01040{place}" for place in range(5))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SIGNS = ("●", "■", "▲", "◆", "▼", "✚", "✖", "★")
"""The same in the legend of the page."""

VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    ACCENT: "accent",
    **{colour: f"series-{place}" for place, colour in enumerate(SERIES)},
    **{colour: f"heat-{place}" for place, colour in enumerate(HEAT)},
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ttcompress",
    # Names of layers and files are no formulas.
    "text.parse_math": False,
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.0,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "ytick.major.size": 0.0,
    "lines.linewidth": 2.0,
    "lines.markersize": 7.0,
    "hatch.color": MUTED,
    "hatch.linewidth": 0.8,
    "figure.facecolor": "none",
}
DOTS = 72
"""Of an inch: matplotlib's SVG has one unit a point."""
WIDE, NARROW = 760, 360
"""Widths of the two drawings of a picture, the second for telephones."""
_TAG = re.compile("<[^>]*>")
_NAME = re.compile(r' *\bid="([^"]+)"|url\(#([^)]+)\)|xlink:href="#([^"]+)"')
_FONT = re.compile(r"font: (?:(bold|\d+) )?([\d.]+)px [^;\"]*|font-family: [^;\"]*; ?")
_LONG = re.compile(r"(\d+\.\d\d)\d+")


@dataclass(frozen=True)
class Picture:
    """A figure in one or two widths, with the words that stand for it."""

    alt: str
    drawings: tuple[str, ...]


Draw = Callable[[Figure, bool], object]
"""Draws a figure, told whether it is narrow."""


def picture(
    name: str, alt: str, draw: Draw, height: float, widths: Sequence[int] = (WIDE, NARROW)
) -> Picture:
    """A figure in every width; no other one of its page has this name."""
    return Picture(alt, tuple(_svg(f"{name}-{width}", alt, draw, width, height) for width in widths))


def _svg(name: str, alt: str, draw: Draw, width: int, height: float) -> str:
    out = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(STYLE), warnings.catch_warnings():
        # The page's fonts have letters that matplotlib's own font lacks.
        warnings.simplefilter("ignore")
        figure = Figure((width / DOTS, height / DOTS), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, width < WIDE)
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)

    body = _for_page(out.getvalue(), name)
    return f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(alt)}">{body}'


def _for_page(svg: str, name: str) -> str:
    """Without what only a file of its own needs, in colours of the page, with names that no other figure has."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)

    referred = [found[2] or found[3] for tag in _TAG.findall(body) for found in _NAME.finditer(tag)]
    names = {each: f"{name}-{place}" for place, each in enumerate(dict.fromkeys(filter(None, referred)))}
    body = _TAG.sub(lambda tag: _tag_for_page(tag[0], names), body)
    return re.sub(r"\n\s*", "\n", body).strip()


def _tag_for_page(tag: str, names: Mapping[str, str]) -> str:
    """What texts say is not touched, only the marks around them."""

    def renamed(found: re.Match[str]) -> str:
        if found[1]:
            return f' id="{names[found[1]]}"' if found[1] in names else ""
        return f"url(#{names[found[2]]})" if found[2] else f'xlink:href="#{names[found[3]]}"'

    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable})")
    tag = _FONT.sub(_sized, tag)
    # Hundredths of a pixel are as sharp as any screen.
    return _LONG.sub(r"\1", _NAME.sub(renamed, tag))


def _sized(font: re.Match[str]) -> str:
    """The size of a font alone, its family is that of the page."""
    if not font[2]:
        return ""
    return f"font-size: {font[2]}px" + ("; font-weight: 600" if font[1] else "")


def plain(axes: Axes) -> None:
    """Axes without anything but what is drawn on them."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
