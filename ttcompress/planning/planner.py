"""From a network and what the user asked for to a plan: which weights, in which tensorization, at which TT-ranks.

Reads a model, never changes it. Hand-given ranks need shapes only, so a model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from math import floor
from typing import Any

import torch
from torch import nn

from ttcompress.errors import PlanError, ShapeError, shortlist
from ttcompress.measure.multiply_adds import Usage
from ttcompress.networks.matrices import Weights
from ttcompress.planning.allocate import (
    Candidate,
    Choice,
    LayerOptions,
    Running,
    fewest_params,
    nearest_below,
    total_cost,
    within_budget,
)
from ttcompress.planning.plan_file import clip_note, inner_ranks
from ttcompress.planning.selection import Layer, find_layers, matches, require_match
from ttcompress.planning.spectra import LayerSpectra, layer_spectra
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.records.common import Progress, format_compression
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.tt.cost import MULTIPLY_ADDS, TIME, Calls, LayerCosts, Unit
from ttcompress.tt.decompose import smallest_eps
from ttcompress.tt.shapes import FORMATS, Tensorization, feasible_ranks, tensorize_shape
from ttcompress.tt.whiten import ModeMetric

WINDOW = 1.02
"""A budget is met when compression is at least what was asked and at most this much more."""


@dataclass(frozen=True)
class _Request:
    """One layer to compress: the tensorizations to consider, and the TT-ranks where they are given by hand."""

    layer: Layer
    tensorizations: tuple[Tensorization, ...]
    ranks: int | tuple[int, ...] | None

    def planned(self, tensorization: Tensorization, tt_ranks: Sequence[int], **known: Any) -> LayerPlan:
        layer = self.layer
        return LayerPlan(layer.fqn, layer.spec, tensorization, tuple(tt_ranks), layer.weight_dtype, **known)


Metrics = Callable[[str, Tensorization], Sequence[ModeMetric]]
"""By fqn and tensorization: the metric of each mode in which errors count."""


Results = Callable[[Sequence[int], Callable[[int], LayerSpectra]], list[LayerSpectra]]
"""Called with the sizes of weights and a function: the spectra that it finds by index, wherever that is computed."""


Outcome = dict[str, LayerPlan | str]
"""By fqn: the plan of a layer, or the reason why it stays dense after all."""


@dataclass(frozen=True)
class Counting:
    """What a budget counts and how much of it the dense network has: parameters, or what one input costs in a unit.

    `calls` says by fqn how often each layer applies its weight for that input; a layer without any costs nothing.
    """

    what: str
    dense: int
    unit: Unit | None = None
    calls: Mapping[str, Calls] = field(default_factory=dict)

    def costs(self, layer: Layer | LayerPlan) -> LayerCosts | None:
        """Of running one layer; None where parameters count."""
        calls = self.calls.get(layer.fqn, Calls(0, 0))
        return LayerCosts(layer.spec.weight_shape, calls, self.unit) if self.unit else None

    def saved(self, plan: LayerPlan) -> int:
        """By a layer that is replaced."""
        costs = self.costs(plan)
        if costs is None:
            return plan.params_before - plan.params_after
        dense, factored = costs.dense(), costs.factored(plan.tensorization, plan.tt_ranks)
        return int(costs.unit.total(dense) - costs.unit.total(factored))


@dataclass(frozen=True)
class Budget:
    """At most so much of what is counted, as `asked` for on the command line."""

    asked: str
    counting: Counting
    most: int

    @classmethod
    def of_ratio(cls, asked: str, counting: Counting, ratio: float) -> Budget:
        """The dense network's share 1 / ratio, exactly."""
        return cls(f"{asked} {ratio:g}", counting, floor(counting.dense / Fraction(str(ratio))))


