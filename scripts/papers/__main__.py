"""The papers' experiments: python -m scripts.papers GROUP... [--row NAME] [--cifar10 DATA --mnist DATA ...]

Runs the rows of the named groups and appends each, as one line of JSON, to docs/results.jsonl. Rows that are there are
not run again and trainings that were stopped go on, so that the same command can be repeated until all is done.
Without a group docs/results.md and its pictures are written from the lines. `int8` needs the extra `papers`.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.papers import cost, garipov, int8, mnist, modern, vgg, wide
from scripts.papers.headlines import with_headlines
from scripts.papers.rows import (
    DOCS,
    PAGE,
    README,
    RESULTS,
    Group,
    Row,
    Where,
    append,
    hardware,
    paragraph,
    read,
)
from ttcompress.errors import TTCompressError

GROUPS = {
    "mnist": mnist.GROUP,
    "conv": garipov.CONV,
    "conv-fc": garipov.CONV_FC,
    "vgg": vgg.GROUP,
    "cost": cost.GROUP,
    "wide": wide.GROUP,
    "int8": int8.GROUP,
    "modern": modern.GROUP,
}

ON_A_GPU = """
    Not run (an epoch of the `conv` baseline took 2.0 s on an H200, beside two other trainings): `conv`, `conv-fc` (baselines, 3.23x and
    82.87x, from scratch and from pretrained) with the paper's 100 epochs and `wide` at rank 10 with 90, in bfloat16. On a machine with a
    GPU one command runs these and the rows of finetune.md and speed.md, in order of worth, as far as the minutes go, and goes on from
    there when it is repeated; its lines belong into results.jsonl and rows.jsonl:
"""
GPU_COMMAND = "python -m scripts.gpu MINUTES --cifar10 cifar10:ROOT --checkpoints FOLDER --results FILE"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", choices=[[], *GROUPS], help=", ".join(GROUPS))
    parser.add_argument("--row", help="only this one")
    parser.add_argument("--cifar10", help="cifar10:ROOT")
    parser.add_argument("--mnist", help="mnist:ROOT")
    parser.add_argument("--checkpoints", type=Path, help="folder of the published CIFAR-10 ResNets")
    parser.add_argument(
        "--epochs", type=int, default=Where.epochs, help="of conv, conv-fc and wide, in all (100)"
    )
    parser.add_argument(
        "--work", type=Path, default=Where.work, help="keeps networks and the states of trainings"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    where = Where(arguments.cifar10, arguments.mnist, arguments.checkpoints, arguments.work, arguments.epochs)
    if arguments.row:
        check_row(arguments.row, arguments.groups, where, arguments.results)
    for group in arguments.groups:
        for name, run in GROUPS[group].runs(where):
            if not is_done(group, name, arguments.results) and arguments.row in (None, name):
                start = time.perf_counter()
                try:
                    row = {"group": group, "row": name, "hardware": hardware(), **run()}
                except TTCompressError as error:
                    sys.exit(f"{group} {name}: {error}")
                append(arguments.results, {**row, "minutes": round((time.perf_counter() - start) / 60, 2)})
    if not arguments.groups:
        rows = read(arguments.results)
        PAGE.write_text(page(rows))
        for name, chart in charts(rows).items():
            (DOCS / name).write_text(chart)
        README.write_text(with_headlines(README.read_text(), rows))


def check_row(name: str, groups: Sequence[str], where: Where, results: Path) -> None:
    """See that one row can be run.

    Raises:
        SystemExit: no group has it, or it is there.
    """
    known = [row for group in groups for row, _ in GROUPS[group].runs(where)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.3)
        sys.exit(f"--row {name}: no such row; close to it are {', '.join(map(repr, close)) or 'none'}")
    if all(is_done(group, name, results) for group in groups):
        sys.exit(f"--row {name}: {results} has it; name another file with --results to run it again")


def is_done(group: str, name: str, results: Path) -> bool:
    return any((row["group"], row["row"]) == (group, name) for row in read(results))


def page(rows: Sequence[Row]) -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        *paragraph(
            """
            The papers' figures beside ours, written by `python -m scripts.papers` from results.jsonl and rows.jsonl
            beside this page. Below each table is the command that runs one of its rows again. Minutes are those of the
            hardware named there, beside other work; where a row was stopped and went on, of its last call, and a dense
            network that several rows start from is in the minutes of the first alone: one row in an empty folder
            trains it too.
            """
        ),
    ]
    for name, group in GROUPS.items():
        own = [row for row in rows if row["group"] == name]
        lines += [f"## {group.title}", ""]
        if own:
            minutes = sum(row["minutes"] for row in own)
            where = " and ".join(dict.fromkeys(row["hardware"] for row in own))
            text = "\n".join(group.section(own)).rstrip("\n")
            count = f"{len(own)} row{'s' * (len(own) > 1)}"
            lines += [
                text,
                "",
                f"Group `{name}`: {count}, {minutes:.0f} minutes ({where}). One row again:",
                "",
            ]
            lines += [f"    {command(name, group, own[-1])}", ""]
        else:
            lines += [f"Not run: `python -m scripts.papers {name}`.", ""]
    lines += ["## On a GPU", "", *paragraph(ON_A_GPU), f"    {GPU_COMMAND}", ""]
    return "\n".join(lines)


def command(name: str, group: Group, row: Row) -> str:
    """What runs a row again, on its own."""
    values = {
        "cifar10": "cifar10:ROOT",
        "mnist": "mnist:ROOT",
        "checkpoints": "FOLDER",
        "work": "EMPTY-FOLDER",
        "epochs": row.get("epochs"),
    }
    options = {
        "row": shlex.quote(row["row"]),
        **{need: values[need] for need in group.needs},
        "results": "FILE",
    }
    return " ".join(
        [f"python -m scripts.papers {name}", *(f"--{key} {value}" for key, value in options.items())]
    )


def charts(rows: Sequence[Row]) -> dict[str, str]:
    """The pictures of the page by file name."""
    own = {name: [row for row in rows if row["group"] == name] for name in GROUPS}
    return {
        file: chart
        for name, group in GROUPS.items()
        if own[name]
        for file, chart in group.charts(own[name]).items()
    }


if __name__ == "__main__":
    main()
