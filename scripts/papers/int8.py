"""Quantised cores: size and accuracy of one network whose cores are stored in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from scripts.papers.rows import Group, Row, Runs, Where, cells, header, paragraph
from ttcompress.commands.compress import compress_file
from ttcompress.recipe import Recipe
from ttcompress.report.text import format_bytes

DTYPES = ("float32", "float16", "int8")
RATIOS = (2, 3)


def runs(where: Where) -> Runs:
    for ratio in RATIOS:
        for dtype in DTYPES:
            yield f"resnet20 {ratio}x {dtype}", partial(measured, where, ratio, dtype)


def measured(where: Where, ratio: int, dtype: str) -> Row:
    # Only this script compresses files any further.
    import zstandard

    source, data = where.need("checkpoints") / "resnet20-12fca82f.th", where.need("cifar10")
    recipe = Recipe(arch="resnet20", ratio=ratio, dtype=dtype, calib=data, data=data, effort="fast", seed=0)
    where.work.mkdir(exist_ok=True)
    output = where.work / f"resnet20-{ratio}x-{dtype}.safetensors"
    report = compress_file(source, output, recipe, force=True)
    content = output.read_bytes()
    accuracy = report.accuracy or {}
    ours = {
        "dense": accuracy["dense"],
        "compressed": accuracy["compressed"],
        "dense_bytes": report.bytes_before,
        "tensor_bytes": report.bytes_after,
        "file_bytes": len(content),
        "zstd_bytes": len(zstandard.ZstdCompressor(level=19).compress(content)),
    }
    return {"ours": ours, "n": accuracy["n"], "seeds": 1, "epochs": 0}


def section(rows: Sequence[Row]) -> Iterator[str]:
    yield from paragraph("""
        Both papers call TT compatible with quantisation. ResNet-20, CIFAR-10 test set of 10,000 images,
        `--calib` with `--effort fast`, no training. `--dtype` stores the cores; layers that stay dense are float32.
        *zstd* is what level 19 would bring the file to, a figure only.
        """)
    yield from header(
        "network", "top-1", "tensors before", "tensors", "file", "zstd", "before / tensors", "before / file"
    )
    for row in rows:
        ours = row["ours"]
        yield cells(
            row["row"],
            f"{ours['compressed']:.2f} (dense {ours['dense']:.2f})",
            *(
                format_bytes(ours[name])
                for name in ("dense_bytes", "tensor_bytes", "file_bytes", "zstd_bytes")
            ),
            *(f"{ours['dense_bytes'] / ours[name]:.1f}x" for name in ("tensor_bytes", "file_bytes")),
        )


GROUP = Group("Quantised cores", runs, section, needs=("cifar10", "checkpoints", "work"))
