"""Where the time of a training step goes on a GPU: kernels, and what begins them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.gpu.rows import Place, Row, Run
from ttcompress.commands.compress import compress_file
from ttcompress.commands.finetune import finetune_file
from ttcompress.files.writing import write_dense
from ttcompress.networks.opening import initialise, open_fresh
from ttcompress.recipe import Recipe

BATCH, STEPS = 128, 60
MOST = 15
"""Kernels and operators that are named, those that take most."""
LAUNCHES = "cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaGraphLaunch"


def step(compiles: bool, place: Place) -> Row:
    """ResNet-20 of random weights at 4x, trained with its teacher on random images, in bfloat16.

    The second of four epochs is timed, the third profiled.
    """
    batch, steps = (8, 2) if place.is_tiny else (BATCH, STEPS)
    folder = place.work / "step"
    folder.mkdir(parents=True, exist_ok=True)
    dense, small = _networks(folder)
    train, val = (_images(folder / f"{count}.npz", count) for count in (batch * steps, batch))
    recipe = Recipe(
        train=train,
        val=val,
        batch_size=batch,
        epochs=4,
        precision="bfloat16",
        compile=compiles,
        device=place.device.type,
        seed=0,
    )
    watch = Watch(place.device)
    finetune_file(small, folder / "out.safetensors", recipe, force=True, origin=dense, log=watch)
    return {"batch": batch, "seconds": watch.seconds / steps, **watch.found(steps)}


class Watch:
    """Hears of each epoch: has the second one's seconds, and profiles the third."""

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profile = profile(activities=activities)
        self.seconds = 0.0

    def __call__(self, record: Row) -> None:
        if record["epoch"] == 2:
            self.seconds = record["seconds"]
            self.profile.start()
        elif record["epoch"] == 3:
            self.profile.stop()

    def found(self, steps: int) -> Row:
        """By step: microseconds and number of kernels and launches, and the largest of each kind."""
        events = self.profile.key_averages()
        kernels = [(each.key, each.self_device_time_total, each.count) for each in events if _is_kernel(each)]
        others = [(each.key, each.self_cpu_time_total, each.count) for each in events if not _is_kernel(each)]
        return {
            "busy_us": sum(time for _, time, _ in kernels) / steps,
            "kernels": sum(count for _, _, count in kernels) / steps,
            "launches": {name: count / steps for name, _, count in others if name in LAUNCHES},
            "by_kernel": _largest(kernels, steps),
            "by_operator": _largest(others, steps),
        }


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type == DeviceType.CUDA)


def _largest(found: Iterable[tuple[str, float, int]], steps: int) -> list[list[Any]]:
    ordered = sorted(found, key=lambda each: each[1], reverse=True)
    return [
        [name[:90], round(time / steps, 2), round(count / steps, 2)] for name, time, count in ordered[:MOST]
    ]


def _networks(folder: Path) -> tuple[Path, Path]:
    """The dense checkpoint and the compressed file."""
    dense, small = folder / "resnet20.pt", folder / "resnet20-tt.safetensors"
    if not small.exists():
        torch.manual_seed(0)
        model = open_fresh("resnet20").model
        initialise(model)
        write_dense(dense, model.state_dict())
        compress_file(dense, small, Recipe(ratio=4, device="cpu"), force=True)
    return dense, small


def _images(path: Path, count: int) -> str:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=generator.integers(0, 10, count))
    return f"npz:{path}"


ROWS: dict[str, Run] = {
    "step of resnet20 4x, compiled": partial(step, True),
    "step of resnet20 4x": partial(step, False),
}
