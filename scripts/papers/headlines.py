"""The README's five lines of results, taken from the rows."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.papers.rows import FINETUNED, Row, read
from ttcompress.report.text import format_bytes

BEGIN, END = "<!-- results: python -m scripts.papers -->", "<!-- /results -->"


def headlines(rows: Sequence[Row]) -> list[str]:
    """A line for each experiment whose rows are there."""
    found = {(row["group"], row["row"]): row["ours"] for row in rows}
    lines = []
    if fc6 := found.get(("vgg", "vgg16 TT4 FC FC")):
        dense = found["vgg", "vgg16 FC FC FC"]
        size = f"{format_bytes(dense['file_bytes'])} to {format_bytes(fc6['file_bytes'])}"
        lines.append(
            f"VGG-16, the largest layer at TT-rank 4: {fc6['layers']:,.0f}x, as in the paper; file {size}"
        )
    if tt := found.get(("mnist", "TT 4x8x8x4 rank 8, from scratch")):
        dense = found["mnist", "dense"]
        errors = f"{tt['error']:.2f} % wrong (dense {dense['error']:.2f})"
        change = f"{dense['layers']:,} -> {tt['layers']:,} parameters"
        lines.append(f"MNIST, 1024-1024-10 from scratch, first layer {change}: {errors}")
    for row in sorted(read(FINETUNED), key=lambda row: float(row["ratio"])):
        is_float32_at_2 = row["ratio"] == 2 and not row["options"]
        is_bfloat16_at_4 = row["ratio"] == 4 and row["options"] == {"precision": "bfloat16"}
        if row["network"].startswith("resnet20") and (is_float32_at_2 or is_bfloat16_at_4):
            change = f"{row['dense']:.2f} -> {row['before']:.2f} without training, {row['compressed']:.2f}"
            lines.append(
                f"ResNet-20, CIFAR-10, {row['ratio']:g}x: top-1 {change} after {row['epochs']} epochs"
            )
    if small := found.get(("int8", "resnet20 2x int8")):
        file, tensors = (small["dense_bytes"] / small[name] for name in ("file_bytes", "tensor_bytes"))
        lines.append(
            f"ResNet-20 at 2x with cores in int8, no training: file {file:.1f}x smaller (its tensors {tensors:.1f}x),"
            f" {small['compressed']:.2f}"
        )
    return [f"- {line}" for line in lines]


def with_headlines(text: str, rows: Sequence[Row]) -> str:
    """A README with its results renewed."""
    before, rest = text.split(f"{BEGIN}\n")
    _, after = rest.split(END)
    return "".join([before, BEGIN, "\n", *(f"{line}\n" for line in headlines(rows)), END, after])
