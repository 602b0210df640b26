"""Compression of one network in memory: by weight error or calibrated, for a target or in search of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod, sqrt

import torch
from torch import nn

from ttcompress.calibrate.stages import adopt, compress_calibrated
from ttcompress.calibrate.statistics import LayerStatistics, measure
from ttcompress.data.calibration_images import Calibration
from ttcompress.errors import DataError, PlanError, shortlist
from ttcompress.measure.latency import Bed, within_latency
from ttcompress.measure.multiply_adds import Usage, usage_of
from ttcompress.networks.opening import Network
from ttcompress.networks.running import input_dtype
from ttcompress.networks.stored import tied_parameters
from ttcompress.networks.surgery import apply_plan
from ttcompress.planning.plan_file import adopt_plan
from ttcompress.planning.planner import Budget, Planner, Results
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.layers import Execution
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report
from ttcompress.runtime import threads_as_set
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import ModeMetric
from ttcompress.version import __version__

SEARCH_STEP = 1.05
"""The search for the smallest network ends when the next point would be nearer than this factor."""


@dataclass(frozen=True)
class Compressed:
    """A compressed network, its plan with the errors, and what the report says of calibration and search."""

    model: nn.Module
    plan: CompressionPlan
    calibration: Json | None = None
    search: tuple[Json, ...] = ()


@dataclass(frozen=True)
class Compressor:
    """How one network is compressed; what does not depend on the target is computed once.

    `results` may compute spectra elsewhere. Multiply-adds and latency depend on `input_shape`, that of one input.
    """

    model: nn.Module
    recipe: Recipe
    device: torch.device
    calibration: Calibration | None = None
    progress: Progress | None = None
    results: Results | None = None
    input_shape: tuple[int, ...] = ()

    def plan(self, recipe: Recipe, given: CompressionPlan | None = None) -> CompressionPlan:
        """The plan for a recipe, or the one given, checked against the network.

        Raises:
            PlanError: a plan beside another target, one that does not fit, or one that would replace nothing.
        """
        _check_execution(recipe)
        plan = self._planned(recipe) if given is None else adopt_plan(self.model, recipe, given)
        if not plan.layers:
            reasons = sorted({kept.reason for kept in plan.kept if kept.kind})
            raise PlanError(f"nothing would be compressed, every layer stays dense: {shortlist(reasons)}")
        if recipe.dtype is not None:
            plan = plan.with_layers([replace(layer, core_dtype=recipe.dtype) for layer in plan.layers])
        if recipe.exec is not None:
            return _run_as(recipe.exec, plan)
        if recipe.tune:
            with threads_as_set():
                return self._bed.tuned(plan, self.progress)
        return plan

    def _planned(self, recipe: Recipe) -> CompressionPlan:
        if recipe.latency_ratio is not None:
            counting = self._planner.time(self._usage)
            # A little less than the most, which as a fraction may be a little more.
            most = 0.999 * self._planner.most(counting)

            def plan_at(ratio: float) -> CompressionPlan:
                # How near a plan comes to what the model says is of no interest, only how fast it runs.
                return replace(self._planner.within(Budget.of_ratio("cost ratio", counting, ratio)), notes=())

            with threads_as_set():
                return within_latency(recipe.latency_ratio, plan_at, most, self._bed, self.progress)
        return self._planner.plan(recipe, self._usage if recipe.macs_ratio is not None else None)

    @cached_property
    def _usage(self) -> Usage:
        return usage_of(self.model, self._shape)

    @cached_property
    def _bed(self) -> Bed:
        return Bed(self.model, self._shape, self.device)

    @property
    def _shape(self) -> tuple[int, ...]:
        if not self.input_shape:
            raise PlanError("the size of an input is not known; give it with --input-size, such as 3,224,224")
        return self.input_shape

    def apply(self, plan: CompressionPlan, inplace: bool = False) -> Compressed:
        """The network, or a copy of it, compressed."""
        images = self._images
        if images is None:
            model = self.model if inplace else copy.deepcopy(self.model)
            return Compressed(model, apply_plan(model, plan, self.device, self.progress))
        effort, seed = self.recipe.effort or "default", self.recipe.seed or 0
        statistics = self._statistics(tuple(layer.fqn for layer in plan.layers))
        compressed, plan, stages = compress_calibrated(
            self._dense, plan, statistics, images, effort, seed, self.progress
        )
        model = self.model if inplace else copy.deepcopy(self.model)
        adopt(model, compressed, plan)
        return Compressed(model, plan, self.calibrated_on(stages))

    def calibrated_on(self, stages: Sequence[Json] = ()) -> Json | None:
        """The report's `calibration`, None where weight error counts."""
        if self.calibration is None:
            return None
        counts = {"images": self.calibration.num_images, "held_out": self.calibration.num_held_out}
        effort = self.recipe.effort or "default"
        return {"data": self.calibration.name, **counts, "effort": effort, "stages": list(stages)}

    def search(self, accuracy: Callable[[nn.Module], float] | None) -> Compressed:
        """A copy of the network, compressed as far as it loses at most `max_drop` points, by bisection of the ratio.

        Raises:
            PlanError: nothing to measure accuracy on, no weights, or no compression that was tried keeps the drop.
        """
        max_drop = self.recipe.max_drop or 0.0
        if accuracy is None:
            raise PlanError("--max-drop alone searches on labelled images of their own: name them with --val")
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise PlanError("--max-drop needs the weights: give a checkpoint")
        dense = accuracy(self.model)
        low, high = 1.0, self._planner.most()
        best: Compressed | None = None
        points: list[Json] = []
        while high > low * SEARCH_STEP:
            ratio = sqrt(low * high)
            tried = self.apply(self.plan(replace(self.recipe, ratio=ratio)))
            drop = dense - accuracy(tried.model)
            points.append(
                {"ratio": ratio, "compression": tried.plan.compression, "accuracy": dense - drop, "drop": drop}
            )
            if drop <= max_drop:
                low, best = ratio, tried
            else:
                high = ratio
        if best is None:
            least = f"{points[-1]['compression']:.2f}x loses {points[-1]['drop']:.2f} points" if points else "none"
            raise PlanError(f"no compression keeps the drop within {max_drop:g} points; the mildest tried: {least}")
        return replace(best, search=tuple(points))

    @cached_property
    def _planner(self) -> Planner:
        planner = Planner(self.model, self.recipe, self.device, self.progress)
        if self.calibration is not None:
            planner.metrics = partial(self._metrics, tuple(planner.names))
        if self.results is not None:
            planner.results = self.results
        return planner

    def _metrics(self, names: tuple[str, ...], fqn: str, tensorization: Tensorization) -> list[ModeMetric]:
        return self._statistics(names)[fqn].metrics(tensorization)

    def _statistics(self, names: tuple[str, ...]) -> dict[str, LayerStatistics]:
        """Of these layers; those measured before are remembered."""
        missing = [name for name in names if name not in self._measured]
        if missing and self._images is not None:
            self._measured.update(measure(self._dense, missing, self._images, self.recipe.seed or 0, self.progress))
            idle = [name for name in missing if name not in self._measured]
            if idle:
                raise DataError(f"the network does not run {shortlist(idle)} on the calibration data: --exclude it")
        return self._measured

    @cached_property
    def _measured(self) -> dict[str, LayerStatistics]:
        return {}

    @cached_property
    def _images(self) -> Calibration | None:
        return self.calibration and self.calibration.cast(input_dtype(self._dense))

    @cached_property
    def _dense(self) -> nn.Module:
        """The network as it was, frozen, on the device, in a type that can be computed in."""
        dense = copy.deepcopy(self.model).requires_grad_(False).eval().to(self.device)
        return dense.float() if input_dtype(dense) in (torch.float16, torch.bfloat16) else dense


def _check_execution(recipe: Recipe) -> None:
    running = recipe.macs_ratio or recipe.latency_ratio
    if running and (recipe.tune or recipe.exec):
        raise PlanError("--macs-ratio and --latency-ratio say how layers run, as counted or timed: no --exec or --tune")
    if recipe.tune and recipe.exec:
        raise PlanError("--tune decides by measurement how layers run: leave out --exec")
    if recipe.input_size and not (running or recipe.tune):
        raise PlanError("--input-size is for --macs-ratio, --latency-ratio and --tune: leave it out")


def _run_as(way: str, plan: CompressionPlan) -> CompressionPlan:
    """The plan with every layer that can run in this way forced to."""
    able = [way in layer.executions for layer in plan.layers]
    if not any(able):
        raise PlanError(f"--exec {way}: no layer of the plan can run so; they are {shortlist(_formats(plan))}")
    forced = [
        replace(layer, execution=Execution(way)) if can else layer for layer, can in zip(plan.layers, able, strict=True)
    ]
    return plan.with_layers(forced)


def _formats(plan: CompressionPlan) -> list[str]:
    return sorted({f"{layer.spec.kind} {layer.tensorization.format}" for layer in plan.layers})


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