class Planner:
    """Plans of one network; the spectra are computed once, however many targets are planned.

    `metrics` says by fqn and tensorization what errors cost; without it, weights count as they are. `results` may
    compute the spectra elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Find the layers and check what the recipe says about them.

        Raises:
            PlanError, ShapeError: see `make_plan`.
        """
        self.metrics: Metrics | None = None
        self.results: Results = lambda sizes, compute: [compute(index) for index in range(len(sizes))]
        self._model, self._device, self._progress = model, device, progress
        rules_only = recipe.target == "ranks" and recipe.ranks is None and recipe.conv_ranks is None
        include = recipe.include or tuple(rule.match for rule in recipe.layers if rules_only)
        self._layers = find_layers(model, include, recipe.exclude)
        requests = _requests(self._layers, recipe)
        as_given = bool(recipe.from_scratch)
        self._by_hand: Outcome = {r.layer.fqn: _by_hand(r, r.ranks, as_given) for r in requests if r.ranks is not None}
        self._searched = [request for request in requests if request.ranks is None]

    @property
    def names(self) -> list[str]:
        """The layers that a plan may replace."""
        return [layer.fqn for layer in self._layers if not layer.kept]

    @cached_property
    def _spectra(self) -> list[LayerSpectra]:
        """The spectra of every layer in every tensorization, one layer in memory at a time."""
        weights = [request.layer.module.weight for request in self._searched]
        if any(weight.is_meta for weight in weights):
            raise PlanError("--eps and budgets need the weights: give a checkpoint")
        return self.results([weight.numel() for weight in weights], self._spectra_of)

    @cached_property
    def parameters(self) -> Counting:
        """Parameters of the network as what a budget counts."""
        return Counting("parameters", sum(parameter.numel() for parameter in self._model.parameters()))

    def multiply_adds(self, usage: Usage) -> Counting:
        """Multiply-adds of the network for one input, those outside its Linear and Conv2d layers included."""
        return Counting("multiply-adds", usage.multiply_adds, MULTIPLY_ADDS, usage.calls)

    def time(self, usage: Usage) -> Counting:
        """What the time of the Linear and Conv2d layers goes with by the cost model; the rest is not in it."""
        counting = Counting("time", 0, TIME, usage.calls)
        costs = [costs.dense() for layer in self._layers if (costs := counting.costs(layer))]
        return replace(counting, dense=sum(int(TIME.total(cost)) for cost in costs))

    def _spectra_of(self, index: int) -> LayerSpectra:
        request = self._searched[index]
        fqn, weight = request.layer.fqn, request.layer.module.weight.detach().to(self._device)
        if self._progress:
            self._progress(f"spectra of {fqn}", index, len(self._searched))
        try:
            return layer_spectra(weight, request.tensorizations, self.metrics and partial(self.metrics, fqn))
        except ShapeError as error:
            raise ShapeError(f"{fqn}: {error}") from error

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
        if recipe.eps is None:
            dense: Outcome = {r.layer.fqn: f"no {_rank_option(r.layer)} given" for r in self._searched}
            return _assemble(self._model, self._layers, self._by_hand | dense)
        _check_eps(recipe.eps, self._searched)
        options = _options(self._searched, self._spectra, self.parameters)
        outcome = _outcome(self._searched, [fewest_params(each, recipe.eps) for each in options], "within eps")
        return _assemble(self._model, self._layers, self._by_hand | outcome)

    def within(self, budget: Budget) -> CompressionPlan:
        """The plan of least error within a budget, which it uses up to 2 % if ranks can.

        Raises:
            PlanError: the budget is out of reach, naming the most that can be reached, or asks for nothing.
        """
        counting, options = budget.counting, _options(self._searched, self._spectra, budget.counting)
        choices, after = _by_budget(budget, self._fixed(options, counting), options)
        outcome = self._by_hand | _outcome(self._searched, choices, "pays under this budget")
        notes = []
        if after * WINDOW < budget.most:
            notes = [
                f"no rank choice lies within 2 % of {budget.asked}; "
                f"the nearest above it is taken, {after:,} {counting.what}"
            ]
        plan = _assemble(self._model, self._layers, outcome, notes)
        if counting.unit != MULTIPLY_ADDS:
            return plan
        # What the plan promises is what runs.
        factored = [replace(layer, execution=layer.executions[1]) for layer in plan.layers]
        return replace(plan.with_layers(factored), multiply_adds=(counting.dense, after))

    def most(self, counting: Counting | None = None) -> float:
        """The largest ratio that a budget can reach; by default of parameters."""
        counting = counting or self.parameters
        options = _options(self._searched, self._spectra, counting)
        return counting.dense / max(1, self._fixed(options, counting) + sum(each.smallest().cost for each in options))

    def _fixed(self, options: Sequence[LayerOptions], counting: Counting) -> int:
        """What is spent whatever the choices are: by other layers, and by those with ranks given by hand."""
        by_hand = [plan for plan in self._by_hand.values() if isinstance(plan, LayerPlan)]
        saved = sum(counting.saved(plan) for plan in by_hand)
        return counting.dense - saved - sum(each.dense.cost for each in options)


