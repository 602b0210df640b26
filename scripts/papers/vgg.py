"""Novikov et al. 2015, table 2: parameters and files of VGG-16 and VGG-19, with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision

from scripts.papers.rows import ROOT, Group, Row, Runs, Where, cells, header, paragraph
from ttcompress.commands.compress import compress_file
from ttcompress.recipe import Recipe
from ttcompress.records.common import compression, format_compression
from ttcompress.report.text import format_bytes

# Of the FC layers that are replaced, of VGG-16 and of VGG-19; top-1 and top-5 error of both in percent.
PAPER = {
    "FC FC FC": (1, 1, 1, (30.9, 11.2), (29.0, 10.1)),
    "TT4 FC FC": (50972, 3.9, 3.5, (31.2, 11.2), (29.8, 10.4)),
    "TT2 FC FC": (194622, 3.9, 3.5, (31.5, 11.5), (30.4, 10.9)),
    "TT1 FC FC": (713614, 3.9, 3.5, (33.3, 12.8), (31.9, 11.8)),
    "TT4 TT4 FC": (37732, 7.4, 6, (32.2, 12.3), (31.6, 11.7)),
    "MR1 FC FC": (3521, 3.9, 3.5, (99.5, 97.6), (99.8, 99)),
    "MR5 FC FC": (704, 3.9, 3.5, (81.7, 53.9), (79.1, 52.4)),
    "MR50 FC FC": (70, 3.7, 3.4, (36.7, 14.9), (34.5, 15.8)),
}


def runs(where: Where) -> Runs:
    del where
    for index, name in enumerate(("vgg16", "vgg19")):
        for row, (layers, *networks, errors16, errors19) in PAPER.items():
            errors = (errors16, errors19)[index]
            paper = {
                "layers": layers,
                "network": networks[index],
                "top1_error": errors[0],
                "top5_error": errors[1],
            }
            yield f"{name} {row}", partial(measured, name, row, paper)


def measured(name: str, row: str, paper: Row) -> Row:
    """The real file of a network with random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / f"{name}.pt", Path(folder) / "out.safetensors"
        network = getattr(torchvision.models, name)()
        torch.save(network.state_dict(), source)
        dense = source.stat().st_size
        if row == "FC FC FC":
            params = sum(parameter.numel() for parameter in network.parameters())
            return {
                "paper": paper,
                "ours": {"params": params, "file_bytes": dense, "layers": 1.0, "network": 1.0},
            }
        recipe = f"{name}-{row.lower().replace(' ', '-')}"
        report = compress_file(source, output, Recipe.from_toml(ROOT / "recipes" / f"{recipe}.toml"))
        plan = report.plan
        before, after = (
            sum(getattr(each, side) for each in plan.layers) for side in ("params_before", "params_after")
        )
        ours = {
            "params": plan.params_after,
            "file_bytes": output.stat().st_size,
            "layers": compression(before, after),
            "network": plan.compression,
        }
        return {"recipe": recipe, "paper": paper, "ours": ours}


def section(rows: Sequence[Row]) -> Iterator[str]:
    yield from paragraph("""
        Parameters and file sizes are exact (random weights, float32). The error columns are the paper's,
        for networks trained in TT form on ImageNet; ours need ImageNet, which was not available, and are
        not run: `ttcompress compress vgg16.pt --recipe RECIPE --data imagefolder:ROOT`, then `ttcompress
        finetune`, measures them.
        """)
    yield from header(
        "row",
        "layers, paper",
        "ours",
        "network, paper",
        "ours",
        "parameters",
        "file",
        "top-1 / top-5 error, paper",
        "ours",
    )
    for row in rows:
        paper, ours = row["paper"], row["ours"]
        yield cells(
            row["row"],
            f"{paper['layers']:,}x",
            format_compression(ours["layers"]),
            f"{paper['network']}x",
            format_compression(ours["network"]),
            f"{ours['params']:,}",
            format_bytes(ours["file_bytes"]),
            f"{paper['top1_error']} / {paper['top5_error']}",
            "not run",
        )


GROUP = Group("VGG-16 and VGG-19 (Novikov et al. 2015, table 2)", runs, section)
