"""Latency as a budget, and executions of layers by measurement: both on this device, before anything is decomposed.

How long a network takes depends on the shapes of its cores, not on their values: random ones are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import nn

from ttcompress.errors import PlanError
from ttcompress.measure.timing import NOISE, at_its_best, by_turns, device_name, input_of, runner
from ttcompress.networks.held import copied
from ttcompress.networks.running import Example, NetworkInput, call, input_dtype
from ttcompress.networks.surgery import install_fresh
from ttcompress.networks.weights import tied_names
from ttcompress.records.common import Json, Progress, format_compression
from ttcompress.records.layers import EmbeddingSpec, Execution, WeightSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan

BATCH_SIZES = 1, 32
"""Those that executions of a layer are timed at."""
SEARCH_STEP = 1.03
SHARE = 0.3
"""Of the time that a benchmark takes, for each point of a search and each layer."""


class TimedNetwork:
    """A dense network on a device, and inputs of it, to try plans on."""

    def __init__(self, model: nn.Module, example: Example, device: torch.device) -> None:
        """Copy the network; the copy of one on the meta device has arbitrary values.

        Raises:
            DataError: an input that the network does not take.
        """
        self._dense = _filled(copied(model), device).requires_grad_(False).eval()
        self._example, self._device = example.suited(self._dense), device
        with torch.no_grad():
            call(self._dense, self._inputs(1))

    def _inputs(self, size: int) -> Any:
        return self._example.batch(self._dense, size)

    def _compressed(self, layers: Sequence[LayerPlan]) -> nn.Module:
        model = copied(self._dense)
        dtype = input_dtype(self._dense)
        aliases = tied_names(model)
        for layer in layers:
            install_fresh(model, layer, aliases.get(layer.weight_name, ()), self._device, dtype)
        return model

    def latency(self, plan: CompressionPlan, share: float) -> Json:
        """Seconds for one input, `dense` and `compressed`, their `ratio`, and the device."""
        sides = [self._dense, self._compressed(plan.layers)]
        runs = [runner(model, at_its_best(model, self._inputs(1))[0], training=False) for model in sides]
        timings = by_turns(runs[0], runs[1], self._device, share)
        seconds = {"dense": median(timings.dense), "compressed": median(timings.compressed)}
        return {**seconds, "ratio": 1 / timings.ratio, "device": device_name(self._device)}

    def tuned(self, plan: CompressionPlan, progress: Progress | None = None) -> CompressionPlan:
        """The plan with the execution of each layer that is faster at all BATCH_SIZES, `auto` where they differ."""
        model = self._compressed(plan.layers)
        winners: dict[str, set[Execution]] = {layer.fqn: set() for layer in plan.layers}
        for number, batch in enumerate(BATCH_SIZES):
            images, _ = at_its_best(model, self._inputs(batch))
            for done, layer in enumerate(plan.layers):
                if isinstance(layer.spec, WeightSpec | EmbeddingSpec):
                    continue  # There is but one way, or one without the whole table in memory.
                if progress:
                    progress(f"timing {layer.fqn}", number * len(plan.layers) + done, 2 * len(plan.layers))
                winners[layer.fqn].add(self._faster_execution(model, layer, images))
        chosen = {fqn: found.pop() if len(found) == 1 else Execution.AUTO for fqn, found in winners.items()}
        return plan.with_layers([replace(layer, execution=chosen[layer.fqn]) for layer in plan.layers])

    def _faster_execution(self, model: nn.Module, layer: LayerPlan, images: NetworkInput) -> Execution:
        _, by_cores, dense = layer.executions
        module = model.get_submodule(layer.fqn)
        x = input_of(model, module, images)
        twins = {execution: copied(module) for execution in (dense, by_cores)}
        for execution, twin in twins.items():
            twin.execution = execution  # type: ignore[assignment]
        runs = [runner(twin, x, training=False) for twin in twins.values()]
        ratio = by_turns(runs[0], runs[1], self._device, SHARE).ratio
        if 1 / NOISE < ratio < NOISE:
            return Execution.AUTO
        return by_cores if ratio < 1 else dense


def _filled(model: nn.Module, device: torch.device) -> nn.Module:
    """On a device, with small constants where there were no values."""
    if not any(tensor.is_meta for tensor in model.state_dict().values()):
        return model.to(device)
    model = model.to_empty(device=device)
    for tensor in model.state_dict().values():
        tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return model


def within_latency(
    asked: float,
    plan_at: Callable[[float], CompressionPlan],
    most: float,
    bed: TimedNetwork,
    progress: Progress | None = None,
) -> CompressionPlan:
    """The mildest plan found by bisection that runs `asked` times as fast as the dense network, one input at a time.

    Args:
        plan_at: the plan for a ratio of what the cost model says, up to `most`.

    Raises:
        PlanError: not even the plan for `most` does, with what it reaches.
    """
    if most <= 1:
        raise PlanError(
            f"--latency-ratio {asked:g} is out of reach: by the cost model no TT form of a layer is faster"
        )
    points = 0

    def latency_at(ratio: float, share: float) -> tuple[CompressionPlan, Json]:
        nonlocal points
        plan, points = plan_at(ratio), points + 1
        if progress:
            progress("latency", points, 0)
        return plan, bed.latency(plan, share)

    low, high = 1.0, most
    _, latency = latency_at(most, SHARE)
    while high > low * SEARCH_STEP and latency["ratio"] >= asked:
        middle = sqrt(low * high)
        if latency_at(middle, SHARE)[1]["ratio"] >= asked:
            high = middle
        else:
            low = middle
    # Points of a search are timed shortly; what is promised is not.
    while True:
        plan, latency = latency_at(high, 1.0)
        if latency["ratio"] >= asked:
            return replace(plan, latency={"asked": asked, **latency})
        if high >= most:
            raise PlanError(
                f"--latency-ratio {asked:g} is out of reach: the most that was measured is {latency['ratio']:.2f}x, "
                f"with {format_compression(plan.compression)} fewer parameters ({latency['device']})"
            )
        high = min(most, high * SEARCH_STEP)
