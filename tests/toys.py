"""What the tests of training share: images, a network with everything that can go wrong in it, and comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttcompress.data.opening import open_data
from ttcompress.data.training_batches import Stream
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.spec import layer_spec
from ttcompress.processes import World
from ttcompress.records.report import Preprocessing
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State
from ttcompress.tt.shapes import tensorize_shape

CPU = torch.device("cpu")
STEPS = 12
"""Batches of 8 in an epoch."""
PRELOADED = ["torch._dynamo", "ttcompress.train.loop"]
"""What new processes are forked with: importing it anew takes seconds each."""
EVERYTHING = TrainingOptions(
    epochs=3,
    lr=0.05,
    ema=0.9,
    mixup=0.4,
    cutmix=1.0,
    label_smoothing=0.1,
    distill=0.5,
    temperature=2.0,
    precision="float32",
    seed=3,
)


def write_images(folder: Path) -> Path:
    """train.npz: grey images of 4 classes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 8 * STEPS)
    images = generator.integers(0, 128, (8 * STEPS, 8, 8), dtype=np.uint8)
    images[np.arange(len(labels)), labels] += 100
    np.savez(folder / "train.npz", images=images, labels=labels)
    return folder


def network(seed: int = 0, norm: bool = True, dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(seed)
    # A bias before a norm has a gradient of rounding errors alone, which AdamW makes whole steps of.
    conv, linear = nn.Conv2d(4, 6, 3, padding=1, bias=not norm), nn.Linear(24, 12, bias=not norm)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        TTConv2d(layer_spec(conv), tensorize_shape("chain", (6, 4, 3, 3)), 3),
        nn.BatchNorm2d(6) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout), nn.Flatten(),
        TTLinear(layer_spec(linear), tensorize_shape("matrix", (12, 24), (3, 4), (4, 6)), 3),
        nn.BatchNorm1d(12, momentum=None) if norm else nn.Identity(), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


def teacher() -> nn.Module:
    return network(7).eval().requires_grad_(False)


def stream(folder: Path, batch_size: int = 8) -> Stream:
    return Stream(open_data(f"npz:{folder / 'train'}.npz"), Preprocessing((0.3,), (0.2,)), batch_size, 5, CPU)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """On images of its own, in steps of 1 / 64, so that epochs are told apart."""
    generator = np.random.default_rng(1)
    images, labels = generator.normal(size=(64, 1, 8, 8)), generator.integers(0, 4, 64)
    found = model(torch.from_numpy(images).float()).argmax(1).numpy()
    return float(100 * (found == labels).mean())


def training_setup(folder: Path, file: Path | None = None, **options: Any) -> TrainingSetup:
    given = {
        "stream": stream(folder),
        "score": accuracy,
        "world": World(CPU),
        "fingerprint": {"lr": 1, "seed": 3},
    }
    return TrainingSetup(**{**given, "checkpoint": file, **options})


def trained_on(device: torch.device, folder: Path, options: TrainingOptions, **given: Any) -> State:
    """A network trained on a device, with its teacher where the options say so."""
    source = replace(stream(folder), device=device, augmentation="flip")
    master = teacher().to(device) if options.distill else None
    model = network(dropout=0)
    # Without one torch's own batch norm reads how many batches it has seen, at every step.
    model[8].momentum = 0.1
    setup = {"stream": source, "teacher": master, "world": World(device), **given}
    return train(model.to(device), options, training_setup(folder, **setup))


def saved(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def position(file: Path) -> tuple[int, int]:
    """Epochs that are done, and batches of the next one."""
    progress = saved(file)["progress"]
    return progress["epoch"], progress["step"]


def frozen_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def equal(one: Any, other: Any) -> bool:
    """Bit for bit, through all dicts and lists."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def finite(content: Any) -> bool:
    """All numbers in it, through all dicts and lists."""
    if isinstance(content, dict | list | tuple):
        return all(map(finite, content.values() if isinstance(content, dict) else content))
    return not isinstance(content, Tensor | float) or bool(torch.as_tensor(content).isfinite().all())


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert one.keys() == other.keys()
    ours, theirs = (
        torch.cat([value.cpu().double().flatten() for value in each.values()]) for each in (one, other)
    )
    return float((ours - theirs).norm() / theirs.norm())


def as_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a process on one machine."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    return {
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_RUN_ID": "x",
    }
