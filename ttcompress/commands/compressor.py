"""Compression of one network in memory: by weight error or calibrated, for a target or in search of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import sqrt

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.room import room_for
from ttcompress.calibrate.stages import adopt, compress_calibrated
from ttcompress.calibrate.statistics import measure
from ttcompress.commands.metric import Metric
from ttcompress.errors import DataError, PlanError, TTCompressError, shortlist
from ttcompress.measure.latency import TimedNetwork, within_latency
from ttcompress.measure.multiply_adds import Usage, usage_of
from ttcompress.networks.answers import plain_answer
from ttcompress.networks.held import copied
from ttcompress.networks.running import Example, NetworkInput, input_dtype, placed
from ttcompress.networks.structures import chosen_outputs
from ttcompress.networks.surgery import apply_plan
from ttcompress.networks.weights import weight_of
from ttcompress.planning.budgets import Budget
from ttcompress.planning.by_hand import with_better_format
from ttcompress.planning.doubts import doubted, find_normed_layers
from ttcompress.planning.plan_file import adopt_plan
from ttcompress.planning.planner import Planner, Results
from ttcompress.planning.prediction import drawn_layer
from ttcompress.planning.selection import ADDING
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.extras import MOST_SPECTRA
from ttcompress.records.layers import Execution, LayerSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import fall
from ttcompress.runtime import threads_as_set
from ttcompress.settings import Settings
from ttcompress.tt.cost import Calls
from ttcompress.tt.decompose import squared_spectra
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import ModeMetric

SEARCH_STEP = 1.05
"""The search for the smallest network ends when the next point would be nearer than this factor."""
COUNTS_PARAMETERS = ("ratio", "params", "eps", "max_drop")
"""Targets whose plans take forms that cost time only where they must."""


LARGEST_DRAWN = 2**22
"""Entries of weights up to which singular values are computed for a picture alone, which takes about a second."""


@dataclass(frozen=True)
class Compressed:
    """A compressed network, its plan with the errors, and what the report says of calibration and search."""

    model: nn.Module
    plan: CompressionPlan
    calibration: Json | None = None
    search: tuple[Json, ...] = ()
    prediction: Json | None = None


@dataclass(frozen=True)
class Compressor:
    """How one network is compressed; what does not depend on the target is computed once.

    `measured` are the statistics of layers so far; compressors of the same network and images may share them.
    `results` may compute spectra elsewhere. Multiply-adds and latency depend on the first input of `example`, else
    on `input_shape`, that of one input, else on the first input to calibrate on.
    """

    model: nn.Module
    settings: Settings
    device: torch.device
    calibration: Calibration | None = None
    progress: Progress | None = None
    results: Results | None = None
    input_shape: tuple[int, ...] = ()
    example: NetworkInput | None = None
    measured: dict[str, LayerStatistics] = field(default_factory=dict)

    def sharing(self, other: Compressor) -> Compressor:
        """This one with the statistics of the other, which is of the same network and images."""
        return replace(self, measured=other.measured)

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
        plan = self._doubted(plan)
        if recipe.exec is not None:
            return _run_as(recipe.exec, plan)
        if recipe.tune:
            with threads_as_set():
                return self._timed_network.tuned(plan, self.progress)
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
                return within_latency(recipe.latency_ratio, plan_at, most, self._timed_network, self.progress)
        return self._planner.plan(recipe, self._usage if recipe.macs_ratio is not None else None)

    @cached_property
    def _usage(self) -> Usage:
        return usage_of(self.model, self._example)

    @cached_property
    def _timed_network(self) -> TimedNetwork:
        return TimedNetwork(self.model, self._example, self.device)

    @property
    def _example(self) -> Example:
        if self.example is not None:
            return Example(inputs=self.example)
        if self.input_shape:
            return Example(self.input_shape)
        if self.calibration is not None:
            return Example(inputs=next(iter(self.calibration.held_out())))
        raise PlanError(
            "the size of an input is not known; give it with --input-size, such as 3,224,224, "
            "or an example of inputs with --calib"
        )

    def apply(self, plan: CompressionPlan, inplace: bool = False) -> Compressed:
        """The network, or a copy of it, compressed."""
        images = self._images
        if images is None:
            model = self.model if inplace else copied(self.model)
            prediction = self._predicted(plan)
            return Compressed(model, self._decomposed(model, plan), prediction=prediction)
        statistics = self._statistics({layer.fqn: layer.spec for layer in plan.layers})
        reference = Reference(self._dense, statistics, images)
        compressed, plan, stages = compress_calibrated(
            reference, plan, self.settings.effort, self.settings.seed, self.progress
        )
        plan = self._doubted(plan)
        # While the network still has all its parameters.
        prediction = self._predicted(plan)
        model = self.model if inplace else copied(self.model)
        adopt(model, compressed, plan)
        return Compressed(model, plan, self.calibrated_on(stages), prediction=prediction)

    def spectra(self, plan: CompressionPlan) -> list[Json]:
        """The singular values of the layers of a plan that matter most, for pictures; to be asked for before `apply`.

        Those that no budget needed are computed, of weights that are not too large.
        """
        shares = (self._predicted(plan) or {}).get("shares", {})
        most = sorted(plan.layers, key=lambda layer: (-shares.get(layer.fqn, 0.0), -layer.params_before))
        chosen = {layer.fqn for layer in most[:MOST_SPECTRA]}
        return [
            drawn_layer(layer, cuts)
            for layer in plan.layers
            if layer.fqn in chosen and (cuts := self._cuts(layer)) is not None
        ]

    def _predicted(self, plan: CompressionPlan) -> Json | None:
        return self._planner.prediction(plan) if self._has_planned else None

    @property
    def _has_planned(self) -> bool:
        """Whether there are spectra of a plan that was made here; one that was given needs none."""
        return "_planner" in vars(self)

    def _cuts(self, layer: LayerPlan) -> Sequence[Tensor] | None:
        known = self._planner.cuts_of(layer) if self._has_planned else None
        if known is not None or layer.params_before > LARGEST_DRAWN:
            return known
        return squared_spectra(weight_of(self.model, layer), layer.tensorization)

    def _decomposed(self, model: nn.Module, plan: CompressionPlan) -> CompressionPlan:
        """The plan with what came of it, once it has been applied to a network, by weight error."""
        normed = self._normed_layers
        weights = [weight_of(model, layer) for layer in plan.layers]
        done = apply_plan(model, plan, self.device, self.progress)

        pairs = zip(done.layers, weights, strict=True)
        noted = [with_better_format(layer, weight) for layer, weight in pairs]
        return doubted(done.with_layers(noted), normed, is_calibrated=False)

    def _doubted(self, plan: CompressionPlan) -> CompressionPlan:
        return doubted(plan, self._normed_layers, self.calibration is not None)

    @cached_property
    def _normed_layers(self) -> list[str]:
        return find_normed_layers(self.model)

    def calibrated_on(self, stages: Sequence[Json] = ()) -> Json | None:
        """The report's `calibration`, None where weight error counts."""
        if self.calibration is None:
            return None
        return {
            "data": self.calibration.name,
            "images": self.calibration.num_images,
            "unit": self.calibration.unit,
            "held_out": self.calibration.num_held_out,
            "effort": self.settings.effort,
            "stages": list(stages),
            **self._cut,
        }

    @property
    def _cut(self) -> Json:
        """How many of the largest inputs pass at a time, where that is less than a batch."""
        images: Calibration | None = vars(self).get("_images")
        if images is None or images.room is None:
            return {}
        most = max(1, images.room.budget // max(1, images.room.with_gradients))
        return {"at_a_time": most} if most < min(self.settings.batch_size, images.num_images) else {}

    def search(self, metric: Metric | None) -> Compressed:
        """A copy of the network, compressed as far as it loses at most `max_drop`, by bisection of the ratio.

        Raises:
            PlanError: nothing to measure accuracy on, no weights, or no compression that was tried keeps the drop.
        """
        max_drop = self.settings.recipe.max_drop
        if max_drop is None or metric is None:
            raise PlanError(
                "--max-drop alone searches on data of its own, labelled images or texts: name it with --val "
                "(in Python a metric will do)"
            )
        if any(parameter.is_meta for parameter in self.model.parameters()):
            raise PlanError("--max-drop needs the weights: give a checkpoint")

        dense = metric.measure(self.model)
        low, high = 1.0, self._planner.most()
        best: Compressed | None = None
        points: list[Json] = []

        # Bisection in the logarithm: a step from 2x to 2.1x is worth as much as one from 4x to 4.2x.
        while high > low * SEARCH_STEP:
            ratio = sqrt(low * high)
            tried = self.apply(self.plan(replace(self.settings.recipe, ratio=ratio)))
            found = metric.summary(dense, metric.measure(tried.model))
            drop = fall(found)
            points.append(
                {
                    "ratio": ratio,
                    "compression": tried.plan.compression,
                    "accuracy": found["compressed"],
                    "drop": drop,
                }
            )
            if drop <= max_drop:
                low, best = ratio, tried
            else:
                high = ratio

        if best is None:
            least = f"{points[-1]['compression']:.2f}x loses {points[-1]['drop']:.4g}" if points else "none"
            raise PlanError(f"no compression keeps the drop within {max_drop:g}; the mildest tried: {least}")
        return replace(best, search=tuple(points))

    @cached_property
    def _planner(self) -> Planner:
        planner = Planner(self.model, self.settings.recipe, self.device, self.progress, self._running_order)
        if self.calibration is not None:
            planner.metrics = partial(self._metrics, planner.specs)
        if self.results is not None:
            planner.results = self.results
        if planner.pace is not None and self.settings.recipe.target in COUNTS_PARAMETERS:
            planner.pace = replace(planner.pace, calls=self._known_calls)
        return planner

    @property
    def _known_calls(self) -> Mapping[str, Calls]:
        """What the layers do for one input, where one is known."""
        try:
            return self._usage.calls
        except TTCompressError:
            return {}

    @property
    def _running_order(self) -> tuple[str, ...]:
        """The layers in the order in which they run, where inputs are at hand and more than one may be the last."""
        linears = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        replaces_default = any(not pattern.startswith(ADDING) for pattern in self.settings.recipe.include)
        if len(linears) < 2 or replaces_default:
            return ()
        try:
            return tuple(self._usage.calls)
        except TTCompressError:
            return ()

    def _metrics(
        self, specs: Mapping[str, LayerSpec], fqn: str, tensorization: Tensorization
    ) -> list[ModeMetric]:
        return self._statistics(specs)[fqn].metrics(tensorization)

    def _statistics(self, specs: Mapping[str, LayerSpec]) -> dict[str, LayerStatistics]:
        """Of these weights; those measured before are remembered."""
        missing = {name: spec for name, spec in specs.items() if name not in self.measured}
        if missing and self._images is not None:
            found = measure(self._dense, missing, self._images, self.settings.seed, self.progress)
            self.measured.update(found)
            idle = [name for name in missing if name not in self.measured]
            if idle:
                raise DataError(
                    f"the network does not run {shortlist(idle)} on the calibration data: --exclude it"
                )
        return self.measured

    @cached_property
    def _images(self) -> Calibration | None:
        if self.calibration is None:
            return None
        images = self.calibration.mapped(partial(placed, device="cpu", dtype=input_dtype(self._dense)))
        images = replace(images, room=room_for(self._dense, images.held_out()))
        if images.answer is not plain_answer:
            return images

        pieces = (each for batch in images.held_out() for each in images.pieces(batch, gradients=False))
        batches = (placed(each, self.device) for each in pieces)
        chosen = chosen_outputs(self._dense, batches, self.settings.outputs)
        return images if chosen is None else replace(images, answer=chosen)

    @cached_property
    def _dense(self) -> nn.Module:
        """The network as it was, frozen, on the device, in a type that can be computed in.

        It has the memory of the network, until that is compressed in place, when it has done its work.
        """
        dense = copied(self.model, sharing=True).requires_grad_(False).eval().to(self.device)
        return dense.float() if input_dtype(dense) in (torch.float16, torch.bfloat16) else dense


def _check_execution(recipe: Recipe) -> None:
    counts_running = recipe.macs_ratio is not None or recipe.latency_ratio is not None
    if counts_running and (recipe.tune or recipe.exec):
        raise PlanError(
            "--macs-ratio and --latency-ratio say how layers run, as counted or timed: no --exec or --tune"
        )
    if recipe.tune and recipe.exec:
        raise PlanError("--tune decides by measurement how layers run: leave out --exec")
    if recipe.input_size and not (counts_running or recipe.tune):
        raise PlanError("--input-size is for --macs-ratio, --latency-ratio and --tune: leave it out")


def _run_as(execution: str, plan: CompressionPlan) -> CompressionPlan:
    """The plan with every layer that can run in this way forced to."""
    able = [execution in layer.executions for layer in plan.layers]
    if not any(able):
        raise PlanError(
            f"--exec {execution}: no layer of the plan can run so; they are {shortlist(_formats(plan))}"
        )
    layers = zip(plan.layers, able, strict=True)
    return plan.with_layers(
        [replace(layer, execution=Execution(execution)) if can else layer for layer, can in layers]
    )


def _formats(plan: CompressionPlan) -> list[str]:
    return sorted({f"{layer.spec.kind} {layer.tensorization.format}" for layer in plan.layers})
