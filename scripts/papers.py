"""The papers' experiments: python scripts/papers.py GROUP... [--data cifar10:ROOT --checkpoints FOLDER] [--page]

Runs the rows of the named groups and appends each, as one line of JSON, to docs/results.jsonl; rows that are there are
not run again, so that the same command goes on after a stop. `--row NAME` runs one. `--page` writes docs/results.md
from the lines, which is all that is done without a group.

vgg     parameters and files of Novikov et al. 2015, table 2: VGG-16 and VGG-19 with random weights
cost    the complexity table of Novikov et al. 2015: time and memory of TT and FC layers as sizes, ranks and modes grow
modern  ResNet-20 and ResNet-32 compressed with calibration, all formats against low rank alone; no training
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from ttcompress.bench import peak_memory
from ttcompress.layers import TTLinear
from ttcompress.pipeline import compress_file
from ttcompress.recipe import Recipe
from ttcompress.report import format_bytes
from ttcompress.tt.shapes import tensorize_shape
from ttcompress.types import LinearSpec, compression, format_compression

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs" / "results.jsonl", ROOT / "docs" / "results.md"
FINETUNED = ROOT / "docs" / "rows.jsonl"


@dataclass(frozen=True)
class Where:
    """What rows need that is not in the repository."""

    data: str | None
    checkpoints: Path | None


Runs = Iterator[tuple[str, Callable[[], Row]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--row", help="only this one")
    parser.add_argument("--data", help="cifar10:ROOT")
    parser.add_argument("--checkpoints", type=Path, help="folder of the published CIFAR-10 ResNets")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write docs/results.md")
    arguments = parser.parse_args()
    for group in arguments.groups:
        if group not in GROUPS:
            parser.error(f"{group!r} is none of {', '.join(GROUPS)}")
        for name, run in GROUPS[group](Where(arguments.data, arguments.checkpoints)):
            done = any((row["group"], row["row"]) == (group, name) for row in read(arguments.results))
            if not done and arguments.row in (None, name):
                start = time.perf_counter()
                row = {"group": group, "row": name, **run(), "hardware": hardware()}
                append(arguments.results, {**row, "minutes": round((time.perf_counter() - start) / 60, 2)})
    if arguments.page or not arguments.groups:
        PAGE.write_text(page(read(arguments.results), read(FINETUNED)))


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(row["group"], row["row"], row["minutes"], "minutes", flush=True)


def hardware() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------------------------ vgg

# Of the FC layers that are replaced, of VGG-16 and of VGG-19; top-1 and top-5 error of both in percent.
VGG_PAPER = {
    "FC FC FC": (1, 1, 1, (30.9, 11.2), (29.0, 10.1)),
    "TT4 FC FC": (50972, 3.9, 3.5, (31.2, 11.2), (29.8, 10.4)),
    "TT2 FC FC": (194622, 3.9, 3.5, (31.5, 11.5), (30.4, 10.9)),
    "TT1 FC FC": (713614, 3.9, 3.5, (33.3, 12.8), (31.9, 11.8)),
    "TT4 TT4 FC": (37732, 7.4, 6, (32.2, 12.3), (31.6, 11.7)),
    "MR1 FC FC": (3521, 3.9, 3.5, (99.5, 97.6), (99.8, 99)),
    "MR5 FC FC": (704, 3.9, 3.5, (81.7, 53.9), (79.1, 52.4)),
    "MR50 FC FC": (70, 3.7, 3.4, (36.7, 14.9), (34.5, 15.8)),
}


def vgg(where: Where) -> Runs:
    del where
    for index, name in enumerate(("vgg16", "vgg19")):
        for row, (layers, *networks, errors16, errors19) in VGG_PAPER.items():
            errors = (errors16, errors19)[index]
            paper = {"layers": layers, "network": networks[index], "top1_error": errors[0], "top5_error": errors[1]}
            yield f"{name} {row}", partial(vgg_row, name, row, paper)


def vgg_row(name: str, row: str, paper: Row) -> Row:
    """The real file of a network with random weights."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / f"{name}.pt", Path(folder) / "out.safetensors"
        network = getattr(torchvision.models, name)()
        torch.save(network.state_dict(), source)
        dense = source.stat().st_size
        if row == "FC FC FC":
            params = sum(parameter.numel() for parameter in network.parameters())
            return {"paper": paper, "ours": {"params": params, "file_bytes": dense, "layers": 1.0, "network": 1.0}}
        recipe = f"recipes/{name}-{row.lower().replace(' ', '-')}.toml"
        report = compress_file(source, output, Recipe.from_toml(ROOT / recipe))
        plan = report.plan
        before, after = (sum(getattr(each, side) for each in plan.layers) for side in ("params_before", "params_after"))
        ours = {
            "params": plan.params_after,
            "file_bytes": output.stat().st_size,
            "layers": compression(before, after),
            "network": plan.compression,
        }
        return {"recipe": recipe, "paper": paper, "ours": ours}


