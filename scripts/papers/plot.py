"""A scatter plot with lines as SVG, the same bytes for the same points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 190, 34, 48
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8a4fbe", "#c77700", "#444444", "#00798c")
Points = Sequence[tuple[float, float]]


def chart(title: str, x_label: str, y_label: str, series: Mapping[str, Points], most: float) -> str:
    """Series of (x, y) by name, x on a logarithmic axis in whole decades, y from 0 to `most`; points above are cut."""
    found = [x for points in series.values() for x, _ in points]
    low, high = floor(log10(min(found))), ceil(log10(max(found)))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (log10(x) - low) / (high - low) * (right - LEFT)
        return round(across, 1), round(bottom - min(y, most) / most * (bottom - TOP), 1)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, title, size=14),
        _text((LEFT + right) / 2, HEIGHT - 10, x_label, "middle"),
        f'<g transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)">{_text(0, 0, y_label, "middle")}</g>',
    ]
    for decade in range(low, high + 1):
        x, _ = at(10.0**decade, 0)
        lines += [_line(x, TOP, x, bottom), _text(x, bottom + 16, f"{10**decade:,}", "middle")]
    step = next(step for step in (0.5, 1, 2, 5, 10, 20) if most / step <= 8)
    for tick in range(int(most / step) + 1):
        _, y = at(10.0**low, tick * step)
        lines += [_line(LEFT, y, right, y), _text(LEFT - 6, y + 4, f"{tick * step:g}", "end")]
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [at(x, y) for x, y in sorted(points)]
        path = " ".join(f"{x},{y}" for x, y in placed)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        lines += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in placed]
        y = TOP + 10 + 20 * index
        lines += [
            f'<circle cx="{right + 16}" cy="{y}" r="4" fill="{colour}"/>',
            _text(right + 26, y + 4, name),
        ]
    return "\n".join([*lines, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escaped}</text>'
