"""Rows of results: where they are, and how the page prints them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Runs = Iterator[tuple[str, Callable[[], Row]]]
ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs", ROOT / "README.md"
RESULTS, PAGE, FINETUNED = DOCS / "results.jsonl", DOCS / "results.md", DOCS / "rows.jsonl"


@dataclass(frozen=True)
class Where:
    """What rows need that is not in the repository, and where what they make is kept."""

    cifar10: str | None = None
    mnist: str | None = None
    checkpoints: Path | None = None
    work: Path = Path("papers-work")
    epochs: int = 100

    def need(self, name: str) -> Any:
        """The value of one of these options.

        Raises:
            SystemExit: it is not given.
        """
        value = getattr(self, name)
        if value is None:
            raise SystemExit(f"these rows need --{name}")
        return value


@dataclass(frozen=True)
class Group:
    """Rows that belong together: the title of their section, what runs them, what prints them and draws them.

    `needs` names the fields of `Where` that its rows are made with.
    """

    title: str
    runs: Callable[[Where], Runs]
    section: Callable[[Sequence[Row]], Iterator[str]]
    charts: Callable[[Sequence[Row]], dict[str, str]] = lambda rows: {}
    needs: tuple[str, ...] = ()


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(row["group"], row["row"], row["minutes"], "minutes", flush=True)


def hardware() -> str:
    """What the rows of this process are computed on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else on_cpu(torch.get_num_threads())


def on_cpu(threads: int) -> str:
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def paragraph(text: str) -> Iterator[str]:
    """Lines of a text."""
    yield from textwrap.wrap(" ".join(text.split()), 118, break_on_hyphens=False)
    yield ""


def trained_for(row: Row) -> str:
    """Its epochs, and their precision where that is not float32."""
    precision = row.get("precision", "float32")
    return str(row["epochs"]) if precision == "float32" else f"{row['epochs']}, {precision}"


def minutes(*rows: Row | None) -> str:
    """How long these took."""
    return " + ".join(f"{row['minutes']:.1f}" for row in rows if row) or "-"


def wins(pairs: Iterable[tuple[Row | None, Row | None]]) -> str:
    """How often the first of two rows that are both there is better, and how often worse, by more than noise.

    Noise is two standard errors of the difference of two error rates, from the number of test images alone.
    """
    differences = [
        (one["ours"]["error"] - two["ours"]["error"]) / sqrt(variance(one) + variance(two))
        for one, two in pairs
        if one and two
    ]
    better, worse = sum(each < -2 for each in differences), sum(each > 2 for each in differences)
    rest = len(differences) - better - worse
    return f"{better} of {len(differences)} rows better, {worse} worse, {rest} within two standard errors"


def variance(row: Row) -> float:
    """Of an error in percent, from the number of images that it was measured on."""
    error = row["ours"]["error"]
    return float(error * (100 - error) / row["n"])


def header(*names: str) -> Iterator[str]:
    yield cells(*names)
    yield "|" + "---|" * len(names)


def cells(*values: object) -> str:
    return "| " + " | ".join(map(str, values)) + " |"
