"""The papers' experiments: python -m scripts.papers GROUP... [--row NAME] [--cifar10 DATA --mnist DATA ...]

Runs the rows of the named groups and appends each, as one line of JSON, to docs/results.jsonl. Rows that are there are
not run again and trainings that were stopped go on, so that the same command can be repeated until all is done.
Without a group docs/results.md and its pictures are written from the lines.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.papers import cost, garipov, int8, mnist, modern, vgg, wide
from scripts.papers.headlines import with_headlines
from scripts.papers.rows import DOCS, PAGE, README, RESULTS, Row, Where, append, hardware, paragraph, read
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", choices=[[], *GROUPS], help=", ".join(GROUPS))
    parser.add_argument("--row", help="only this one")
    parser.add_argument("--cifar10", help="cifar10:ROOT")
    parser.add_argument("--mnist", help="mnist:ROOT")
    parser.add_argument("--checkpoints", type=Path, help="folder of the published CIFAR-10 ResNets")
    parser.add_argument("--epochs", type=int, default=Where.epochs, help="of conv, conv-fc and wide, in all (100)")
    parser.add_argument("--work", type=Path, default=Where.work, help="keeps networks and the states of trainings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    where = Where(arguments.cifar10, arguments.mnist, arguments.checkpoints, arguments.work, arguments.epochs)
    for group in arguments.groups:
        for name, run in GROUPS[group].runs(where):
            done = any((row["group"], row["row"]) == (group, name) for row in read(arguments.results))
            if not done and arguments.row in (None, name):
                start = time.perf_counter()
                try:
                    row = {"group": group, "row": name, **run(), "hardware": hardware()}
                except TTCompressError as error:
                    sys.exit(f"{group} {name}: {error}")
                append(arguments.results, {**row, "minutes": round((time.perf_counter() - start) / 60, 2)})
    if not arguments.groups:
        rows = read(arguments.results)
        PAGE.write_text(page(rows))
        for name, chart in charts(rows).items():
            (DOCS / name).write_text(chart)
        README.write_text(with_headlines(README.read_text(), rows))


def page(rows: Sequence[Row]) -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        *paragraph(
            """
            The papers' figures beside ours, written by `python -m scripts.papers` from results.jsonl and rows.jsonl
            beside this page. One row again: `python -m scripts.papers GROUP --row NAME --results FILE`. Minutes are
            those of the hardware below each table; where a row was stopped and went on, of its last call.
            """
        ),
    ]
    for name, group in GROUPS.items():
        own = [row for row in rows if row["group"] == name]
        lines += [f"## {group.title}", ""]
        if own:
            minutes = sum(row["minutes"] for row in own)
            where = ", ".join(dict.fromkeys(row["hardware"] for row in own))
            text = "\n".join(group.section(own)).rstrip("\n")
            count = f"{len(own)} row{'s' * (len(own) > 1)}"
            lines += [text, "", f"Group `{name}`: {count}, {minutes:.0f} minutes ({where}).", ""]
        else:
            lines += [f"Not run: `python -m scripts.papers {name}`.", ""]
    return "\n".join(lines)


def charts(rows: Sequence[Row]) -> dict[str, str]:
    """The pictures of the page by file name."""
    own = {name: [row for row in rows if row["group"] == name] for name in GROUPS}
    return {
        file: chart for name, group in GROUPS.items() if own[name] for file, chart in group.charts(own[name]).items()
    }


if __name__ == "__main__":
    main()
