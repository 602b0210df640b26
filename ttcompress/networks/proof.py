"""The network that a file will hold, run beside the one in memory before the file is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import ArchitectureError
from ttcompress.networks.factories import Factory
from ttcompress.networks.opening import rebuilt
from ttcompress.networks.running import Example, NetworkInput, call, device_of, tensors_of
from ttcompress.records.report import Report

INPUTS = 2
TOLERANCE, NARROW_TOLERANCE = 1e-3, 5e-2
"""Largest difference, over the largest output: in float32 and float64, and in narrower types."""


@torch.no_grad()
def prove(
    model: nn.Module, report: Report, stored: Mapping[str, Tensor], factory: Factory | None, example: Example
) -> None:
    """See that the network as it will be loaded answers as the one in memory does.

    Raises:
        ArchitectureError: it answers otherwise.
        TTCompressError: it cannot be loaded, or does not take the inputs.
    """
    inputs = example.suited(model).batch(model, INPUTS)
    wanted = _answer(model, inputs)

    again = rebuilt(report, stored, factory).to(device_of(model))
    again.train(model.training)
    if _agree(_answer(again, inputs), wanted):
        return
    # A network that draws numbers of its own answers otherwise each time.
    if _agree(_answer(model, inputs), wanted):
        raise ArchitectureError(
            "the network as it would be loaded from the file answers otherwise than the one in memory: it runs "
            "weights that no parameter or buffer of it holds, or its constructor does not always build the same"
        )


def _answer(model: nn.Module, inputs: NetworkInput) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answer: Any = call(model, inputs)
    return tensors_of(answer)


def _agree(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(_near, found, wanted))


def _near(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or not wanted.is_floating_point():
        return found.shape == wanted.shape
    tolerance = TOLERANCE if wanted.element_size() >= torch.float32.itemsize else NARROW_TOLERANCE
    finite = wanted[wanted.isfinite()].double()
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(found.double(), wanted.double(), rtol=0, atol=tolerance * largest, equal_nan=True)