def make_plan(
    model: nn.Module, recipe: Recipe, device: torch.device | str = "cpu", progress: Progress | None = None
) -> CompressionPlan:
    """Plan a network under the one target that the recipe states, by the error of its weights.

    Raises:
        PlanError: contradictory options, no match, or a budget out of reach (naming the most that can be reached).
        ShapeError: modes or TT-ranks that do not fit a layer.
    """
    return Planner(model, recipe, device, progress).plan(recipe)


def _check_eps(eps: float, requests: Sequence[_Request]) -> None:
    for request in requests:
        least = smallest_eps(request.layer.module.weight.dtype)
        if eps < least:
            raise PlanError(
                f"--eps must be at least {least:g} for the {request.layer.weight_dtype} weights, not {eps:g}"
            )


def _rank_option(layer: Layer) -> str:
    return "--ranks" if isinstance(layer.module, nn.Linear) else "--conv-ranks"


def _requests(layers: Sequence[Layer], recipe: Recipe) -> list[_Request]:
    chosen = [layer for layer in layers if not layer.kept]
    names = [layer.fqn for layer in layers]
    for rule in recipe.layers:
        require_match(rule.match, names)
        matched = [layer for layer in layers if matches(rule.match, layer.fqn)]
        if all(layer.kept for layer in matched):
            reasons = shortlist(dict.fromkeys(f"{layer.fqn}: {layer.kept}" for layer in matched))
            raise PlanError(f"[[layers]] {rule.match!r} matches only layers that stay dense ({reasons})")
    if not chosen:
        raise PlanError("no layer is left to compress; choose some with --include")
    if recipe.in_modes and len(chosen) != 1:
        raise PlanError(
            f"--in-modes and --out-modes fit one layer, {len(chosen)} are selected: "
            "narrow --include, or give modes in the [[layers]] of a recipe"
        )
    return [_request(layer, recipe) for layer in chosen]


def _request(layer: Layer, recipe: Recipe) -> _Request:
    """The last rule that matches wins over the options for all layers."""
    general = LayerRule("*", recipe.format, recipe.in_modes, recipe.out_modes)
    rule = next((rule for rule in reversed(recipe.layers) if matches(rule.match, layer.fqn)), general)
    is_linear = isinstance(layer.module, nn.Linear)
    ranks = recipe.ranks if is_linear else recipe.conv_ranks
    ranks = rule.ranks if rule.ranks is not None else ranks
    weight_format = rule.format or recipe.format or "auto"
    if rule.in_modes and weight_format == "auto":
        weight_format = "matrix"
    if weight_format == "auto" and ranks is not None:
        weight_format = "matrix" if is_linear else "chain"
    formats = FORMATS if weight_format == "auto" else (weight_format,)
    shape = layer.spec.weight_shape
    try:
        made = [tensorize_shape(name, shape, rule.out_modes or None, rule.in_modes or None) for name in formats]
    except ShapeError as error:
        raise ShapeError(f"{layer.fqn} {tuple(shape)}: {error}") from error
    return _Request(layer, tuple({each.modes: each for each in made}.values()), ranks)


def _by_hand(request: _Request, ranks: int | tuple[int, ...] | None, as_given: bool = False) -> LayerPlan | str:
    """One number is a cap; a list, where there is no weight to decompose (`as_given`), may be more than is feasible."""
    (tensorization,) = request.tensorizations
    try:
        asked = tensorization.expand_ranks(ranks or 1)
    except ShapeError as error:
        raise ShapeError(f"{request.layer.fqn}: {error}") from error
    as_given &= not isinstance(ranks, int)
    feasible = asked if as_given else feasible_ranks(tensorization.sizes, asked)
    plan = request.planned(tensorization, feasible, note=clip_note(asked, feasible))
    if plan.params_after < plan.params_before:
        return plan
    return f"{tensorization.format} form with TT-ranks {inner_ranks(feasible)} would not be smaller"


