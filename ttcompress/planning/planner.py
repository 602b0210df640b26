"""Plans of a network for what the user asked for: which weights, in which tensorization, at which TT-ranks.

Reads a model, never changes it. Hand-given ranks need shapes only, so a model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ttcompress.errors import PlanError, ShapeError
from ttcompress.layers.spec import viewed
from ttcompress.measure.multiply_adds import Usage
from ttcompress.planning.assemble import Decisions, assemble
from ttcompress.planning.budgets import Budget, Counting, OutOfReachError, reach_text
from ttcompress.planning.candidates import Choice
from ttcompress.planning.choosing import AUTO, Chooser, Chosen
from ttcompress.planning.doubts import including, out_of_reach, out_of_reach_note
from ttcompress.planning.pace import Pace
from ttcompress.planning.prediction import error_shares, predicted_curve, prediction_of
from ttcompress.planning.requests import LayerRequest, check_eps, layer_requests, planned_by_hand, rank_option
from ttcompress.planning.selection import Layer, find_layers
from ttcompress.planning.spectra import LayerSpectra, layer_spectra, worth_bounding
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.layers import LayerSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.cost import MULTIPLY_ADDS, TIME
from ttcompress.tt.shapes import FORMATS, Tensorization, tensorize_shape
from ttcompress.tt.whiten import ModeMetric

Metrics = Callable[[str, Tensorization], Sequence[ModeMetric]]
"""By fqn and tensorization: the metric of each mode in which errors count."""


Results = Callable[[Sequence[int], Callable[[int], LayerSpectra]], list[LayerSpectra]]
"""Called with the sizes of weights and a function that finds spectra by index: all that it finds.

