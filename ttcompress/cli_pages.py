"""`--html` of the verbs: where the page goes, what it shows beside a report, and that it is written last."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import cloup

from ttcompress.errors import CheckpointError
from ttcompress.records.common import Json, printable
from ttcompress.records.extras import Extras

SUFFIXES = (".html", ".htm")
WORDS = "ttcompress.words"
FOLDER = re.compile(r"(?:^|(?<=[=:,]))(?:~?[/\\]|[A-Za-z]:[/\\])[^:=,]*")
"""A path from the root of a machine in a word of a command: alone, or after the kind of data that it names."""


class Verb(cloup.Command):
    """A command that remembers the words that it was called with."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep them where a page finds them."""
        ctx.meta[WORDS] = list(args)
        return super().parse_args(ctx, args)


def command_line() -> str:
    """The command that runs, as a shell takes it, without the folders of this machine.

    >>> without_folders("cifar10:/home/me/data/cifar10"), without_folders("/tmp/net.pt"), without_folders("2.5")
    ('cifar10:cifar10', 'net.pt', '2.5')
    """
    context = click.get_current_context()
    words = [str(context.info_name), *map(without_folders, context.meta.get(WORDS, ()))]
    return printable(f"ttcompress {shlex.join(words)}")


def without_folders(word: str) -> str:
    """A word of a command with the names of files in the place of absolute paths."""
    return FOLDER.sub(lambda path: re.split(r"[/\\]", path[0].rstrip("/\\"))[-1], word)


@dataclass
class PageRequest:
    """A page that is to be written once a command is done."""

    path: Path
    extras: Extras = field(default_factory=Extras)
    started: float = field(default_factory=time.perf_counter)

    def stopped(self) -> Json:
        """What the page shows beside reports, with the time that the command took, as JSON."""
        self.extras.seconds = round(time.perf_counter() - self.started, 3)
        return self.extras.to_json()

    def write(self, data: Sequence[Json], **words: Any) -> None:
        """Write the page of what `--json` prints of one or more files; the first has the samples."""
        from ttcompress.report.entries import Entry
        from ttcompress.report.html import render, write_page

        images = self.extras.images
        entries = [Entry(each, number, images if number == 0 else ()) for number, each in enumerate(data)]
        write_page(self.path, render(entries, self.extras.command, **words))

    def write_sweep(self, shown: Json, reports: Sequence[Json]) -> None:
        """Write the page of a sweep: `shown` is what `--json` prints, `reports` are those of its points."""
        from ttcompress.report.entries import Entry
        from ttcompress.report.html import render, write_page

        # Singular values and samples are of the first point that was made.
        beside = [{**shown["page"]}, *({} for _ in reports[1:])]
        entries = [
            Entry(
                {**report, "page": {**known, "format": point["format"]}},
                number,
                self.extras.images,
                point["smallest"],
            )
            for number, (report, known, point) in enumerate(
                zip(reports, beside, shown["points"], strict=True)
            )
        ]
        title = f"{shown['source']} at {len(entries)} sizes"
        mark = "" if shown["max_drop"] is None else f"smallest within {shown['max_drop']:g} points"
        write_page(self.path, render(entries, self.extras.command, title, mark))


def sweep_page(path: Path | None, folder: Path, force: bool) -> PageRequest:
    """The page of a sweep: in its folder, where an older one of it is replaced, or where `--html` says."""
    asked = asked_page(path, force)
    if asked is not None:
        return asked
    own = folder / "index.html"
    if own.exists() and not force and not _is_page(own):
        raise CheckpointError(
            f"{own}: exists and is no page of ours; choose another name, or --force to replace it"
        )
    return PageRequest(own, Extras(command=command_line()))


def _is_page(file: Path) -> bool:
    with file.open("rb") as held:
        return b"ttcompress</title>" in held.read(2000)


def asked_page(path: Path | None, force: bool) -> PageRequest | None:
    """The page that `--html` asks for, None where it is not given.

    Raises:
        CheckpointError: it cannot be written there.
    """
    if path is None:
        return None
    from ttcompress.files.output import check_output

    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{path}: end the name of a page in .html")
    check_output(path, force)
    return PageRequest(path, Extras(command=command_line()))
