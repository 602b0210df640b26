"""What each layer becomes under a budget or an accuracy: on a grid of ranks, and in forms that are worth their time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from operator import itemgetter

from ttcompress.errors import shortlist
from ttcompress.planning.allocate import fewest_params, least_error, total_cost
from ttcompress.planning.budgets import WINDOW, Budget, Counting, OutOfReachError, choices_within
from ttcompress.planning.candidates import Candidate, Choice, LayerOptions, Running
from ttcompress.planning.pace import WORTH_TIME, Pace, fewest_slow
from ttcompress.planning.requests import LayerRequest
from ttcompress.planning.selection import Layer
from ttcompress.planning.spectra import LayerSpectra, TensorizationSpectra
from ttcompress.tt.shapes import Tensorization

AUTO = "auto"
ALIGNED_RANKS, ALIGNED_SIDES = 8, 128
"""By default TT-ranks are multiples of this where both sides of a weight are at least so long."""


@dataclass(frozen=True)
class Chosen:
    """A choice for each layer, what they cost with all that is not chosen here, and what the plan says of them."""

    choices: list[Choice]
    cost: int
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The sum of the squared errors."""
        return sum(choice.error for choice in self.choices)

    def meets(self, budget: Budget) -> bool:
        """Whether at most 2 % of a budget are left."""
        return self.cost * WINDOW >= budget.most