Where and when it is called is left open: processes may share the weights, a file may hold what is known."""


class Planner:
    """Plans of one network; the spectra are computed once, however many targets are planned.

    `metrics` says by fqn and tensorization what errors cost; without it, weights count as they are. `results`
    may compute the spectra elsewhere. `pace` says which forms are slow, by what the layers do where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        running_order: Sequence[str] = (),
    ) -> None:
        """Find the layers and check what the recipe says about them.

        Raises:
            PlanError, ShapeError: see `make_plan`.
        """
        self.metrics: Metrics | None = None
        self.results: Results | None = None
        self._model, self._device, self._progress = model, device, progress
        self._rank_multiple = recipe.rank_multiple or AUTO
        self.pace = None if recipe.any_time else Pace(training=recipe.epochs is not None)

        if recipe.target == "ranks" and recipe.rank_multiple is not None:
            raise PlanError(
                "--rank-multiple is for --eps and budgets, not for TT-ranks given by hand: leave it out"
            )

        # Where only rules give ranks, only what they match is asked for.
        rules_only = recipe.target == "ranks" and recipe.ranks is None and recipe.conv_ranks is None
        include = recipe.include or tuple(rule.match for rule in recipe.layers if rules_only)
        self._layers = find_layers(
            model, include, recipe.exclude, running_order, by_hand=recipe.target == "ranks"
        )
        self._out_of_reach = out_of_reach(model, self._layers)

        requests = layer_requests(self._layers, recipe, self._out_of_reach)
        by_hand = [request for request in requests if request.ranks is not None]
        as_given = bool(recipe.from_scratch)
        self._by_hand = {request.layer.fqn: planned_by_hand(request, as_given) for request in by_hand}
        self._searched = [request for request in requests if request.ranks is None]

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """The layers that a plan may replace, by fqn."""
        return {layer.fqn: layer.spec for layer in self._layers if not layer.kept}

    @cached_property
    def _spectra(self) -> list[LayerSpectra]:
        """The spectra of every layer in every tensorization, one layer in memory at a time."""
        weights = [request.layer.weight for request in self._searched]
        if any(weight.is_meta for weight in weights):
            raise PlanError("--eps and budgets need the weights: give a checkpoint")
        if self.results is not None:
            return self.results([weight.numel() for weight in weights], self._spectra_of)
        return [self._first_spectra_of(index) for index in range(len(weights))]

    def _first_spectra_of(self, index: int) -> LayerSpectra:
        """The spectra of a layer, with bounds for tensorizations that take long and may not be chosen at all."""
        tensorizations = self._searched[index].tensorizations
        places = [place for place, each in enumerate(tensorizations) if worth_bounding(each)]
        return self._spectra_of(index, () if len(places) == len(tensorizations) else places)

    def _settled(self, choose: Callable[[Chooser], Chosen], counting: Counting) -> Chosen:
        """What is chosen by the spectra themselves, once no choice rests on bounds of them.

        By a bound a tensorization looks better than it is. One that is not even chosen so never is; one that is
        gets its spectra, and all is chosen again.
        """
        while True:
            chosen = choose(self._chooser(counting))
            doubtful = [
                index for index, choice in enumerate(chosen.choices) if self._rests_on_bound(index, choice)
            ]
            if not doubtful:
                return chosen
            for index in doubtful:
                self._spectra[index] = self._spectra_of(index)

    def _rests_on_bound(self, index: int, choice: Choice) -> bool:
        if choice.candidate is None:
            return False
        place = self._searched[index].tensorizations.index(choice.candidate.tensorization)
        return self._spectra[index].tensorizations[place].is_bound

    def _spectra_of(self, index: int, bounded: Collection[int] = ()) -> LayerSpectra:
        request = self._searched[index]
        fqn = request.layer.fqn
        if self._progress:
            self._progress(f"spectra of {fqn}", index, len(self._searched))

        weight = viewed(request.layer.weight.detach(), request.layer.spec).to(self._device)
        metric = self.metrics and partial(self.metrics, fqn)
        try:
            return layer_spectra(weight, request.tensorizations, metric, bounded)
        except ShapeError as error:
            raise ShapeError(f"{fqn}: {error}") from error

    @cached_property
    def parameters(self) -> Counting:
        """Parameters of the network as what a budget counts."""
        return Counting("parameters", sum(parameter.numel() for parameter in self._model.parameters()))

    def multiply_adds(self, usage: Usage) -> Counting:
        """Multiply-adds of the network for one input, those outside its Linear layers and convolutions included."""
        return Counting("multiply-adds", usage.multiply_adds, MULTIPLY_ADDS, usage.calls)

    def time(self, usage: Usage) -> Counting:
        """What the time of Linear layers and convolutions goes with by the cost model; the rest is not in it."""
        counting = Counting("time", 0, TIME, usage.calls)
        costs = [
            costs.dense()
            for layer in self._layers
            if counting.can_save(layer) and (costs := counting.costs(layer))
        ]
        return replace(counting, dense=sum(int(TIME.total(cost)) for cost in costs))

    def plan(self, recipe: Recipe, usage: Usage | None = None) -> CompressionPlan:
        """The plan for the target of a recipe that differs from the first one in nothing else.

        Args:
            usage: what `macs_ratio` counts.

        Raises:
            PlanError: a budget out of reach (naming the most that can be reached), or an eps that is.
        """
        if recipe.ratio is not None:
            return self.within(Budget.of_ratio("--ratio", self.parameters, recipe.ratio))
        if recipe.params is not None:
            return self.within(Budget(f"--params {recipe.params:,}", self.parameters, recipe.params))
        if recipe.macs_ratio is not None and usage is not None:
            return self.within(Budget.of_ratio("--macs-ratio", self.multiply_adds(usage), recipe.macs_ratio))
        if recipe.macs_ratio is not None or recipe.latency_ratio is not None:
            raise PlanError("--macs-ratio and --latency-ratio are budgets of compress, which knows what runs")
        if recipe.eps is not None:
            return self._to_eps(recipe.eps)
        return self._with_ranks_by_hand()

    def _with_ranks_by_hand(self) -> CompressionPlan:
        """Layers whose kind has no ranks given stay dense."""
        dense = {request.layer.fqn: f"no {rank_option(request.layer)} given" for request in self._searched}
        return self._assembled(self._by_hand | dense)

    def _to_eps(self, eps: float) -> CompressionPlan:
        check_eps(eps, self._searched)
        chosen = self._settled(lambda chooser: chooser.to_eps(eps), self.parameters)
        decisions = _decisions(self._searched, chosen.choices, "within eps")
        return self._assembled({**self._by_hand, **decisions}, chosen.notes)

    def _assembled(self, decisions: Decisions, notes: Sequence[str] = ()) -> CompressionPlan:
        more = out_of_reach_note(self._model, self._layers)
        return assemble(self._model, self._layers, decisions, [*notes, *more])

    def _more_than_that(self) -> str:
        """Why a budget cannot give more, and what would."""
        parts = []
        if self._out_of_reach:
            parts.append(f"; what cannot be compressed: {self._out_of_reach}")

        idle = [layer for layer in self._layers if layer.kept and not layer.obstacle]
        if idle:
            chosen = [request.layer for request in self._searched]
            least = [_fewest_entries(layer) for layer in (*chosen, *idle)]
            dense = sum(layer.weight.numel() for layer in (*chosen, *idle))
            by_hand = [plan for plan in self._by_hand.values() if isinstance(plan, LayerPlan)]
            saved = dense - sum(least) + sum(self.parameters.saved(plan) for plan in by_hand)
            reach = self.parameters.dense / (self.parameters.dense - saved)
            parts.append(f"; {including(idle)} would let the parameters reach {reach_text(reach)}")
        return "".join(parts)

    def within(self, budget: Budget) -> CompressionPlan:
        """The plan of least error within a budget, which it uses up to 2 % if ranks can.

        Raises:
            PlanError: the budget is out of reach, naming the most that can be reached, or asks for nothing.
        """
        counting = budget.counting
        try:
            chosen = self._settled(lambda chooser: chooser.within(budget), counting)
        except OutOfReachError as error:
            raise OutOfReachError(f"{error}{self._more_than_that()}") from error
        decisions = _decisions(self._searched, chosen.choices, "pays under this budget")

        notes = [*chosen.notes]
        if not chosen.meets(budget):
            on_grid = "" if self._rank_multiple in (AUTO, 1) else f" by multiples of {self._rank_multiple}"
            notes.append(
                f"no rank choice{on_grid} lies within 2 % of {budget.asked}; "
                f"the nearest above it is taken, {chosen.cost:,} {counting.what}"
            )
        plan = self._assembled({**self._by_hand, **decisions}, notes)
        if counting.unit != MULTIPLY_ADDS:
            return plan

        # The second of a layer's executions is that by its cores, which was counted: what is promised runs.
        by_cores = [replace(layer, execution=layer.executions[1]) for layer in plan.layers]
        return replace(plan.with_layers(by_cores), multiply_adds=(counting.dense, chosen.cost))

    def prediction(self, plan: CompressionPlan) -> Json | None:
        """The curve of size against error, and whose error a plan's is; None where no spectra were needed."""
        if "_spectra" not in vars(self) or not self._searched:
            return None
        chooser = self._chooser(self.parameters)
        points = predicted_curve(chooser.options(), chooser.spent, self.parameters.dense)

        pairs = zip(self._searched, self._spectra, strict=True)
        known = {request.layer.fqn: (request.tensorizations, spectra) for request, spectra in pairs}
        by = "outputs" if self.metrics else "weights"
        return prediction_of(points, error_shares(plan.layers, known), by)

    def cuts_of(self, plan: LayerPlan) -> Sequence[Tensor] | None:
        """The squared singular values of each cut of a layer as it was planned, None where nothing needed them."""
        if "_spectra" in vars(self):
            for request, spectra in zip(self._searched, self._spectra, strict=True):
                if request.layer.fqn == plan.fqn and plan.tensorization in request.tensorizations:
                    place = request.tensorizations.index(plan.tensorization)
                    return spectra.tensorizations[place].cuts
        return None

    def most(self, counting: Counting | None = None) -> float:
        """The largest ratio that a budget can reach; by default of parameters."""
        counting = counting or self.parameters
        chooser = self._chooser(counting)
        least = chooser.spent + sum(each.smallest().cost for each in chooser.options())
        return counting.dense / max(1, least)

    def _chooser(self, counting: Counting) -> Chooser:
        """What is spent whatever is chosen: by other layers, and by those with TT-ranks given by hand."""
        by_hand = [plan for plan in self._by_hand.values() if isinstance(plan, LayerPlan)]
        spent = counting.dense - sum(counting.saved(plan) for plan in by_hand)
        spent -= sum(counting.of_dense(request.layer) for request in self._searched)
        return Chooser(self._searched, self._spectra, counting, spent, self._rank_multiple, self.pace)


