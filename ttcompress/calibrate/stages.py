"""The stages of a calibrated compression, each kept only if held-out calibration images say so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.decompose import decompose, swap_in, weight_only
from ttcompress.calibrate.judging import network_error, output_errors, recalibrate_batch_norm
from ttcompress.calibrate.refine import refine
from ttcompress.calibrate.statistics import Statistics
from ttcompress.calibrate.sweeps import sweep_layers
from ttcompress.data.calibration_images import Calibration
from ttcompress.errors import DataError
from ttcompress.networks.surgery import layer_from, store_cores, swap
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import frobenius_norm


@dataclass(frozen=True)
class Effort:
    """How many least-squares sweeps over each layer, and how many steps of joint refinement."""

    sweeps: int
    steps: int


EFFORTS = {"fast": Effort(1, 0), "default": Effort(1, 150), "max": Effort(2, 400)}


class Stages:
    """The best network so far, and what each stage was worth.

    `errors` holds by fqn and stage the relative output error; a stage that was not kept has none.
    """

    def __init__(self, dense: nn.Module, plan: CompressionPlan, calibration: Calibration) -> None:
        self.model = copy.deepcopy(dense)
        self.log: list[Json] = []
        self.errors: dict[str, dict[str, float]] = {layer.fqn: {} for layer in plan.layers}
        self._dense, self._plan, self._calibration = dense, plan, calibration
        self._least = inf

    def run(self, name: str, change: Callable[[nn.Module], object]) -> None:
        """Try a change on a copy of the best network; keep it if that one comes nearer to the dense network."""
        trial = copy.deepcopy(self.model)
        if change(trial) is False:
            return
        error = self._error(trial)
        kept = error < self._least or not self.log
        self.log.append({"stage": name, "error": error if isfinite(error) else None, "kept": kept})
        if kept:
            self.model, self._least = trial, error
            for fqn, missed in output_errors(self._dense, trial, self._plan, self._calibration).items():
                self.errors[fqn][name] = missed

    def _error(self, trial: nn.Module) -> float:
        try:
            return network_error(self._dense, trial, self._calibration)
        except DataError:
            return inf


@torch.enable_grad()
def compress_calibrated(
    dense: nn.Module,
    plan: CompressionPlan,
    statistics: Statistics,
    calibration: Calibration,
    effort: str,
    seed: int,
    progress: Progress | None = None,
) -> tuple[nn.Module, CompressionPlan, list[Json]]:
    """The compressed network, the plan with the errors of every stage, and the log of the stages.

    `dense` is frozen and stays as it is. The last stage that came nearer to it on held-out images is the result.
    """
    stages = Stages(dense, plan, calibration)
    amount = EFFORTS[effort]

    def whitened(weight: Tensor, layer: LayerPlan) -> list[Tensor]:
        return decompose(weight, layer, statistics[layer.fqn])

    def swept(model: nn.Module) -> None:
        sweep_layers(dense, model, plan, statistics, calibration, amount.sweeps, progress)

    def refined(model: nn.Module) -> None:
        refine(dense, model, statistics, calibration, amount.steps, seed, progress)

    stages.run("weights", lambda model: _replace(model, dense, plan, weight_only, progress))
    stages.run("whitened", lambda model: _replace(model, dense, plan, whitened, progress))
    if amount.sweeps:
        stages.run("sweeps", swept)
    stages.run("batch norm", lambda model: recalibrate_batch_norm(model, calibration))
    if amount.steps:
        stages.run("refinement", refined)
    store_cores(stages.model, plan)
    layers = [
        replace(
            layer, relative_error=_relative_error(dense, stages.model, layer), output_error=stages.errors[layer.fqn]
        )
        for layer in plan.layers
    ]
    return stages.model, plan.with_layers(layers), stages.log


def _replace(
    model: nn.Module,
    dense: nn.Module,
    plan: CompressionPlan,
    cores_of: Callable[[Tensor, LayerPlan], list[Tensor]],
    progress: Progress | None,
) -> None:
    for done, layer in enumerate(plan.layers):
        if progress:
            progress(f"decomposing {layer.fqn}", done, len(plan.layers))
        weight: Tensor = dense.get_submodule(layer.fqn).weight.detach()  # type: ignore[operator]
        swap_in(model, dense, layer, cores_of(weight, layer))


def _relative_error(dense: nn.Module, model: nn.Module, layer: LayerPlan) -> float:
    weight, ours = (network.get_submodule(layer.fqn).weight.detach() for network in (dense, model))  # type: ignore[operator]
    norm = frobenius_norm(weight)
    return frobenius_norm(weight - ours) / norm if norm else 0.0


@torch.no_grad()
def adopt(model: nn.Module, compressed: nn.Module, plan: CompressionPlan) -> None:
    """Give a network the layers and values of its compressed copy; its own device and, but for cores, types stay."""
    for layer in plan.layers:
        module = model.get_submodule(layer.fqn)
        own: Tensor = module.weight  # type: ignore[assignment]
        fitted: Any = compressed.get_submodule(layer.fqn)
        cores = [core.to(own.device) for core in fitted.cores]
        swap(model, layer.fqn, layer_from(layer, module, cores))
    values = compressed.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(values[name])
