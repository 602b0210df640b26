"""Memory and time of `compress --arch none`: python scripts/stream_memory.py FOLDER [--gb 16] [-- OPTIONS]

FOLDER/dense becomes a sharded checkpoint of random numbers, shaped like a language model; shards that are there already
are kept. OPTIONS go to `compress` (default: --ratio 4), which runs as a process of its own. While it runs its anonymous
memory is sampled; pages of mapped files, which the system may take back at any time, are not counted.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.files.header import TensorInfo
from ttcompress.files.shards import encode_index
from ttcompress.files.tensors import LazyTensors
from ttcompress.files.writing import write_safetensors

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LAYER = {
    **{f"self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "input_layernorm.weight": (HIDDEN,),
}
INTERVAL = 0.02


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, options = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=16, help="size of the checkpoint in 10^9 bytes")
    parser.add_argument("--dtype", choices=TYPES, default="bfloat16")
    parser.add_argument("--layers-per-shard", type=int, default=4)
    parser.add_argument(
        "--processes", type=int, default=1, help="started by torchrun where there are several"
    )
    arguments = parser.parse_args(own)
    source = arguments.folder / "dense"
    largest = write_checkpoint(source, arguments.gb * 1e9, TYPES[arguments.dtype], arguments.layers_per_shard)
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(arguments.processes)]
    target = ["-o", str(arguments.folder / "compressed"), "--force"]
    command = [*launcher, "-m", "ttcompress", "compress", str(source), "--arch", "none", *target]
    peak, seconds = watch([*command, *(options or ["--ratio", "4"])])
    print(f"checkpoint                {sum(file.stat().st_size for file in source.iterdir()) / 1e9:.2f} GB")
    print(f"largest tensor            {largest / 1e6:.0f} MB")
    print(f"peak of anonymous memory  {peak / 1e6:.0f} MB in {arguments.processes} process(es)")
    print(f"3 x largest + 1 GB        {(3 * largest + 1e9) / 1e6:.0f} MB")
    print(f"seconds                   {seconds:.0f}")


def write_checkpoint(folder: Path, size: float, dtype: str, layers_per_shard: int) -> int:
    """Bytes of the largest tensor; the checkpoint is at most a layer larger than asked."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {"model.embed_tokens.weight": TensorInfo(dtype, (VOCABULARY, HIDDEN))}
    homes = dict.fromkeys(infos, "model-embed.safetensors")
    count = 0
    while sum(info.num_bytes for info in infos.values()) < size:
        layer = {f"model.layers.{count}.{name}": TensorInfo(dtype, shape) for name, shape in LAYER.items()}
        infos |= layer
        homes |= dict.fromkeys(layer, f"model-{count // layers_per_shard:05}.safetensors")
        count += 1
    for shard in sorted(set(homes.values())):
        names = {name: infos[name] for name, home in homes.items() if home == shard}
        if not (folder / shard).exists():
            print(f"writing {shard}", file=sys.stderr)
            write_safetensors(
                folder / shard, LazyTensors(names, lambda name: random_tensor(name, infos[name]))
            )
    total = sum(info.num_bytes for info in infos.values())
    (folder / "model.safetensors.index.json").write_text(encode_index(homes, total))
    return max(info.num_bytes for info in infos.values())


def random_tensor(name: str, info: TensorInfo) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    dtype = {stored: getattr(torch, name) for name, stored in TYPES.items()}[info.dtype]
    return torch.empty(info.shape, dtype=dtype).normal_(std=0.02, generator=generator)


def watch(command: list[str]) -> tuple[int, float]:
    """The most bytes of anonymous memory that the command and its children held at a time, and its seconds."""
    start, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(anonymous(each) for each in family(process.pid)))
        time.sleep(INTERVAL)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.monotonic() - start


def family(process: int) -> list[int]:
    """A process and all that come of it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        children = []
    return [process, *(member for child in children for member in family(int(child)))]


def anonymous(process: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