def make_plan(
    model: nn.Module, recipe: Recipe, device: torch.device | str = "cpu", progress: Progress | None = None
) -> CompressionPlan:
    """Plan a network under the one target that the recipe states, by the error of its weights.

    Raises:
        PlanError: contradictory options, no match, or a budget out of reach (naming the most that can be
        reached). ShapeError: modes or TT-ranks that do not fit a layer.
    """
    return Planner(model, recipe, device, progress).plan(recipe)


def _decisions(requests: Sequence[LayerRequest], choices: Sequence[Choice], why: str) -> Decisions:
    """Layers for which no TT form was chosen stay dense, because none `why`."""
    decisions: dict[str, LayerPlan | str] = {}
    for request, choice in zip(requests, choices, strict=True):
        fqn = request.layer.fqn
        if choice.candidate is None:
            decisions[fqn] = f"no TT form {why}"
            continue
        tensorization, error = choice.candidate.tensorization, choice.relative_error
        # A decomposition is a projection: what it misses is never more than all.
        note = "" if error <= 1 else f"the bound of the error is {error:.2f}, taken as 1"
        decisions[fqn] = request.planned(
            tensorization, choice.tt_ranks, predicted_error=min(1.0, error), note=note
        )
    return decisions


def _fewest_entries(layer: Layer) -> int:
    """Entries of a weight in the form that has the fewest, all TT-ranks 1."""
    shape = layer.spec.view_shape
    forms = [tensorize_shape(name, shape, groups=layer.spec.groups) for name in FORMATS]
    least = [form.num_params([1] * (len(form.modes) + 1)) for form in forms]
    return min(layer.weight.numel(), *least)
