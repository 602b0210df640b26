"""What a person sees: results on standard output, everything else on standard error, bars on terminals only."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from ttcompress.records.common import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ttcompress.records.common import Json, Progress

LOGGED_SECONDS = 2.0
"""Shorter stages have no line in a log."""
WIDTH_OF_FILES = 200
"""Columns where output goes to a file or a pipe: wide enough that nothing is cut."""


def write_all_characters() -> None:
    """Write characters that an output has no code for, as one set to ASCII, as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print one JSON object, which holds no NaN."""
    # All else that could order a terminal about is written as its code.
    click.echo(json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines of text, names from outside among them; nothing where there are none."""
    if shown := [printable(line) for line in lines]:
        click.echo("\n".join(shown))


def print_csv(rows: Sequence[Json]) -> None:
    """Print flat objects with the same keys as a table of comma-separated values; lists are written with spaces."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        joined = {
            key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()
        }
        writer.writerow(joined)
    click.echo(out.getvalue(), nl=False)


def print_table(renderable: RenderableType) -> None:
    """Print on a terminal in its width, elsewhere wide enough."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH_OF_FILES)
    console.print(renderable)


def log_epoch(record: Json) -> None:
    """Print one epoch of a training as a line of JSON, for logs."""
    click.echo(json.dumps(record), err=True)


class StageLog:
    """Lines that say how long stages took, for logs."""

    def __init__(self) -> None:
        self._stage = ""
        self._since = time.monotonic()

    def note(self, what: str, done: int, total: int) -> None:
        """A stage goes on, or another one begins, known by the first word of what it does."""
        stage, *_ = what.split()
        # Epochs have lines of their own, which begin with their number.
        if stage != self._stage and not stage[0].isdigit():
            self.end()
            self._stage = stage

    def end(self) -> None:
        """Say how long the stage took that has gone on until now, unless that was nothing."""
        seconds = time.monotonic() - self._since
        if self._stage and seconds >= LOGGED_SECONDS:
            click.echo(f"ttcompress: {printable(self._stage)}, {seconds:.0f} s", err=True)
        self._stage, self._since = "", time.monotonic()


def logs_epochs() -> bool:
    """Whether nobody sees a bar, so that epochs are to be lines of a log."""
    return not sys.stderr.isatty()


@contextmanager
def working(shown: bool = True) -> Iterator[Progress | None]:
    """Show a progress bar on standard error while something runs; in a log a line for each stage that took a while.

    What a user's own code prints meanwhile is no result, and goes to standard error.
    """
    if not shown or not sys.stderr.isatty():
        log = StageLog()
        with redirect_stdout(sys.stderr):
            yield log.note if shown else None
        log.end()
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars,
        redirect_stdout(sys.stderr),
    ):
        task = bars.add_task("reading", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=printable(what), completed=done, total=total or None)

        yield show
