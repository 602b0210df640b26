"""Budgets of a whole network: what is counted, how much of it may be left, and choices that keep to that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor

from ttcompress.errors import PlanError
from ttcompress.planning.allocate import total_cost, within_budget
from ttcompress.planning.candidates import Choice, LayerOptions
from ttcompress.planning.nearest import nearest_below
from ttcompress.planning.selection import Layer
from ttcompress.records.common import format_compression
from ttcompress.records.layers import EmbeddingSpec, WeightSpec
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.cost import Calls, LayerCosts, Unit

WINDOW = 1.02
"""A budget is met when compression is at least what was asked and at most this much more."""


class OutOfReachError(PlanError):
    """A budget that not even all TT-ranks 1 keep."""


@dataclass(frozen=True)
class Counting:
    """What a budget counts and how much of it the dense network has.

    Without a `unit` parameters count, with one what one input costs.
    `calls` says by fqn how often each layer applies its weight for that input; a layer without any costs
    nothing.
    """

    what: str
    dense: int
    unit: Unit | None = None
    calls: Mapping[str, Calls] = field(default_factory=dict)

    def costs(self, layer: Layer | LayerPlan) -> LayerCosts | None:
        """What running one layer costs; None where parameters count."""
        if self.unit is None:
            return None
        calls = self.calls.get(layer.fqn, Calls(0, 0))
        spec = layer.spec
        return LayerCosts(spec.view_shape, calls, self.unit, spec.transposed, spec.groups)

    def can_save(self, layer: Layer | LayerPlan) -> bool:
        """Whether cores may cost less than the weight: what is rebuilt runs as ever, a lookup costs nothing dense."""
        return self.unit is None or not isinstance(layer.spec, WeightSpec | EmbeddingSpec)

    def of_dense(self, layer: Layer) -> int:
        """What a layer costs as it is."""
        costs = self.costs(layer)
        if costs is None:
            return layer.weight.numel()
        return int(costs.unit.total(costs.dense())) if self.can_save(layer) else 0

    def saved(self, plan: LayerPlan) -> int:
        """What a layer saves by being replaced."""
        costs = self.costs(plan)
        if costs is None:
            return plan.params_before - plan.params_after
        if not self.can_save(plan):
            return 0

        dense = costs.unit.total(costs.dense())
        by_cores = costs.unit.total(costs.by_cores(plan.tensorization, plan.tt_ranks))
        return int(dense - by_cores)


@dataclass(frozen=True)
class Budget:
    """At most so much of what is counted, as `asked` for on the command line."""

    asked: str
    counting: Counting
    most: int

    @classmethod
    def of_ratio(cls, asked: str, counting: Counting, ratio: float) -> Budget:
        """The dense network's share 1 / ratio, exactly."""
        # As the user wrote it: the binary 1.1 is a little more than eleven tenths and might cost a parameter.
        exact = Fraction(str(ratio))
        return cls(f"{asked} {ratio:g}", counting, floor(counting.dense / exact))


def choices_within(
    budget: Budget, fixed: int, options: Sequence[LayerOptions], exhaustive: bool = True
) -> tuple[list[Choice], int]:
    """Choices within a budget of the whole network, and what it comes to with them.

    `fixed` of the budget is spent on what is not chosen here. Where the budget is missed by more than 2 %, an
    `exhaustive` search looks for what comes nearest, at whatever error.

    Raises:
        PlanError: the budget is out of reach, naming the most that can be reached, or asks for nothing.
    """
    least = fixed + sum(each.smallest().cost for each in options)
    _check_reach(budget, least)

    most = budget.most - fixed
    choices = within_budget(options, most)
    # Small networks have few rank choices, and greedy moves may end far from the budget: then all of them are tried.
    if exhaustive and (fixed + total_cost(choices)) * WINDOW < budget.most:
        choices = nearest_below(options, choices, most)
    return choices, fixed + total_cost(choices)


def _check_reach(budget: Budget, least: int) -> None:
    before, what = budget.counting.dense, budget.counting.what
    if budget.most >= before:
        raise PlanError(f"{budget.asked} asks for nothing: the network has {before:,} {what}")
    if least <= budget.most:
        return

    reach = reach_text(Fraction(before, least))
    raise OutOfReachError(
        f"{budget.asked} is out of reach: the most that these layers can give is {reach} ({least:,} {what})"
    )


def reach_text(ratio: float | Fraction) -> str:
    """The most that can be reached, rounded down to what is printed, so that the ratio that is named can be."""
    if ratio < 2:
        return f"{floor(100 * ratio) / 100:.2f}x"
    return format_compression(floor(ratio) if ratio >= 1000 else floor(10 * ratio) / 10)
