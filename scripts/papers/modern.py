"""ResNet-20 and ResNet-32 from published checkpoints: all formats against low rank alone, beside published figures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from scripts.papers.rows import FINETUNED, Group, Row, Runs, Where, cells, header, minutes, paragraph, read
from ttcompress.commands.compress import compress_file
from ttcompress.recipe import Recipe

CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
RATIOS = (2, 3, 4, 6, 10)
PUBLISHED = {
    ("resnet20", 2): "PSTRN 90.80 (-0.45) at 2.25x",
    ("resnet20", 3): "SPARK 92.50 (+1.25) at 3.4x, with an unstructured sparse part; TRP 90.62 (-1.12)",
    ("resnet20", 4): "ALDS 90.92 (-0.47), 182 epochs",
    (
        "resnet20",
        6.8,
    ): "PSTRN 89.30 (-1.95) at 6.76x; SPARK 92.13 (+0.88) at 6.8x, with an unstructured sparse part",
    ("resnet32", 6): "T-Basis 91.85 at 5.57x, 1,000 epochs",
    ("resnet32", 10): "T-Basis 90.24 at 10.5x, 1,000 epochs",
    ("resnet32", 2.8): "ADMM-Tucker 93.29 (+0.80) at 2.81x, ADMM-TT 93.05 (+0.56) at 2.78x, 400 epochs",
    ("resnet32", 4): "TRP 91.39 (-0.87) at 4.27x",
}
SOURCES = """PSTRN: Li et al. 2021, Complex & Intelligent Systems; TRP: Xu et al. 2020, IJCAI; SPARK: Yang et al. 2021;
    ALDS: Liebenwein et al. 2021, NeurIPS; T-Basis: Obukhov et al. 2020, ICML; ADMM: Yin et al. 2021, CVPR"""


def runs(where: Where) -> Runs:
    for ratio in RATIOS:
        for network in CHECKPOINTS:
            for formats in ("auto", "lowrank"):
                yield f"{network} {ratio}x {formats}", partial(measured, where, network, ratio, formats)


def measured(where: Where, network: str, ratio: int, formats: str) -> Row:
    source, data = where.need("checkpoints") / CHECKPOINTS[network], where.need("cifar10")
    recipe = Recipe(ratio=ratio, format=formats, calib=data, data=data, seed=0, arch=network)
    with tempfile.TemporaryDirectory() as folder:
        report = compress_file(source, Path(folder) / "out.safetensors", recipe)
    accuracy = report.accuracy or {}
    ours = {
        "dense": accuracy["dense"],
        "compressed": accuracy["compressed"],
        "compression": report.plan.compression,
    }
    return {"ours": ours, "n": accuracy["n"], "seeds": 1, "epochs": 0}


def section(rows: Sequence[Row]) -> Iterator[str]:
    yield from paragraph(f"""
        CIFAR-10 test set of 10,000 images, published checkpoints, compression over all parameters.
        Calibrated: 1,024 training images, no labels, no training; *all formats* is the default, *low rank*
        allows the format `lowrank` alone. Trained: what another calibration came to, and 30 epochs after it
        ([finetune.md](finetune.md)), from 4x on and of ResNet-32 in bfloat16; in brackets the dense network trained
        as long. Minutes are those of the calibrations. Published figures start from other checkpoints; the change is
        against their own baseline ({SOURCES}).
        """)
    whole = {row["row"]: row for row in rows}
    # In float32 where there is such a row, else in bfloat16.
    recipes: list[Row] = [{"precision": "bfloat16"}, {}]
    trained = {
        (row["network"].split("-")[0], row["ratio"]): row
        for options in recipes
        for row in read(FINETUNED)
        if row["epochs"] == 30 and row["options"] == options
    }
    yield from header(
        "network",
        "compression",
        "dense",
        "calibrated, all formats",
        "low rank",
        "trained",
        "best published",
        "minutes, calibrated",
    )
    for network in CHECKPOINTS:
        control = trained.get((network, 1))
        for ratio in sorted({*RATIOS, *(other for name, other in trained if name == network and other > 1)}):
            both = [whole.get(f"{network} {ratio:g}x {formats}") for formats in ("auto", "lowrank")]
            after = trained.get((network, ratio))
            known = next((row["ours"] for row in both if row), after)
            yield cells(
                network,
                f"{ratio:g}x",
                f"{known['dense']:.2f}" + (f" ({control['compressed']:.2f})" if control else "")
                if known
                else "-",
                *(f"{row['ours']['compressed']:.2f}" if row else "not run" for row in both),
                f"{after['before']:.2f}, {after['compressed']:.2f}" if after else "not run",
                PUBLISHED.get((network, ratio), "-"),
                minutes(*both),
            )


GROUP = Group("ResNet-20 and ResNet-32", runs, section, needs=("cifar10", "checkpoints"))
