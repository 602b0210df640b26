"""Trainings behind the rows: each goes on where it was stopped, and what others build on is trained once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.papers.rows import ROOT, Row
from ttcompress.commands.compress import compress_file
from ttcompress.commands.evaluate import evaluate_file
from ttcompress.commands.finetune import finetune_file, state_file
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json
from ttcompress.records.report import Report
from ttcompress.report.text import read_report

HOW: dict[str, Any] = {}
"""Options of all trainings of this process that say how they run (precision, compile, device), not what they do."""


def trained(output: Path, recipe: Recipe, source: Path | None = None, origin: Path | None = None) -> Report:
    """`finetune`, going on with what an interrupted call has left."""
    output.parent.mkdir(exist_ok=True)
    return finetune_file(
        source,
        output,
        replace(recipe, **HOW),
        force=True,
        resume=state_file(output).exists(),
        origin=origin,
        log=_told(output),
    )


def _told(output: Path) -> Any:
    return lambda line: print(output.stem, line, flush=True)


def from_scratch(output: Path, recipe: Recipe, data: str) -> Report:
    """A network of random weights trained and measured, dense or in TT form as the recipe says."""
    return trained(output, replace(recipe, from_scratch=True, train=data, data=data))


def dense(output: Path, recipe: Recipe, data: str, epochs: int) -> Path:
    """The network of a recipe without its layer rules, trained for some epochs; a file that is there is taken."""
    if not output.exists():
        report = from_scratch(output, replace(recipe, layers=(), include=(), epochs=epochs), data)
        _training_of(output).write_text(json.dumps(report.finetuning))
    return output


def _training_of(file: Path) -> Path:
    """Where it is said how a dense network was trained, which its own file does not say."""
    return file.with_suffix(".json")


def from_pretrained(
    source: Path,
    recipe: Recipe,
    data: str,
    epochs: int,
    stem: Path,
    lr: float | None = None,
    distill: float | None = None,
    seed: int = 0,
) -> tuple[Report, Row]:
    """TT-SVD, calibration and training of a dense network; the last report and the errors on the way.

    The training has the defaults of `finetune` but for its rate and the share of its teacher, the dense network. The
    seed is that of the training alone: others start from the same calibrated network.
    """
    goal = Recipe(arch=recipe.arch, layers=recipe.layers, include=recipe.include, seed=0, data=data)
    start = stem.with_name(f"{stem.name}-start.safetensors")
    plain = compressed(source, stem.with_name(f"{stem.name}-plain.safetensors"), goal)
    calibrated = compressed(source, start, replace(goal, calib=data))
    training = Recipe(
        train=data, data=data, epochs=epochs, lr=lr, distill=distill, augment=recipe.augment, seed=seed
    )
    suffix = f"-{seed}" if seed else ""
    report = trained(stem.with_name(f"{stem.name}{suffix}.safetensors"), training, start, source)
    errors = {"decomposed": error(plain), "calibrated": error(calibrated), "error": error(report)}
    return report, {"dense_error": round(100 - float((report.accuracy or {})["dense"]), 2), **errors}


def compressed(source: Path, output: Path, recipe: Recipe) -> Report:
    """`compress`; a file that is there is taken."""
    if output.exists():
        return read_report(output)
    return compress_file(source, output, recipe)


def measured(recipe: str, report: Report, ours: Row, epochs: int) -> Row:
    """A row: its recipe, the error of the network and what else is known of it, and on what it was found."""
    n, errors = (report.accuracy or {})["n"], {"error": error(report)}
    precision = (report.finetuning or {}).get("precision", "float32")
    row = {"recipe": recipe, "ours": {**errors, **ours}, "n": n, "seeds": 1, "epochs": epochs}
    return {**row, "precision": precision}


def error(report: Report) -> float:
    """Percent wrong of the images that a report is about."""
    accuracy: Json = report.accuracy or {}
    return round(100 - float(accuracy["compressed"]), 2)


def dense_measured(file: Path, data: str) -> Row:
    """The figures of a row for a dense network: percent wrong, and of how many images."""
    accuracy, _ = evaluate_file(file, Recipe(data=data))
    found = {"ours": {"error": round(100 - accuracy.top1, 2)}, "n": accuracy.n}
    training = _training_of(file)
    if training.exists():
        found["precision"] = json.loads(training.read_text())["precision"]
    return found


def recipe_of(name: str) -> Recipe:
    return Recipe.from_toml(ROOT / "recipes" / f"{name}.toml")
