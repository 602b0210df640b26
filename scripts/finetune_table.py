"""Accuracy after fine-tuning: python scripts/finetune_table.py FOLDER CHECKPOINT... --data cifar10:ROOT --ratios 2 3

Every checkpoint is compressed with calibration and then trained, and for comparison trained as it is for the same
epochs (ratio 1). FOLDER keeps the compressed files, the states of the trainings and the figures (rows.jsonl): what is
there is not done again and a training that was cut off goes on, so that the same command can be repeated until all is
done, and several can run side by side on other rows. The table comes at the end.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ttcompress.commands.compress import compress_file
from ttcompress.commands.finetune import finetune_file
from ttcompress.recipe import Recipe

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--data", help="trains and calibrates on its train split, measures on its test split")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2, 3])
    parser.add_argument("--epochs", type=int, nargs="+", default=[30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--options", type=json.loads, default={}, help="further options of finetune, as JSON")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    rows = arguments.folder / "rows.jsonl"
    runs = product(arguments.seeds, arguments.epochs, arguments.ratios, arguments.checkpoints)
    for seed, epochs, ratio, checkpoint in runs:
        key = {
            "network": checkpoint.stem,
            "ratio": ratio,
            "epochs": epochs,
            "seed": seed,
            "options": arguments.options,
        }
        if not any(key.items() <= row.items() for row in read(rows)):
            row = {**key, **run(checkpoint, arguments, ratio, epochs, seed)}
            with rows.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    print(table(read(rows)))


def read(rows: Path) -> list[Row]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def run(checkpoint: Path, arguments: argparse.Namespace, ratio: float, epochs: int, seed: int) -> Row:
    data, device = arguments.data, arguments.device
    name = f"{checkpoint.stem}-{ratio:g}x-{seed}"
    source = arguments.folder / f"{name}.safetensors" if ratio > 1 else checkpoint
    start = time.perf_counter()
    if not source.exists():
        effort = getattr(arguments, "effort", None)
        goal = Recipe(ratio=ratio, calib=data, data=data, seed=seed, device=device, effort=effort)
        compress_file(checkpoint, source, goal)
    label = "".join(f"-{key}{value}" for key, value in arguments.options.items())
    output = arguments.folder / f"{name}-{epochs}{label}.safetensors"
    recipe = Recipe(train=data, data=data, epochs=epochs, seed=seed, device=device, **arguments.options)
    resume = output.with_name(f"{output.name}.training").exists()
    seconds: list[float] = []

    def log(epoch: Row) -> None:
        print(name, epoch, flush=True)
        seconds.extend([epoch["seconds"]] if epoch["seconds"] else [])

    report = finetune_file(
        source,
        output,
        recipe,
        force=True,
        resume=resume,
        origin=checkpoint,
        log=log,
    ).to_json()
    training = report["finetuning"]
    return {
        **{key: report["accuracy"][key] for key in ("dense", "compressed", "n")},
        "compression": report["compression"],
        "before": (training["before"] or {}).get("compressed"),
        "best": training["best"],
        "precision": training["precision"],
        "val": [epoch["val"] for epoch in training["history"]],
        "epoch_seconds": round(median(seconds), 2) if seconds else None,
        "minutes": (time.perf_counter() - start) / 60,
        "resumed": resume,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "cpu",
    }


def table(rows: list[Row]) -> str:
    """Medians over the seeds."""
    heads = ["network", "dense", "compression", "epochs", "precision", "before", "after", "seeds", "device"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["network"], row["ratio"], row["epochs"])):
        groups.setdefault(
            (row["network"], row["ratio"], row["epochs"], str(row["options"]), row["device"]), []
        ).append(row)
    for (network, ratio, epochs, _, device), found in groups.items():
        before = "-" if found[0]["before"] is None else f"{median(row['before'] for row in found):.2f}"
        after = median(row["compressed"] for row in found)
        compression = "dense" if ratio == 1 else f"{median(row['compression'] for row in found):.2f}x"
        first = f"| {network} | {found[0]['dense']:.2f} | {compression} | {epochs} "
        precision = found[0].get("precision") or found[0]["options"].get("precision", "float32")
        lines.append(first + f"| {precision} | {before} | {after:.2f} | {len(found)} | {device} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
