"""What is reported of a compression."""

from __future__ import annotations

from math import prod

import torch

from ttcompress.commands.compressor import Compressed
from ttcompress.files.header import canonical_json
from ttcompress.networks.opening import Network
from ttcompress.networks.weights import tied_weights
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import Report
from ttcompress.settings import Settings
from ttcompress.version import __version__

LARGEST_SHARE = 0.02
"""Of the bytes of a file that what is predicted may take."""
ELSEWHERE = (
    *("arch", "key", "data", "limit", "val", "calib", "train", "teacher"),
    *("mean", "std", "device", "batch_size", "workers", "seed"),
)
"""Options that a file does not record as such."""


def report_of(
    network: Network,
    done: Compressed,
    settings: Settings,
    num_bytes: tuple[int, int],
    accuracy: Json | None = None,
) -> Report:
    """The report of a network that came as `network`; `num_bytes` are those of all tensors before and after."""
    return Report(
        plan=done.plan,
        bytes_before=num_bytes[0],
        bytes_after=num_bytes[1],
        version=__version__,
        seed=settings.seed,
        source=network.source or {},
        architecture=network.architecture,
        preprocessing=network.preprocessing,
        recipe=recorded(settings.recipe),
        tied=tied_weights(network.model),
        accuracy=accuracy,
        calibration=done.calibration,
        search=done.search,
        prediction=_kept_prediction(done.prediction, num_bytes[1]),
    )


def _kept_prediction(prediction: Json | None, num_bytes: int) -> Json | None:
    """What a file has room for of it: all, the curve alone, or nothing."""
    if prediction is None:
        return None
    forms = (prediction, {**prediction, "shares": {}})
    fitting = [form for form in forms if len(canonical_json(form)) <= LARGEST_SHARE * num_bytes]
    return next(iter(fitting), None)


def recorded(recipe: Recipe) -> Json:
    """The options that a file records as such.

    The others are in its report in another form, or say where things are.
    """
    return {key: value for key, value in recipe.to_json().items() if key not in ELSEWHERE}


def promised_bytes(bytes_before: int, plan: CompressionPlan) -> int:
    """Bytes of all tensors once the plan is applied."""
    return bytes_before - sum(map(saved_bytes, plan.layers))


def saved_bytes(layer: LayerPlan) -> int:
    """How much larger a dense weight is than what is stored of it."""
    dense_type: torch.dtype = getattr(torch, layer.weight_dtype)
    core_type: torch.dtype = getattr(torch, layer.stored_dtype)
    num_scales = sum(map(prod, layer.scale_shapes.values()))

    stored = layer.params_after * core_type.itemsize + num_scales * torch.float32.itemsize
    return layer.params_before * dense_type.itemsize - stored
