"""What the ways to run a layer cost, in multiply-adds and in elements moved through memory. Integers only.

Memory traffic decides more than multiply-adds. `LayerCosts.by_cores` runs a layer by its TT-cores, `dense` by
the weight that they stand for; `core` says what a single core adds to the former, for allocation of ranks
under such a cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, pairwise
from math import prod
from typing import Any, NamedTuple

from ttcompress.tt.shapes import Tensorization, is_contracted

Shape = Sequence[int]
ELEMENT_COST = 16
"""Multiply-adds that take as long as moving one element through memory, on the CPUs we measured."""

TRAINING_TRAFFIC = 16
"""How much more an element of an intermediate counts in training."""
TYPICAL_ROWS = 64
"""Input vectors that orders of contraction are compared for."""
MOST_GROUPS = 4
"""Groups that cores are merged into; with more, what merging saves is small and the choices are many."""
CHANNEL_BLOCK = 16
"""Vector units take so many channels of a convolution at a time."""
CONVOLUTION = 750_000
"""Multiply-adds that take as long as it takes to begin one more convolution (docs/speed.md)."""
BETWEEN = 5
"""How often what lies between two convolutions is moved: written, read, and brought into order."""


class Cost(NamedTuple):
    """Multiply-adds of a computation and elements it moves through memory."""

    multiply_adds: Any
    elements: Any

    def __add__(self, other: object) -> Cost:
        """Add what a second computation costs after the first."""
        pairs = zip(self, other, strict=True)  # type: ignore[call-overload]
        return Cost(*(mine + its for mine, its in pairs))


NOTHING = Cost(0, 0)


class Calls(NamedTuple):
    """How much a layer has to do: positions that it reads and that it writes.

    They are the rows of a Linear, the pixels of a convolution.
    """

    pixels: int
    out_pixels: int


class Unit(NamedTuple):
    """What a cost is counted in.

    Convolutions take channels `block` at a time, an element counts `element`, beginning a convolution
    `convolution`, and any other product `product`.
    """

    block: int
    element: int
    convolution: int
    product: int = 0

    def total(self, cost: Cost) -> Any:
        """Return a cost as one number."""
        return cost.multiply_adds + self.element * cost.elements

    def blocked(self, channels: Any) -> Any:
        """Return the number of channels that a convolution with this many costs as much as."""
        return -(-channels // self.block) * self.block


MULTIPLY_ADDS = Unit(1, 0, 0)
TIME = Unit(CHANNEL_BLOCK, ELEMENT_COST, CONVOLUTION)
GPU_TIME = Unit(block=8, element=260, convolution=1_000_000_000, product=1_000_000_000)
"""Of a GPU, where multiply-adds are next to free and each kernel takes microseconds.