def _options(requests: Sequence[_Request], spectra: Sequence[LayerSpectra], counting: Counting) -> list[LayerOptions]:
    """What the layers can be, from the spectra and norms that were found of each, at what is counted.

    Without metrics, errors are weighed against each other as they are, not relative to each weight: under weight decay
    a weight is large where it matters (docs/cli.md has the measurement).
    """
    # In units of the largest, so that no network is out of range.
    largest = max((each.norm for layer in spectra for each in layer.tensorizations), default=0.0) or 1.0
    options = []
    for request, found in zip(requests, spectra, strict=True):
        layer, costs = request.layer, counting.costs(request.layer)
        candidates = []
        for tensorization, each in zip(request.tensorizations, found.tensorizations, strict=True):
            if costs and tensorization.format == "naive" and len(request.tensorizations) > 1:
                continue  # `lowrank` runs the same convolutions with fewer parameters.
            running = costs and Running(tensorization, costs)
            candidates.append(Candidate(tensorization, each.cuts, (each.norm / largest) ** 2, running))
        params = layer.module.weight.numel()
        dense = int(costs.unit.total(costs.dense())) if costs else params
        options.append(LayerOptions(params, tuple(candidates), dense))
    return options


def _outcome(requests: Sequence[_Request], choices: Sequence[Choice], why: str) -> Outcome:
    outcome: Outcome = {}
    for request, choice in zip(requests, choices, strict=True):
        if choice.candidate is None:
            outcome[request.layer.fqn] = f"no TT form {why}"
        else:
            planned = request.planned(choice.candidate.tensorization, choice.tt_ranks)
            outcome[request.layer.fqn] = replace(planned, predicted_error=choice.relative_error)
    return outcome


def _by_budget(budget: Budget, fixed: int, options: Sequence[LayerOptions]) -> tuple[list[Choice], int]:
    """Choices within the budget for the whole network, of which `fixed` is spent, and what it comes to with them."""
    before, most, what = budget.counting.dense, budget.most, budget.counting.what
    if most >= before:
        raise PlanError(f"{budget.asked} asks for nothing: the network has {before:,} {what}")
    least = fixed + sum(each.smallest().cost for each in options)
    if least > most:
        reach = format_compression(before // least if before >= 1000 * least else 10 * before // least / 10)
        raise PlanError(
            f"{budget.asked} is out of reach: the most that these layers can give is {reach} ({least:,} {what})"
        )
    choices = within_budget(options, most - fixed)
    if (fixed + total_cost(choices)) * WINDOW < most:
        choices = nearest_below(options, choices, most - fixed)
    return choices, fixed + total_cost(choices)


def _assemble(
    model: nn.Module, layers: Sequence[Layer], outcome: Outcome, notes: Sequence[str] = ()
) -> CompressionPlan:
    """Every parameter of the network, replaced or kept with the reason."""
    plans = [plan for layer in layers if isinstance(plan := outcome.get(layer.fqn), LayerPlan)]
    replaced = {f"{plan.fqn}.weight" for plan in plans}
    weights = {f"{layer.fqn}.weight": (layer.kept or str(outcome.get(layer.fqn)), layer.spec.kind) for layer in layers}
    kept = []
    for name, parameter in model.named_parameters():
        if name not in replaced:
            reason, kind = weights.get(name) or (_kept_reason(model, name), "")
            kept.append(KeptParameter(name, parameter.numel(), reason, kind))
    return CompressionPlan(tuple(plans), tuple(kept), tuple(notes))


def _kept_reason(model: nn.Module, name: str) -> str:
    if isinstance(model, Weights):
        return model.kept_reason(name)
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights directly"
    return "bias" if own_name == "bias" and isinstance(module, nn.Linear | nn.Conv2d) else type(module).__name__