@dataclass(frozen=True, eq=False)
class Chooser:
    """Chooses a form for each of these layers, whose spectra are known.

    Args:
        counting: what a budget counts.
        spent: what of it is spent whatever is chosen here.
        rank_multiple: TT-ranks are multiples of it; `auto` is 8 for large layers, if the budget can be met so.
        pace: which forms cost time; None where that does not matter.
    """

    requests: Sequence[LayerRequest]
    spectra: Sequence[LayerSpectra]
    counting: Counting
    spent: int
    rank_multiple: int | str = AUTO
    pace: Pace | None = None
    _made: dict[tuple[bool, bool], list[LayerOptions]] = field(default_factory=dict, init=False)

    def options(self, on_grid: bool = True, in_time: bool = False) -> list[LayerOptions]:
        """What each layer can be and what that costs at what is counted; `in_time` without slow forms.

        Without metrics, errors are weighed against each other as they are, not relative to each weight: under
        weight decay a weight is large where it matters (docs/cli.md has the measurement).
        """
        # Once for all that is tried.
        key = on_grid, in_time
        if key not in self._made:
            self._made[key] = self._options(on_grid, in_time)
        return self._made[key]

    def _options(self, on_grid: bool, in_time: bool) -> list[LayerOptions]:
        # In units of the largest, so that no network is out of range.
        norms = [each.norm for layer in self.spectra for each in layer.tensorizations]
        largest = max(norms, default=0.0) or 1.0

        found = []
        for request, spectra in zip(self.requests, self.spectra, strict=True):
            pairs = zip(request.tensorizations, spectra.tensorizations, strict=True)
            made = [self._candidate(request, *pair, largest, on_grid, in_time) for pair in pairs]
            candidates = tuple(candidate for candidate in made if candidate is not None)
            found.append(self._layer_options(request.layer, candidates))
        return found

    def _layer_options(self, layer: Layer, candidates: tuple[Candidate, ...]) -> LayerOptions:
        return LayerOptions(layer.weight.numel(), candidates, self.counting.of_dense(layer))

    def _candidate(
        self,
        request: LayerRequest,
        tensorization: Tensorization,
        spectra: TensorizationSpectra,
        unit_norm: float,
        on_grid: bool,
        in_time: bool,
    ) -> Candidate | None:
        """A tensorization of a layer with all that it can cost, or None where it is not worth considering."""
        layer, costs = request.layer, self.counting.costs(request.layer)
        if not self.counting.can_save(layer):
            return None

        has_others = len(request.tensorizations) > 1
        if costs and tensorization.format == "naive" and has_others:
            return None  # `lowrank` runs the same convolutions with fewer parameters.

        limit = None
        # A format that the user names is asked for, whatever time it takes.
        if in_time and self.pace and has_others:
            limit = self.pace.limit(layer, tensorization)
            if limit is None:
                return None

        running = costs and Running(tensorization, costs)
        squared_norm = (spectra.norm / unit_norm) ** 2
        multiple = self._multiple_of(layer) if on_grid else 1
        return Candidate(tensorization, spectra.cuts, squared_norm, running, multiple, limit)

    def _multiple_of(self, layer: Layer) -> int:
        """The number that the TT-ranks of a layer are multiples of."""
        if isinstance(self.rank_multiple, int):
            return self.rank_multiple
        is_large = min(layer.spec.view_shape[:2]) >= ALIGNED_SIDES
        return ALIGNED_RANKS if is_large else 1

    # -------------------------------------------------------------------------------------------------- budgets

    def within(self, budget: Budget) -> Chosen:
        """The choices of least error within a budget, in slow forms only where error would rise much without.

        Raises:
            PlanError: the budget is out of reach, naming the most that can be reached, or asks for nothing.
        """
        best = self._met(budget, range(len(self.requests)))
        slow = self._slow(best.choices)
        if not slow:
            return best

        worst = WORTH_TIME**2 * best.error

        def is_good(found: Chosen | None) -> bool:
            return found is not None and found.error <= worst and found.meets(budget) >= best.meets(budget)

        in_time = self._reached(budget, ())
        if in_time is not None and is_good(in_time):
            return in_time

        losses = [self._loss(index, best.choices[index]) for index in slow]
        few = fewest_slow(slow, losses, lambda layers: is_good(self._reached(budget, tuple(sorted(layers)))))
        mixed = self._reached(budget, tuple(sorted(few)))
        chosen = mixed if mixed is not None and is_good(mixed) else best

        otherwise = f"{budget.asked} would be out of reach"
        if in_time is not None:
            rise = sqrt(in_time.error / chosen.error) if chosen.error else inf
            otherwise = f"the error of the plan would be {_times(rise)} as large"
        return self._noted(chosen, otherwise)

    def _reached(self, budget: Budget, may_be_slow: Sequence[int]) -> Chosen | None:
        try:
            return self._met(budget, may_be_slow)
        except OutOfReachError:
            return None

    def _met(self, budget: Budget, may_be_slow: Sequence[int]) -> Chosen:
        """The choices of least error within a budget; off the grid of ranks only where `auto` meets no budget."""
        may_leave_grid = self.rank_multiple == AUTO
        found = self._chosen(budget, self._mixed(True, may_be_slow), exhaustive=not may_leave_grid)
        if found.meets(budget) or not may_leave_grid:
            return found
        return self._chosen(budget, self._mixed(False, may_be_slow))

    def _chosen(self, budget: Budget, options: Sequence[LayerOptions], exhaustive: bool = True) -> Chosen:
        return Chosen(*choices_within(budget, self.spent, options, exhaustive))

    def _mixed(self, on_grid: bool, may_be_slow: Sequence[int]) -> list[LayerOptions]:
        """The options of each layer, without slow forms for all but these."""
        slow = set(may_be_slow)
        if len(slow) == len(self.requests):
            return self.options(on_grid)
        pairs = zip(self.options(on_grid), self.options(on_grid, in_time=True), strict=True)
        return [pair[index not in slow] for index, pair in enumerate(pairs)]

    # ------------------------------------------------------------------------------------------------------ eps

    def to_eps(self, eps: float) -> Chosen:
        """The fewest parameters for a relative accuracy, in slow forms only where there were many more without."""
        choices = [fewest_params(options, eps) for options in self.options()]
        best = Chosen(choices, self.spent + total_cost(choices))
        slow = self._slow(choices)
        if not slow:
            return best

        in_time = self.options(in_time=True)
        faster = [(fewest_params(in_time[index], eps), index) for index in slow]
        rises = sorted((choice.cost - choices[index].cost, index, choice) for choice, index in faster)
        left = int(WORTH_TIME * best.cost) - best.cost
        most = best.cost + sum(map(itemgetter(0), rises))

        cost = best.cost
        for rise, index, choice in rises:
            if rise > left:
                break
            left, cost = left - rise, cost + rise
            choices[index] = choice
        otherwise = f"the plan would have {_times(most / cost)} the parameters"
        return self._noted(Chosen(choices, cost), otherwise)

    # ------------------------------------------------------------------------------------------------------ time

    def _slow(self, choices: Sequence[Choice]) -> list[int]:
        """The layers that these choices make no faster; those in a format that the user names are asked for."""
        if self.pace is None or self.counting.unit is not None:
            return []
        pairs = zip(self.requests, choices, strict=True)
        return [
            index
            for index, (request, choice) in enumerate(pairs)
            if len(request.tensorizations) > 1 and not self.pace.is_faster(request.layer, choice)
        ]

    def _loss(self, index: int, choice: Choice) -> float:
        """By how much the error of a layer rises at its cost where it has to be faster."""
        options = self.options(in_time=True)[index]
        if options.smallest().cost > choice.cost:
            return inf
        return least_error(options, choice.cost) - choice.error

    def _noted(self, chosen: Chosen, otherwise: str) -> Chosen:
        """With a note of the layers that are not faster, and why."""
        slow = self._slow(chosen.choices)
        if not slow:
            return chosen

        step = "inference or training" if self.pace and self.pace.training else "inference"
        names = shortlist([self.requests[index].layer.fqn for index in slow], 3)
        runs = "runs" if len(slow) == 1 else "run"
        note = f"{names} {runs} no faster than dense in {step}; without such forms {otherwise}"
        return Chosen(chosen.choices, chosen.cost, (note,))


def _times(factor: float) -> str:
    return f"{factor:.2f} times" if factor < 100 else "over 100 times"
