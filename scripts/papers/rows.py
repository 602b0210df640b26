"""Rows of results: where they are, and how the page prints them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    """Rows that belong together: the title of their section, what runs them, what prints them and draws them."""

    title: str
    runs: Callable[[Where], Runs]
    section: Callable[[Sequence[Row]], Iterator[str]]
    charts: Callable[[Sequence[Row]], dict[str, str]] = lambda rows: {}


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(row["group"], row["row"], row["minutes"], "minutes", flush=True)


def hardware() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def paragraph(text: str) -> Iterator[str]:
    """Lines of a text."""
    yield from textwrap.wrap(" ".join(text.split()), 118)
    yield ""


def minutes(*rows: Row | None) -> str:
    """How long these took."""
    return " + ".join(f"{row['minutes']:.1f}" for row in rows if row) or "-"


def wins(pairs: Iterable[tuple[Row | None, Row | None]]) -> str:
    """In how many pairs of rows that are both there the first has the smaller error; nothing where there is none."""
    both = [(one["ours"]["error"], two["ours"]["error"]) for one, two in pairs if one and two]
    return f"{sum(one < two for one, two in both)} of {len(both)} rows" if both else ""


def header(*names: str) -> Iterator[str]:
    yield cells(*names)
    yield "|" + "---|" * len(names)


def cells(*values: object) -> str:
    return "| " + " | ".join(map(str, values)) + " |"
