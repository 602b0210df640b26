"""How much of real networks can take TT form, and whether each comes back from its file bit for bit (docs/weights.md).

    python -m scripts.coverage [NETWORK ...]

Counted are parameters of two or more dimensions, with `--include '*'`; depthwise convolutions, which no TT form makes
smaller, apart. Every network, with random weights, is compressed at small TT-ranks, saved, and loaded in a fresh process.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import ttcompress
from ttcompress.planning.selection import Layer, find_layers

SEED = 0


class Generator(nn.Sequential):
    """The generator of DCGAN (Radford et al. 2016) for images of 64 x 64."""

    def __init__(self) -> None:
        widths = (100, 512, 256, 128, 64)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            step, pad = (1, 0) if number == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(before, after, 4, step, pad, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        super().__init__(*layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())


class Speech(nn.Sequential):
    """Words from 80 mel bands, by one-dimensional convolutions."""

    def __init__(self) -> None:
        widths = (80, 256, 256, 512)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv1d(before, after, 11, padding=5, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        super().__init__(*layers, nn.Conv1d(512, 29, 1))


class Conv1D(nn.Module):
    """A Linear as the code of GPT-2 has it: weight (in, out), multiplied from the right."""

    def __init__(self, outs: int, ins: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(ins, outs))
        self.bias = nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Block(nn.Module):
    """Attention and a feed-forward part of GPT-2 (Radford et al. 2019)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)
        self.mlp = nn.Sequential(Conv1D(4 * width, width), nn.GELU(), Conv1D(width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class Gpt(nn.Module):
    """A small GPT-2: transposed Linears, and one table at both ends."""

    def __init__(self, rows: int = 5_000, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(rows, width), nn.Embedding(256, width)
        self.h = nn.Sequential(*[Block(width, 4) for _ in range(depth)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        return self.lm_head(self.ln_f(self.h(x)))


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made: nn.Module = torchvision.models.get_model(name, weights=None, **EXTRA.get(name, {}))
        return made

    return build


EXTRA = {"deeplabv3_resnet50": {"weights_backbone": None}}
IMAGE = (1, 3, 64, 64)
VISION = {
    "vit_b_16": (1, 3, 224, 224), "swin_t": IMAGE, "resnext50_32x4d": IMAGE, "regnet_y_400mf": IMAGE,
    "mobilenet_v3_large": IMAGE, "efficientnet_b0": IMAGE, "convnext_tiny": IMAGE, "deeplabv3_resnet50": IMAGE,
    "r3d_18": (1, 3, 4, 32, 32), "mvit_v2_s": (1, 3, 16, 224, 224),
}  # fmt: skip
Inputs = Callable[[], tuple[Tensor, ...]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    **{
        name: (_torchvision(name), lambda shape=shape: (torch.randn(shape),))
        for name, shape in VISION.items()
    },  # type: ignore[misc]
    "nn.Transformer": (
        lambda: nn.Transformer(256, 4, 3, 3, 1024, batch_first=True),
        lambda: (torch.randn(1, 9, 256), torch.randn(1, 7, 256)),
    ),
    "LSTM, 2 layers, both ways": (
        lambda: nn.LSTM(128, 256, 2, bidirectional=True),
        lambda: (torch.randn(9, 1, 128),),
    ),
    "GRU": (lambda: nn.GRU(128, 256), lambda: (torch.randn(9, 1, 128),)),
    "DCGAN generator": (Generator, lambda: (torch.randn(1, 100, 1, 1),)),
    "Conv1d speech network": (Speech, lambda: (torch.randn(1, 80, 50),)),
    "GPT-2, Linears (in, out)": (Gpt, lambda: (torch.randint(5_000, (1, 12)),)),
}


def build(name: str) -> nn.Module:
    """The network with the same random weights each time."""
    torch.manual_seed(SEED)
    return NETWORKS[name][0]().eval()


@torch.no_grad()
def digest(name: str, model: nn.Module) -> str:
    """A sum over all bits of the outputs for one input."""
    torch.manual_seed(SEED)
    found = hashlib.sha256()
    for tensor in _tensors(model.eval()(*NETWORKS[name][1]())):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in _tensors(part)]


def shares(model: nn.Module) -> tuple[int, int, int]:
    """Parameters of two or more dimensions: all but depthwise ones, those that can take TT form, depthwise ones."""
    layers = find_layers(model, include=("*",))
    depthwise = sum(layer.weight.numel() for layer in layers if "depthwise" in layer.obstacle)
    able = sum(layer.weight.numel() for layer in layers if not layer.obstacle)
    # Counted here, apart from what the selection makes of them.
    several = sum(each.numel() for each in model.parameters() if sum(size > 1 for size in each.shape) > 1)
    return several - depthwise, able, depthwise


def rebuilt(model: nn.Module) -> int:
    """Of those that can, the ones that their module computes."""
    layers: list[Layer] = find_layers(model, include=("*",))
    return sum(layer.weight.numel() for layer in layers if not layer.obstacle and layer.spec.kind == "weight")


def comes_back(name: str, folder: Path) -> tuple[bool, float]:
    """Whether a fresh process computes the same from the file, and the compression at small TT-ranks."""
    compressed, report = ttcompress.compress(build(name), ranks=4, conv_ranks=4, include=("*",))
    file = folder / "net-tt.safetensors"
    ttcompress.save(compressed, report, file)
    command = [sys.executable, "-m", "scripts.coverage", "--digest", name, str(file)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found == digest(name, compressed), report.compression


def main(arguments: list[str]) -> None:
    """Print the table, or the digest of a network in a file."""
    if arguments[:1] == ["--digest"]:
        _, name, file = arguments
        print(digest(name, ttcompress.load(file, factory=lambda: build(name))))
        return

    print(
        "| network | parameters | of 2 and more dimensions | can take TT form | of these rebuilt | depthwise | at TT-ranks 4 |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments or NETWORKS:
        model = build(name)
        several, able, depthwise = shares(model)
        share, again = 100 * able / several, 100 * rebuilt(model) / able
        total = sum(each.numel() for each in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            same, compression = comes_back(name, Path(folder))
        row = f"{total:,} | {several:,} | {share:.1f} % | {again:.0f} % | {depthwise:,}"
        print(f"| {name} | {row} | {compression:.1f}x{'' if same else ', NOT THE SAME'} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
