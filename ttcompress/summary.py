"""What is reported of a compression."""

from __future__ import annotations

from math import prod

import torch

from ttcompress import __version__
from ttcompress.compression import Compressed
from ttcompress.network import Network, tied_parameters
from ttcompress.recipe import Recipe
from ttcompress.types import CompressionPlan, Json, Report

ELSEWHERE = (
    *("arch", "key", "data", "val", "calib", "train", "teacher"),
    *("mean", "std", "device", "batch_size", "workers", "seed"),
)


def report_of(
    network: Network, done: Compressed, recipe: Recipe, num_bytes: tuple[int, int], accuracy: Json | None = None
) -> Report:
    """The report of a network that came as `network`; `num_bytes` are those of all tensors before and after."""
    return Report(
        plan=done.plan,
        bytes_before=num_bytes[0],
        bytes_after=num_bytes[1],
        version=__version__,
        seed=recipe.seed or 0,
        source=network.source or {},
        architecture=network.architecture,
        preprocessing=network.preprocessing,
        recipe=recorded(recipe),
        tied=tied_parameters(network.model),
        accuracy=accuracy,
        calibration=done.calibration,
        search=done.search,
    )


def recorded(recipe: Recipe) -> Json:
    """The options that a file records as such; the others are in its report in another form or say where things are."""
    return {key: value for key, value in recipe.to_json().items() if key not in ELSEWHERE}


def promised_bytes(bytes_before: int, plan: CompressionPlan) -> int:
    """Bytes of all tensors once the plan is applied."""
    saved = 0
    for layer in plan.layers:
        dense, stored = (getattr(torch, name).itemsize for name in (layer.weight_dtype, layer.stored_dtype))
        scales = sum(map(prod, layer.scale_shapes.values())) * torch.float32.itemsize
        saved += layer.params_before * dense - layer.params_after * stored - scales
    return bytes_before - saved
