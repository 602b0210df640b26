"""Which forms of a weight run faster than the dense layer, by the cost model, and plans of such forms.

A form that does not costs its network time: it runs by a dense weight that is held beside its cores and made of them
anew in every step of training. Only integers decide, so that the same network has the same plan on every machine;
how well the model knows what is faster is in docs/speed.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from ttcompress.planning.candidates import Choice, Limit
from ttcompress.planning.selection import Layer
from ttcompress.records.layers import EmbeddingSpec, WeightSpec
from ttcompress.tt.cost import TIME, Calls, LayerCosts
from ttcompress.tt.shapes import Tensorization, feasible_ranks, is_contracted

FASTER = 0.9
"""Share of the dense layer's cost up to which a form counts as faster: the model is right within about a tenth."""
AS_FAST = 1.05
"""The same for a dense weight that is made of the cores in each step of training."""
WORTH_TIME = 1.03
"""Factor of a plan's error, or under --eps of its parameters, for which it may take forms that are not faster."""
TRAINING_INPUTS = 32
ONE_ROW, ONE_IMAGE = Calls(1, 1), Calls(14 * 14, 14 * 14)
"""What a Linear and a Conv2d are taken to do for one input, where nothing is known of it."""


@dataclass(frozen=True)
class Pace:
    """What counts: inference with one input, and `training` where that follows; `calls` is what layers do, by fqn."""

    training: bool = False
    calls: Mapping[str, Calls] = field(default_factory=dict)

    def limit(self, layer: Layer, tensorization: Tensorization) -> Limit | None:
        """The TT-ranks at which a form is faster than the dense layer; None where it is at none."""
        if not _has_own_way(layer):
            return lambda tt_ranks: True

        faster = self._faster(layer, tensorization)
        ones = (1,) * (len(tensorization.modes) + 1)
        if not faster(ones):
            return None

        cuts = len(tensorization.modes) - 1
        if not is_contracted(layer.spec.view_shape, tensorization) or cuts < 2:
            return faster

        # Contractions of many cores have many break-even ranks: here one for all cuts.
        most = _largest(lambda rank: faster(_capped(tensorization, rank)), max(tensorization.max_ranks()))
        return lambda tt_ranks: max(tt_ranks) <= most

    def is_faster(self, layer: Layer, choice: Choice) -> bool:
        """Whether a layer runs faster in this form; one that stays dense is no slower."""
        if choice.candidate is None or not _has_own_way(layer):
            return True
        return self._faster(layer, choice.candidate.tensorization)(choice.tt_ranks)

    def _faster(self, layer: Layer, tensorization: Tensorization) -> Limit:
        spec = layer.spec
        typical = ONE_ROW if len(spec.view_shape) == 2 else ONE_IMAGE
        one = self.calls.get(layer.fqn, typical)
        many = Calls(*(TRAINING_INPUTS * each for each in one))
        inference = LayerCosts(spec.view_shape, one, TIME, spec.transposed, spec.groups)
        training = LayerCosts(spec.view_shape, many, TIME, spec.transposed, spec.groups)

        @cache
        def faster(tt_ranks: tuple[int, ...]) -> bool:
            form = tensorization, tt_ranks
            if inference.step_ratio(*form, training=False) > FASTER:
                return False
            if not self.training or training.step_ratio(*form, training=True) <= FASTER:
                return True
            return training.rebuilt_ratio(*form) <= AS_FAST

        return faster


def _has_own_way(layer: Layer) -> bool:
    """Whether a layer runs by its cores: what is rebuilt runs as ever, and a lookup is nothing beside products."""
    return not isinstance(layer.spec, WeightSpec | EmbeddingSpec)


def _capped(tensorization: Tensorization, rank: int) -> tuple[int, ...]:
    return feasible_ranks(tensorization.sizes, tensorization.expand_ranks(rank))


def _largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest whole number from 1 to `most` up to which something holds, which it does at 1."""
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def fewest_slow(
    slow: Sequence[int], losses: Sequence[float], is_good: Callable[[frozenset[int]], bool]
) -> frozenset[int]:
    """Of the layers that are slow, as few as leave a plan good: those that lose least in a faster form go first.

    `is_good` says of the layers that may stay slow whether their plan is, and is taken to hold for more of them where
    it holds for fewer.
    """
    order = [index for _, index in sorted(zip(losses, slow, strict=True))]
    low, high = 0, len(order)
    # The plan with all of them slow is good, the one with none was tried.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(frozenset(order[middle:])) else (low, middle)
    return frozenset(order[low:])
