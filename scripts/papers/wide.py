"""Wide and shallow, Novikov et al. 2015, section 6.2.1: 262,144 hidden units in TT form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from scripts.papers.rows import Group, Row, Runs, Where, cells, header, minutes, paragraph, trained_for
from scripts.papers.training import from_scratch, measured, recipe_of
from ttcompress.report.text import format_bytes

# Top-1 accuracy in the authors' logs, by TT-rank.
PAPER = {2: 69.5, 4: 69.8, 10: 71.3, 20: 69.0}
PROCESS = Path("/proc/self")
DENSE_PEER = "a dense 3072-4096x4-10 network has 59.3"


def runs(where: Where) -> Runs:
    for rank in PAPER:
        yield f"rank {rank}", partial(rank_row, where, rank)


def rank_row(where: Where, rank: int) -> Row:
    recipe = f"cifar10/wide-r{rank}"
    forget_peak()
    report = from_scratch(
        where.work / f"wide-r{rank}-{where.epochs}.safetensors",
        replace(recipe_of(recipe), epochs=where.epochs),
        where.need("cifar10"),
    )
    plan = report.plan
    ours = {
        "params": plan.params_after,
        "dense_params": plan.params_before,
        "core_params": [layer.params_after for layer in plan.layers],
        "peak_bytes": peak_bytes(),
    }
    return measured(recipe, report, ours, where.epochs)


def forget_peak() -> None:
    """Let the peak of this process begin at what it holds now (proc(5)); other systems than Linux do not tell."""
    # Not every sandbox has the file.
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int | None:
    lines = (PROCESS / "status").read_text().splitlines() if PROCESS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def section(rows: Sequence[Row]) -> Iterator[str]:
    yield from paragraph(
        f"""
        3072 = 4,4,4,4,4,3 to 8^6 = 262,144 to 4^6 = 4,096 to 10, batch norm, ReLU and dropout 0.6 after both TT layers,
        SGD 0.06, CIFAR-10 without augmentation, from scratch. The authors' logs have 40,000 steps of 100 images, 80
        epochs, and {DENSE_PEER}; 40,000 steps are 89 of our epochs, as 5,000 images choose the epoch.
        A row of few epochs shows memory and time, not what the network can do. Peak memory is that of the whole
        process, training included.
        """
    )
    yield from header(
        "TT-rank",
        "cores",
        "all parameters",
        "dense parameters",
        "dense weights",
        "peak memory",
        "epochs",
        "top-1, logs",
        "ours",
        "minutes",
    )
    found = {row["row"]: row for row in rows}
    for rank, top1 in PAPER.items():
        row = found.get(f"rank {rank}")
        if row is None:
            yield cells(rank, *["-"] * 6, top1, "not run", "-")
            continue
        ours = row["ours"]
        yield cells(
            rank,
            " + ".join(f"{count:,}" for count in ours["core_params"]),
            f"{ours['params']:,}",
            f"{ours['dense_params']:,}",
            format_bytes(4 * ours["dense_params"]),
            format_bytes(ours["peak_bytes"]) if ours["peak_bytes"] else "-",
            trained_for(row),
            top1,
            f"{100 - ours['error']:.2f}",
            minutes(row),
        )


GROUP = Group(
    "Wide and shallow (Novikov et al. 2015, section 6.2.1)",
    runs,
    section,
    needs=("cifar10", "epochs", "work"),
)
