"""Long refinement from the best of several starts, for networks of which TT-SVD keeps little.

Where a layer keeps a hundredth of its parameters, its leading singular vectors hold next to nothing of it. What
hangs on the dense layers then misleads: least squares on a layer's outputs, and the metric of natural gradients.
What is left is what any network of random weights has, a training: of all parameters, to the answers of the
dense network, at rates that fit the scale of each core.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import count, islice
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.held_out_errors import network_error
from ttcompress.calibrate.natural_gradient import half_squared_error
from ttcompress.calibrate.observe import gradients_in_eval
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.refine import Schedule, augment, moved
from ttcompress.data.augment import flipped
from ttcompress.errors import DataError
from ttcompress.networks.running import NetworkInput, batch_size, device_of, placed
from ttcompress.networks.weights import cores_of, tt_parts, weight_of
from ttcompress.records.common import Progress
from ttcompress.records.plan import CompressionPlan
from ttcompress.tt.decompose import frobenius_norm

KEPT = 0.25
"""Share of the squared norm of all planned weights below which TT-SVD keeps little.

It keeps 0.65 of ResNet-20 at 3x, and 0.01 to 0.1 of a layer at 100x to 4,000x."""
LEAST_COMPRESSION = 8
"""Of the planned weights, so that what is compressed little takes no longer, whatever TT-SVD keeps of it."""
RANDOM_STARTS = 2
RACE = 100
"""Steps that every start gets before the best goes on."""
CORE_RATE = 0.1
"""Adam's rate for a core, as a share of the root mean square of its entries: their scale is no one's choice."""
WEIGHT_RATE, VECTOR_RATE = 0.1, 0.005
"""The same for other weights, but at most VECTOR_RATE, which is that of biases and norms: they may be all zeros."""

State = Mapping[str, Tensor]


def keeps_little(dense: nn.Module, plain: nn.Module, plan: CompressionPlan) -> bool:
    """Whether TT-SVD of the weights, as in `plain`, keeps less than KEPT of their squared norms.

    Every weight counts by its parameters, for large norms do not make a layer matter more. Plans of less than
    LEAST_COMPRESSION keep enough.
    """
    before = sum(layer.params_before for layer in plan.layers)
    after = sum(layer.params_after for layer in plan.layers)
    if before < LEAST_COMPRESSION * after:
        return False

    kept = 0.0
    for layer in plan.layers:
        weight = weight_of(dense, layer)
        norm = frobenius_norm(weight)
        missed = frobenius_norm(weight - weight_of(plain, layer)) / norm if norm else 0.0
        kept += layer.params_before * (1 - missed**2)
    return kept < KEPT * before


def refine_from_afar(
    reference: Reference,
    compressed: nn.Module,
    plain: nn.Module,
    plan: CompressionPlan,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train `compressed`, in place and in eval mode, from the start that a short race finds best.

    In the race are TT-SVD of the weights (`plain`) and random cores, beside what else the dense network has. Held-out
    images decide. What `compressed` was before is not in it: it would be ahead by the steps that it has had, but its
    biases have gone where units are dead, and it ends behind.
    """
    drawn = [_random(reference.dense, plain, plan, seed * RANDOM_STARTS + k) for k in range(RANDOM_STARTS)]
    starts: list[State] = [copy.deepcopy(start) for start in (plain.state_dict(), *drawn)]

    compressed.requires_grad_()
    with gradients_in_eval(compressed):
        ends = []
        for number, start in enumerate(starts):
            compressed.load_state_dict(start)
            _train(reference, compressed, RACE, seed)
            ends.append((_error(reference, compressed), number, copy.deepcopy(compressed.state_dict())))
            if progress:
                progress("trying starts", number + 1, len(starts))

        _, _, best = min(ends, key=lambda end: end[:2])
        compressed.load_state_dict(best)
        _train(reference, compressed, steps, seed + 1, progress)


def _error(reference: Reference, model: nn.Module) -> float:
    try:
        return network_error(reference.dense, model, reference.calibration)
    except DataError:
        return float("inf")


@torch.no_grad()
def _random(dense: nn.Module, plain: nn.Module, plan: CompressionPlan, seed: int) -> State:
    """A compressed network with normal cores whose weight has about the norm of the dense one."""
    drawn = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for layer in plan.layers:
        cores = cores_of(drawn, layer)
        wanted = frobenius_norm(weight_of(dense, layer))
        for core in cores:
            core.copy_(torch.randn(core.shape, generator=generator))
        # Of a few cores with few entries the product strays far from what is expected: it is measured.
        factor = wanted / (frobenius_norm(weight_of(drawn, layer)) or 1.0)
        for core in cores:
            core *= factor ** (1 / len(cores))
    return drawn.state_dict()


def _train(
    reference: Reference, model: nn.Module, steps: int, seed: int, progress: Progress | None = None
) -> None:
    """Steps by Adam to half the squared error of the outputs; rates rise, then fall to nothing."""
    answer = reference.calibration.answer
    optimizer = torch.optim.Adam(_groups(model), betas=(0.9, 0.99))
    share = Schedule(steps, 1.0, 1.0).share
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    for step, inputs in enumerate(islice(_inputs(reference, seed), steps)):
        with torch.no_grad():
            target = answer(reference.dense, inputs)
        loss = half_squared_error(answer(model, inputs), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        if progress:
            progress("refining from afar", step + 1, steps)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Every parameter with its rate."""
    cores = {id(core) for part in tt_parts(model).values() for core in part.cores}
    return [{"params": [each], "lr": _rate(each, id(each) in cores)} for each in model.parameters()]


def _rate(parameter: Tensor, is_core: bool) -> float:
    scale = frobenius_norm(parameter.detach()) / sqrt(max(1, parameter.numel()))
    if is_core:
        return CORE_RATE * scale
    return VECTOR_RATE if parameter.dim() < 2 else min(VECTOR_RATE, WEIGHT_RATE * scale)


def _inputs(reference: Reference, seed: int) -> Iterator[NetworkInput]:
    generator = torch.Generator().manual_seed(seed)
    device = device_of(reference.dense)
    for number in count(1):
        for batch in reference.calibration.fitting(number):
            if batch_size(batch) > 1:
                yield placed(varied(batch, generator), device)


def varied(inputs: NetworkInput, generator: torch.Generator) -> Any:
    """Images (N, C, H, W) flipped and moved, all else mixed as in ordinary refinement.

    Mixtures of images, and digits in a mirror, would take up what little the cores can hold: images of one channel
    are moved alone, as in training.
    """
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not inputs.is_floating_point():
        return augment(inputs, generator)
    if inputs.shape[1] > 1:
        inputs = flipped(inputs, torch.rand(len(inputs), generator=generator) < 0.5)
    return moved(inputs, generator)
