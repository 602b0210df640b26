"""Accuracy after calibration: python scripts/calibration_table.py RESULTS.jsonl CHECKPOINT... --data cifar10:ROOT

Every checkpoint is compressed at every ratio without calibration, and with it for every seed and effort; training
images calibrate, all test images measure. Rows go to RESULTS as JSON lines; those that are there are not run again, so
that the script can be stopped at any time and several can run side by side. The table of medians comes at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from ttcompress.commands.compress import compress_file
from ttcompress.recipe import Recipe

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--arch", help="for checkpoints whose architecture is not recognised")
    parser.add_argument("--data", help="calibrates on its train split, measures on its test split")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--efforts", nargs="+", default=["none", "default"], help="none is without calibration"
    )
    arguments = parser.parse_args()
    runs = product(arguments.seeds, arguments.efforts, arguments.checkpoints, arguments.ratios)
    for seed, effort, checkpoint, ratio in runs:
        if effort == "none" and seed != arguments.seeds[0]:
            continue
        key = {"network": checkpoint.stem, "ratio": ratio, "effort": effort, "seed": seed}
        if not any(key.items() <= row.items() for row in read(arguments.results)):
            row = {**key, **run(checkpoint, arguments.data, arguments.arch, ratio, effort, seed)}
            with arguments.results.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    print(table(read(arguments.results)))


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run(checkpoint: Path, data: str, arch: str | None, ratio: float, effort: str, seed: int) -> Row:
    calibrated: Row = {"calib": data, "effort": effort} if effort != "none" else {}
    recipe = Recipe(arch=arch, ratio=ratio, data=data, seed=seed, device="cpu", **calibrated)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = compress_file(checkpoint, Path(folder) / "out.safetensors", recipe).to_json()
    calibration = report["calibration"] or {"stages": []}
    return {
        **{name: report["accuracy"][name] for name in ("dense", "compressed", "agreement", "n")},
        "compression": report["compression"],
        "minutes": (time.perf_counter() - start) / 60,
        "stages": {each["stage"]: each["error"] for each in calibration["stages"] if each["kept"]},
    }


def table(rows: list[Row]) -> str:
    """Medians over the seeds, with the smallest and the largest."""
    lines = [
        "| network | dense | effort | ratio | top-1 | smallest, largest | seeds | minutes |",
        "|" + "---|" * 8,
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(
        rows, key=lambda row: (row["network"], row["effort"] != "none", row["effort"], row["ratio"])
    ):
        groups.setdefault((row["network"], row["dense"], row["effort"], row["ratio"]), []).append(row)
    for (network, dense, effort, ratio), found in groups.items():
        top = [row["compressed"] for row in found]
        spread = f"{min(top):.2f}, {max(top):.2f}" if len(top) > 1 else "-"
        minutes = median(row["minutes"] for row in found)
        first = f"| {network} | {dense:.2f} | {effort} | {ratio:g}x | {median(top):.2f} | {spread} "
        lines.append(first + f"| {len(found)} | {minutes:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
