"""Whole networks in stock layers against dense, in torch and onnxruntime: python scripts/runtime_speed.py FILE...

What `ttcompress bench --runtime R` measures, as rows of docs/speed.md. One thread, by turns, medians.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ttcompress.measure.bench import bench_file
from ttcompress.records.common import Json
from ttcompress.report.text import format_bytes

RUNTIMES = ("torch", "onnx", "onnx-int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--input-size", nargs="+", type=int)
    parser.add_argument("--layers", choices=("tt", "plain"))
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print(
        "| file | runtime | batch | time, dense | time / dense | peak memory / dense | file, dense | file / dense |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for file in arguments.files:
        for runtime in arguments.runtimes:
            result = bench_file(
                file,
                batch_sizes=arguments.batch_sizes,
                input_size=arguments.input_size,
                runtime=runtime,
                layers=arguments.layers,
                training=arguments.training,
                tune=arguments.tune,
                with_layers=False,
            )
            for entry in result["batches"]:
                print(f"| {file.stem} | {runtime} | {' | '.join(cells(entry))} |", flush=True)


def cells(entry: Json) -> list[str]:
    dense, ours = entry["dense"], entry["compressed"]
    memory = f"{entry['memory_ratio']:.3f}" if "memory_ratio" in entry else "-"
    file = f"{ours['file_bytes'] / dense['file_bytes']:.2f}" if dense["file_bytes"] else "-"
    time = f"{1000 * dense['median']:.3g} ms"
    return [
        str(entry["batch"]),
        time,
        f"{entry['time_ratio']:.3f}",
        memory,
        format_bytes(dense["file_bytes"]),
        file,
    ]


if __name__ == "__main__":
    main()
