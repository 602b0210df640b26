"""Trainings on a GPU: rows of docs/finetune.md and of the papers' tables, each in a process of its own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from scripts import finetune_table
from scripts.gpu.rows import Place, Row, Run
from scripts.papers import garipov, training, wide
from scripts.papers.rows import Runs, Where


def how(place: Place) -> dict[str, Any]:
    """Options that say how a training runs, not what it does."""
    is_gpu = place.device.type == "cuda"
    return {"precision": "bfloat16", **({"compile": True} if is_gpu else {}), "device": place.device.type}


def published(network: str, ratio: float, epochs: int, place: Place) -> Row:
    """A published checkpoint compressed with calibration, and trained."""
    if place.checkpoints is None or place.cifar10 is None:
        raise SystemExit("these rows need --cifar10 and --checkpoints")
    checkpoint = next(place.checkpoints.glob(f"{network}-*.th"))
    options = {name: value for name, value in how(place).items() if name != "device"}
    arguments = Namespace(folder=place.work, data=place.cifar10, device=place.device.type, options=options)
    arguments.effort = "fast" if place.is_tiny else None
    epochs = place.epochs(epochs)
    row = finetune_table.run(checkpoint, arguments, ratio, epochs, seed=0)
    key = {"network": checkpoint.stem, "ratio": ratio, "epochs": epochs, "seed": 0, "options": options}
    return {**key, **row}


def of_paper(group: str, runs: Callable[[Where], Runs], name: str, epochs: int, place: Place) -> Row:
    """A row of docs/results.jsonl."""
    where = Where(cifar10=place.cifar10, work=place.work, epochs=place.epochs(epochs))
    training.HOW.update(how(place))
    run = dict(runs(where))[name]
    return {"group": group, "row": name, **run()}


CONV = partial(garipov.runs, "conv", garipov.CONV_PAPER)
CONV_FC = partial(garipov.runs, "conv-fc", garipov.CONV_FC_PAPER)
LARGEST = "conv-fc-tt-conv-tt-fc-82.87x"

ROWS: dict[str, Run] = {
    "resnet20 4x": partial(published, "resnet20", 4, 180),
    "resnet32 2.8x": partial(published, "resnet32", 2.8, 180),
    "conv baseline": partial(of_paper, "conv", CONV, "baseline", 100),
    "conv 3.23x, from scratch": partial(of_paper, "conv", CONV, "conv-tt-3.23x, from scratch", 100),
    "resnet20 3x": partial(published, "resnet20", 3, 180),
    "conv-fc baseline": partial(of_paper, "conv-fc", CONV_FC, "baseline", 100),
    "conv-fc 82.87x, from scratch": partial(of_paper, "conv-fc", CONV_FC, f"{LARGEST}, from scratch", 100),
    "conv 3.23x, from pretrained": partial(of_paper, "conv", CONV, "conv-tt-3.23x, from pretrained", 100),
    "wide rank 10": partial(of_paper, "wide", wide.runs, "rank 10", 90),
    "conv-fc 82.87x, from pretrained": partial(
        of_paper, "conv-fc", CONV_FC, f"{LARGEST}, from pretrained", 100
    ),
    "resnet32 dense": partial(published, "resnet32", 1, 180),
    "resnet20 dense": partial(published, "resnet20", 1, 180),
    "resnet20 6.8x": partial(published, "resnet20", 6.8, 180),
    "resnet32 5x": partial(published, "resnet32", 5, 180),
}
"""By name, in order of worth."""