def vgg_section(rows: Sequence[Row]) -> Iterator[str]:
    yield "Parameters and file sizes are exact (random weights, float32). The error columns are the paper's,"
    yield "for networks trained in TT form on ImageNet; ours need ImageNet, which was not available, and are"
    yield "not run: `ttcompress compress vgg16.pt --recipe RECIPE --data imagefolder:ROOT`, then `ttcompress"
    yield "finetune`, measures them."
    yield ""
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


# ----------------------------------------------------------------------------------------------------------------- cost

ROWS = 32
SIZES = (1024, 2048, 4096, 8192, 16384)
TT_RANKS = (2, 4, 8, 16, 32, 64)
NUMBERS_OF_MODES = (2, 3, 4, 6, 12)
SERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "FC, size": ("M = N", {}),
    "TT, size": ("M = N", {"modes": 4, "rank": 8}),
    "TT, rank": ("r", {"size": 4096, "modes": 4}),
    "TT, modes": ("d", {"size": 4096, "rank": 4}),
}
# Exponents of the paper's bounds in what grows: forward time, forward memory, backward time, backward memory.
EXPONENTS = {
    "FC, size": (2, 2, 2, 2),
    "TT, size": ("1 (+ that of m)", 1, "1 (+ that of m)", 1),
    "TT, rank": (2, 1, 4, 3),
    "TT, modes": ("1 (times m)", 0, "2 (times m)", 0),
}


def cost(where: Where) -> Runs:
    del where
    for size in SIZES:
        yield f"FC, size {size}", partial(fc_row, size)
    for size in SIZES:
        yield f"TT, size {size}", partial(tt_row, size, 4, 8)
    for rank in TT_RANKS:
        yield f"TT, rank {rank}", partial(tt_row, 4096, 4, rank)
    for number in NUMBERS_OF_MODES:
        yield f"TT, modes {number}", partial(tt_row, 4096, number, 4)


def fc_row(size: int) -> Row:
    return {"ours": measured(nn.Linear(size, size))}