Fitted to layers in float32 on an H200 (docs/speed.md).
"""


def time_on(device: str) -> Unit:
    """Return what time is counted in on a type of device."""
    return GPU_TIME if device == "cuda" else TIME


class ContractionPlan(NamedTuple):
    """How an input meets the cores: bounds of the groups that are merged first, from which end, and the cost.

    `per_row` is the cost for one input vector, `merging` that of merging the groups, whose entries are `merged`.
    """

    bounds: tuple[int, ...]
    from_last: bool
    per_row: Cost
    merging: Cost
    merged: int

    def cost(self, rows: int, merged: bool = False) -> Cost:
        """Return the cost for `rows` input vectors; `merged` if the groups are at hand."""
        contracted = Cost(*(rows * each for each in self.per_row))
        return contracted if merged else contracted + self.merging

    def products(self, merged: bool = False) -> int:
        """Return how many products that begins, for any number of input vectors."""
        groups = len(self.bounds) - 1
        return groups if merged else self.bounds[-1]


@cache
def contraction_plan(shapes: tuple[Shape, ...], training: bool = False) -> ContractionPlan:
    """Find the cheapest way to contract inputs with window-less cores (r_{k-1}, m_k, n_k, 1, r_k).

    Memory traffic decides more than multiply-adds: cores merged into a few groups leave fewer intermediates.
    In training each of them is also saved, brought into another order, and has a gradient. The plan does not
    depend on the number of inputs, so that graphs are the same for all.
    """
    weight = TRAINING_TRAFFIC if training else 1
    plans = []
    for bounds in _groupings(len(shapes)):
        plans += [_plan(shapes, bounds, from_last) for from_last in (True, False)]

    def total(plan: ContractionPlan) -> Any:
        madds, elements = plan.cost(TYPICAL_ROWS)
        return TIME.total(Cost(madds, weight * elements))

    return min(plans, key=total)


def _plan(shapes: Sequence[Shape], bounds: tuple[int, ...], from_last: bool) -> ContractionPlan:
    groups = [shapes[first:last] for first, last in pairwise(bounds)]
    merged = [_merged_shape(group) for group in groups]
    merging = sum((merge_cost(group) for group in groups), NOTHING)
    contracted = merged if from_last else _mirrored(merged)
    entries = sum(prod(shape) for shape in merged)
    return ContractionPlan(bounds, from_last, _contraction_cost(contracted), merging, entries)


def _groupings(count: int) -> Iterator[tuple[int, ...]]:
    """Yield bounds of at most MOST_GROUPS groups of neighbours, and of every core by itself."""
    for number in range(min(MOST_GROUPS, count)):
        for inner in combinations(range(1, count), number):
            yield (0, *inner, count)
    yield tuple(range(count + 1))


def _merged_shape(shapes: Sequence[Shape]) -> Shape:
    _, outs, ins, windows, _ = zip(*shapes, strict=True)
    first, last = shapes[0], shapes[-1]
    return (first[0], prod(outs), prod(ins), prod(windows), last[4])


def _contraction_cost(shapes: Sequence[Shape]) -> Cost:
    """Return the cost of one input vector, from the last core to the first."""
    steps = [_step_cost(shapes, index, shape[0], shape[4]) for index, shape in enumerate(shapes)]
    reading = Cost(0, prod([shape[2] for shape in shapes]))
    return sum(steps, reading)


def _step_cost(shapes: Sequence[Shape], index: int, left: Any, right: Any) -> Cost:
    """Return what a core with these TT-ranks adds, the others being contracted from the last one on."""
    # Inputs of the cores that are still to come, outputs of those that have been.
    ins = prod([shape[2] for shape in shapes[:index]])
    outs = prod([shape[1] for shape in shapes[index + 1 :]])
    around = ins * outs
    _, m, n, _, _ = shapes[index]
    return Cost(around * left * m * n * right, around * left * m)


def _mirrored(shapes: Sequence[Shape]) -> list[Shape]:
    """Return the shapes that a contraction from the last core would have if it were the contraction from the first."""
    (r_0, m_1, *rest), *others = shapes
    # From the first core on, r_0 counts as an output.
    first = (1, r_0 * m_1, *rest)
    return [(s, m, n, w, r) for r, m, n, w, s in reversed([first, *others])]


def merge_cost(shapes: Sequence[Shape]) -> Cost:
    """Return the cost of `merge_all`, the last product of which writes the dense weight."""
    madds = elements = 0
    size = prod(shapes[0][:4])
    for shape in shapes[1:]:
        madds += size * prod(shape)
        size *= prod(shape[1:4])
        elements += 2 * size * shape[4]
    return Cost(madds, elements)


class LayerCosts(NamedTuple):
    """A weight (out, in) or (out, in, *window), how much it has to do, and what costs are counted in.

    A convolution works at the positions that it writes; a `transposed` one, which scatters, at those that it reads.
    Where there are `groups`, the weight is that of one of them.
    """

    weight_shape: tuple[int, ...]
    calls: Calls
    unit: Unit = TIME
    transposed: bool = False
    groups: int = 1

    @property
    def _worked(self) -> int:
        """Positions at which the window is applied."""
        return self.calls.pixels if self.transposed else self.calls.out_pixels

    @property
    def _moved(self) -> int:
        """Elements of images that any convolution reads and writes."""
        out, inp, *_ = self.weight_shape
        return self.calls.pixels * inp + self.calls.out_pixels * out

    @property
    def _convolution(self) -> int:
        """What the share of a group in beginning one more convolution counts."""
        return self.unit.convolution // self.groups

    def _products(self, count: int) -> int:
        """What the share of a group in beginning so many products counts."""
        return self.unit.product * count // self.groups

    def _merged(self, shapes: Sequence[Shape]) -> Cost:
        """Return the cost of making one core of these."""
        return merge_cost(shapes) + Cost(self._products(len(shapes) - 1), 0)

    def _of_all(self, cost: Cost) -> Cost:
        """Return the cost of all groups from that of one."""
        return Cost(*(self.groups * each for each in cost))

    def dense(self) -> Cost:
        """Return the cost of a layer run by the dense weight, which is at hand."""
        return self._of_all(self._dense())

    def _dense(self) -> Cost:
        out, inp, *window = self.weight_shape
        if not window:
            return Cost(self.calls.pixels * out * inp + self._products(1), out * inp)

        blocked = self.unit.blocked
        madds = self._worked * blocked(inp) * blocked(out) * prod(window)
        return Cost(madds + self._convolution, self._moved)

    def rebuilt(self, tensorization: Tensorization, tt_ranks: Sequence[int]) -> Cost:
        """Return the cost of a layer run by the dense weight, which is made of the cores first."""
        shapes = tensorization.core_shapes(tt_ranks)
        return self._of_all(self._merged(shapes)) + self.dense()

    def by_cores(
        self,
        tensorization: Tensorization,
        tt_ranks: Sequence[int],
        cached: bool = True,
        plan: ContractionPlan | None = None,
    ) -> Cost:
        """Return the cost of a layer run by its cores.

        `cached` if what is made of them alone is at hand, `plan` if there is one already.
        """
        return self._of_all(self._by_cores(tensorization, tt_ranks, cached, plan))

    def _by_cores(
        self,
        tensorization: Tensorization,
        tt_ranks: Sequence[int],
        cached: bool,
        plan: ContractionPlan | None,
    ) -> Cost:
        shapes = tensorization.core_shapes(tt_ranks)
        if is_contracted(self.weight_shape, tensorization):
            contracted = contracted_shapes(shapes)
            chosen = plan or contraction_plan(contracted)
            begun = Cost(self._products(chosen.products(cached)), 0)
            cost = chosen.cost(self.calls.pixels, cached) + begun
            if len(self.weight_shape) == 2:
                return cost
            rank = shapes[0][4] if len(contracted) < len(shapes) else 1
            return cost + self._windows(rank)

        pairs = enumerate(pairwise(tt_ranks))
        steps = (self._conv_cost(tensorization, k, *pair) for k, pair in pairs)
        cost = sum(steps, Cost(0, self._moved))
        # All cores before the last become one kernel, but in a chain, where each is a kernel by itself.
        head = shapes[:1] if tensorization.format == "chain" else shapes[:-1]
        return cost if cached else cost + self._merged(head)

    def step_ratio(self, tensorization: Tensorization, tt_ranks: Sequence[int], training: bool) -> float:
        """Return the cost of a step by the cores over that of the dense layer.

        A step is an inference, with what is made of the cores at hand, or a forward and backward pass, which
        makes it anew; each product has two more of its size in the backward pass. Other than in `by_cores`,
        reading the cores counts, too: with few inputs it is what a dense layer takes its time for.
        """
        form = tensorization, tt_ranks
        dense = self.unit.total(self.dense())
        if not is_contracted(self.weight_shape, tensorization):
            return float(self.unit.total(self.by_cores(*form, cached=not training)) / dense)

        shapes = tensorization.core_shapes(tt_ranks)
        plan = contraction_plan(contracted_shapes(shapes), training)
        # In training an intermediate is also saved, brought into another order, and has a gradient.
        more = TRAINING_TRAFFIC - 1 if training else 0
        moved = Cost(0, plan.merged + more * self.calls.pixels * plan.per_row.elements)
        return float(self.unit.total(self.by_cores(*form, not training, plan) + moved) / dense)

    def rebuilt_ratio(self, tensorization: Tensorization, tt_ranks: Sequence[int]) -> float:
        """Return the cost of a step of training with the dense weight made of the cores, over the dense one."""
        rebuilt = self.unit.total(self.rebuilt(tensorization, tt_ranks))
        return float(rebuilt / self.unit.total(self.dense()))

    def core(self, tensorization: Tensorization, index: int, left: Any, right: Any) -> Cost:
        """Return what the core between these TT-ranks, numbers or arrays, adds to `by_cores`.

        It is exact for chains. Where inputs are contracted over the cores, neighbours are not merged here, and the
        contraction is from the last core.
        """
        return self._of_all(self._core(tensorization, index, left, right))

    def _core(self, tensorization: Tensorization, index: int, left: Any, right: Any) -> Cost:
        if not is_contracted(self.weight_shape, tensorization):
            return self._conv_cost(tensorization, index, left, right)

        shapes = tensorization.core_shapes([1] * (len(tensorization.modes) + 1))
        contracted = contracted_shapes(shapes)
        before = len(shapes) - len(contracted)
        if index < before:
            return self._windows(right)

        step = _step_cost(contracted, index - before, left, right)
        return Cost(*(self.calls.pixels * each for each in step))

    def _windows(self, rank: Any) -> Cost:
        """Return the cost of a convolution for each output, to one channel, after the contraction."""
        out, _, *window = self.weight_shape
        blocked = self.unit.blocked
        madds = self._worked * out * prod(window) * blocked(rank) * blocked(1)
        # What the contraction leaves is written and read.
        between = 2 * self.calls.pixels * out * rank
        return Cost(madds + self._convolution, between + self._moved)

    def _conv_cost(self, tensorization: Tensorization, index: int, left: Any, right: Any) -> Cost:
        """Return the cost of one core as a convolution.

        A chain is 1x1, the window, 1x1; otherwise everything before the last core is one window, with 1x1 after
        it.
        """
        out, inp, *window = self.weight_shape
        blocked = self.unit.blocked
        pixels, out_pixels = self.calls
        is_chain = tensorization.format == "chain"
        last = len(tensorization.modes) - 1

        if index == last:
            madds = out_pixels * blocked(left) * blocked(out)
            return Cost(madds + self._convolution, 0)
        if is_chain and index == 0:
            madds = pixels * blocked(inp) * blocked(right)
            return Cost(madds + self._convolution, BETWEEN * pixels * right)
        if index < last - 1:
            # Merged into a later one; times `left` for the shape of an array.
            return Cost(0 * left, 0)

        channels = left if is_chain else inp
        madds = self._worked * blocked(channels) * prod(window) * blocked(right)
        return Cost(madds + self._convolution, BETWEEN * out_pixels * right)


def contracted_shapes(shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """Return the shapes of the cores that inputs are contracted over: all but one that carries the window."""
    has_window = shapes[0][3] > 1
    return tuple(shapes[1:] if has_window else shapes)