def tt_row(size: int, number: int, rank: int) -> Row:
    """M = N = size in `number` modes as equal as powers of two allow, all TT-ranks `rank`, cores contracted."""
    bits = size.bit_length() - 1
    modes = [2 ** (bits // number + (k < bits % number)) for k in range(number)]
    tensorization = tensorize_shape("matrix", (size, size), modes, modes)
    layer = TTLinear(LinearSpec(size, size, bias=True), tensorization, rank)
    layer.execution = "contract"
    return {"ours": {**measured(layer), "largest_mode": max(modes)}}


def measured(layer: nn.Module) -> Row:
    """Median seconds of a forward pass for ROWS inputs and of its backward pass; bytes at most, and saved for it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer.train()
    x = torch.randn(ROWS, layer.in_features, requires_grad=True)  # type: ignore[arg-type]
    forward, backward = [], []
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient = torch.randn_like(layer(x))
    for _ in range(12):
        start = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        y.backward(gradient)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return {
        "params": sum(parameter.numel() for parameter in layer.parameters()),
        "forward": median(forward[2:]),
        "backward": median(backward[2:]),
        "forward_bytes": peak_memory(layer.eval(), x.detach()),
        "saved_bytes": sum(saved.values()),
    }


MEASURED = ("forward", "forward_bytes", "backward", "saved_bytes")


def cost_section(rows: Sequence[Row]) -> Iterator[str]:
    yield f"{ROWS} inputs, float32, one CPU thread, medians of ten. Forward memory is parameters and all tensors"
    yield "that are alive together; backward memory is what the forward pass keeps for it. TT layers contract"
    yield "inputs with cores as they do by default, merged where that is cheaper."
    yield ""
    yield from header("layer", "parameters", "forward", "forward memory", "backward", "backward memory")
    for row in rows:
        ours = row["ours"]
        times = [f"{1000 * ours[name]:.3g} ms" for name in ("forward", "backward")]
        memory = [format_bytes(ours[name]) for name in ("forward_bytes", "saved_bytes")]
        yield cells(row["row"], f"{ours['params']:,}", times[0], memory[0], times[1], memory[1])
    yield ""
    yield "Slopes on double logarithmic axes (exponents, least squares over the rows above) beside the"
    yield "exponents of the paper's bounds. The bounds of the backward pass are those of the paper's own"
    yield "algorithm; automatic differentiation of a sweep stays at the order of its forward pass. Small cases"
    yield "take the time of their operations, not of their sizes, which flattens the slopes."
    yield ""
    yield from header(
        "what grows", *(f"{name}: paper's, ours" for name in ("forward", "its memory", "backward", "its memory"))
    )
    for series, (symbol, fixed) in SERIES.items():
        points = [row for row in rows if row["row"].startswith(series)]
        if len(points) > 1:
            slopes = [f"{slope(points, name):.2f}" for name in MEASURED]
            pairs = [f"{theirs}, {ours}" for theirs, ours in zip(EXPONENTS[series], slopes, strict=True)]
            held = ", ".join(f"{key} {value}" for key, value in fixed.items())
            yield cells(f"{symbol} of {series[:2]}" + (f" ({held})" if held else ""), *pairs)


def slope(rows: Sequence[Row], name: str) -> float:
    grows = [log(float(row["row"].split()[-1])) for row in rows]
    return linear_regression(grows, [log(row["ours"][name]) for row in rows]).slope


# --------------------------------------------------------------------------------------------------------------- modern

CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
RATIOS = (2, 3, 4)
PUBLISHED = {
    ("resnet20", 2): "PSTRN 90.80 (-0.45) at 2.25x",
    ("resnet20", 3): "SPARK 92.50 (+1.25) at 3.4x, with an unstructured sparse part; TRP 90.62 (-1.12)",
    ("resnet20", 4): "ALDS 90.92 (-0.47), 182 epochs",
    ("resnet32", 3): "ADMM-TT 93.05 (+0.56) at 2.78x, 400 epochs",
    ("resnet32", 4): "TRP 91.39 (-0.87) at 4.27x",
}


def modern(where: Where) -> Runs:
    for ratio in RATIOS:
        for network in CHECKPOINTS:
            for formats in ("auto", "lowrank"):
                yield f"{network} {ratio}x {formats}", partial(modern_row, where, network, ratio, formats)


def modern_row(where: Where, network: str, ratio: int, formats: str) -> Row:
    if where.data is None or where.checkpoints is None:
        raise SystemExit("modern needs --data cifar10:ROOT and --checkpoints FOLDER")
    source = where.checkpoints / CHECKPOINTS[network]
    recipe = Recipe(ratio=ratio, format=formats, calib=where.data, data=where.data, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        report = compress_file(source, Path(folder) / "out.safetensors", replace(recipe, arch=network))
    accuracy = report.accuracy or {}
    ours = {"dense": accuracy["dense"], "compressed": accuracy["compressed"], "compression": report.plan.compression}
    return {"ours": ours, "n": accuracy["n"], "seeds": 1, "epochs": 0}


def modern_section(rows: Sequence[Row], finetuned: Sequence[Row]) -> Iterator[str]:
    yield "CIFAR-10 test set of 10,000 images, published checkpoints, compression over all parameters."
    yield "Calibrated: 1,024 training images, no labels, no training; *all formats* is the default, *low rank*"
    yield "allows the format `lowrank` alone. Trained: 30 epochs after that ([finetune.md](finetune.md))."
    yield "Published figures start from other checkpoints; the change is against their own baseline."
    yield ""
    found = {row["row"]: row["ours"] for row in rows}
    trained = {
        (row["network"].split("-")[0], row["ratio"]): row
        for row in finetuned
        if row["epochs"] == 30 and not row["options"]
    }
    yield from header(
        "network", "compression", "dense", "calibrated, all formats", "low rank", "trained", "best published"
    )
    for network in CHECKPOINTS:
        for ratio in RATIOS:
            ours = [found.get(f"{network} {ratio}x {formats}") for formats in ("auto", "lowrank")]
            after = trained.get((network, ratio))
            if any(ours) or after:
                dense = next(each["dense"] for each in (*ours, after) if each)
                yield cells(
                    network,
                    f"{ratio}x",
                    f"{dense:.2f}",
                    *(f"{each['compressed']:.2f}" if each else "not run" for each in ours),
                    f"{after['compressed']:.2f}" if after else "not run",
                    PUBLISHED.get((network, ratio), "-"),
                )


# ----------------------------------------------------------------------------------------------------------------- page

GROUPS: dict[str, Callable[[Where], Runs]] = {"vgg": vgg, "cost": cost, "modern": modern}
TITLES = {
    "vgg": "VGG-16 and VGG-19 (Novikov et al. 2015, table 2)",
    "cost": "Layer cost (Novikov et al. 2015, complexity table)",
    "modern": "ResNet-20 and ResNet-32",
}
NOT_RUN = """MNIST (Novikov et al. 2015, section 6.1); CIFAR-10 `conv` and `conv-fc` (Garipov et al. 2016, table 1);
wide and shallow (262,144 hidden units); quantised cores. `finetune --from-scratch` trains such networks in TT form, but
none of these rows has been run."""


def page(rows: Sequence[Row], finetuned: Sequence[Row]) -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "The papers' figures beside ours, written by `python scripts/papers.py --page` from results.jsonl and",
        "rows.jsonl beside this page.",
        "One row again: `python scripts/papers.py GROUP --row NAME --results FILE`.",
    ]
    for group, title in TITLES.items():
        own = [row for row in rows if row["group"] == group]
        if own:
            section = modern_section(own, finetuned) if group == "modern" else SECTIONS[group](own)
            minutes = sum(row["minutes"] for row in own)
            where = ", ".join(dict.fromkeys(row["hardware"] for row in own))
            lines += [
                "",
                f"## {title}",
                "",
                *section,
                "",
                f"Group `{group}`: {len(own)} rows, {minutes:.0f} minutes ({where}).",
            ]
    return "\n".join([*lines, "", "## Not run", "", NOT_RUN, ""])


SECTIONS = {"vgg": vgg_section, "cost": cost_section}


def header(*names: str) -> Iterator[str]:
    yield cells(*names)
    yield "|" + "---|" * len(names)


def cells(*values: str) -> str:
    return "| " + " | ".join(values) + " |"


if __name__ == "__main__":
    main()
