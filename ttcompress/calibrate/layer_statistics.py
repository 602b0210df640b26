"""Moments of one weight, while they add up and once they are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from torch import Tensor, nn

from ttcompress.calibrate.observe import Call, layer_outputs
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.records.layers import LayerSpec
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import MATRIX_LIMIT, ModeMetric, Moments, mode_metrics

EVEN = 0.2
"""Share of the output metric that is spread evenly over all directions.

A few hundred images do not show all that matters: outputs to which none of them is sensitive would cost
nothing, and would be given up for the others."""


UNSEEN = 0.05
"""Share of the input metric of a table that is spread evenly over its rows.

Rows that the calibration data never looks up would cost nothing, and would be given up for the others."""


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one weight: inputs (in, window) row-major, the same held out, and gradients at its outputs.

    They are averages over the `positions` of an image at which a convolution has its weight. `unseen` is the share
    of the input metric that is spread evenly, `use` the one module at which the weight is seen, where there is one.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    positions: float = 1
    unseen: float = 0.0
    use: Use | None = None

    @property
    def input_metric(self) -> Moments:
        """What an error at each input costs."""
        return self.inputs.blended(self.unseen)

    @property
    def held_out_metric(self) -> Moments:
        """The same on the held-out images."""
        return self.held_out.blended(self.unseen)

    @property
    def output_metric(self) -> Moments:
        """What an error at each output costs, as the gradients have it, an EVEN share of it spread evenly."""
        return self.outputs.blended(EVEN)

    def lay_aside(self, spool: Spool) -> None:
        """Put the moments where they take less memory."""
        for moments in (self.inputs, self.held_out, self.outputs):
            moments.lay_aside(spool.lay)

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode, in which squared norms are changes of the network's outputs.

        An image passes a convolution's weight at all its `positions`, and their changes add up, so that
        layers with large maps weigh more.
        """
        first, *rest = mode_metrics(tensorization, self.input_metric, self.output_metric, diagonal)
        return [ModeMetric(first.out * sqrt(self.positions), first.inp), *rest]


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the weights."""


# ---------------------------------------------------------------------------------------------- while they add up


@dataclass(frozen=True)
class Batch:
    """Images on their way through the network, at positions moved along by `offset`."""

    num_images: int
    offset: int
    is_held_out: bool = False


class Part:
    """Moments of one use of a weight, along its inputs and outputs as it is decomposed; of its gradient without one."""

    def __init__(self, use: Use | None, inp: int, out: int, diagonals: tuple[bool, bool]) -> None:
        self.use = use
        self.inputs = Moments(inp, is_diagonal=diagonals[0])
        self.held_out = Moments(inp, is_diagonal=diagonals[0])
        self.outputs = Moments(out, is_diagonal=diagonals[1])
        self.has_run = False
        self._images = 0
        self._seen = 0
        self._usual = {False: 0, True: 0}

    @property
    def num_bytes(self) -> int:
        """Memory that the moments take at a time: those that are fitted to are laid aside before the others add up."""
        return max(self.inputs.num_bytes + self.outputs.num_bytes, self.held_out.num_bytes)

    @property
    def positions(self) -> float:
        """How many an image has on average; samples may be of different lengths."""
        return self._seen / self._images if self._images else 1

    def _counts(self, at: Batch, positions: int, is_gradient: bool = False) -> float:
        """What a batch counts for: every position as much as another, in units of those that the first image has."""
        usual = self._usual[is_gradient] = self._usual[is_gradient] or positions
        return at.num_images * (positions / usual)

    @property
    def weight(self) -> float:
        """What an image costs in all directions together."""
        return self.inputs.trace * self.outputs.trace * self.positions

    @property
    def needs_own_gradient(self) -> bool:
        """Whether inputs, outputs or both are not seen."""
        return self.use is None or not self.use.shows_outputs

    def _goal(self, is_along_outputs: bool, is_held_out: bool) -> Moments | None:
        """Where vectors add up; what is held out has moments of its inputs only."""
        if is_along_outputs:
            return None if is_held_out else self.outputs
        return self.held_out if is_held_out else self.inputs

    def add_inputs(self, use: Use, module: nn.Module, call: Call, at: Batch) -> None:
        """Add what goes into the module."""
        self.has_run = True
        found, positions = use.inputs(module, call, at.offset)
        if not at.is_held_out:
            self._images += at.num_images
            self._seen += at.num_images * positions
        goal = self._goal(use.swapped, at.is_held_out)
        if goal is not None:
            add = goal.count if use.kind is Kind.LOOKUP else goal.add
            add(found.detach(), weight=self._counts(at, positions))

    def add_gradient(self, use: Use, module: nn.Module, at: Batch, gradient: Tensor) -> None:
        """Add the gradients at what comes out of it."""
        goal = self._goal(not use.swapped, at.is_held_out)
        if goal is not None:
            columns = layer_outputs(module, gradient)
            goal.add(
                columns, weight=self._counts(at, max(1, columns.shape[1] // at.num_images), is_gradient=True)
            )

    def add_own_gradient(self, gradient: Tensor, at: Batch) -> None:
        """Add the gradient (out, in, window) of the weight itself, a sum over the images of a batch.

        Groups in front have one metric, the mean.
        """
        self.has_run = True
        out, inp = self.outputs.size, self.inputs.size
        blocks = gradient.reshape(-1, out, inp)
        along_outputs, along_inputs = blocks.transpose(0, 1).flatten(1), blocks.flatten(0, 1).T

        # Moments are averages over columns; here their sum counts, over the images.
        both = (True, along_outputs), (False, along_inputs)
        sides = both if self.use is None else both[:1]
        for side, columns in sides:
            goal = self._goal(side, at.is_held_out)
            if goal is not None:
                goal.add(columns * sqrt(columns.shape[1] / at.num_images), weight=at.num_images)


class Measured:
    """One weight while its moments add up: by each of its uses, or from its own gradient where there are none."""

    def __init__(self, fqn: str, spec: LayerSpec, uses: Sequence[Use]) -> None:
        self.fqn = fqn
        self.spec = spec
        self.unseen = UNSEEN if any(use.kind is Kind.LOOKUP for use in uses) else 0.0

        out, *rest = spec.view_shape
        inp = prod(rest)
        # Of the rows of a table nothing goes together. Of a single product, a sketch knows more than a diagonal.
        rows = [any(use.kind is Kind.LOOKUP and use.swapped == way for use in uses) for way in (False, True)]
        is_large = [size > MATRIX_LIMIT and len(uses) != 1 for size in (inp, out)]
        diagonals = rows[0] or is_large[0], rows[1] or is_large[1]
        ways: Sequence[Use | None] = uses or [None]
        self.parts = [Part(use, inp, out, diagonals) for use in ways]

    @property
    def has_run(self) -> bool:
        """Whether the network uses it."""
        return any(part.has_run for part in self.parts)

    @property
    def needs_own_gradient(self) -> bool:
        """Whether some of what it is multiplied by, or what that makes, is not seen."""
        return any(part.needs_own_gradient for part in self.parts)

    @property
    def held_out_needs_gradients(self) -> bool:
        """Whether what runs along its inputs is seen in gradients only."""
        return any(part.use is None or part.use.swapped for part in self.parts)

    @property
    def num_bytes(self) -> int:
        """Memory that the moments take."""
        return sum(part.num_bytes for part in self.parts)

    def lay_aside(self, spool: Spool) -> None:
        """Put the moments that are complete once all images have been fitted to where they take less memory."""
        for part in self.parts:
            part.inputs.lay_aside(spool.lay)
            part.outputs.lay_aside(spool.lay)

    def statistics(self) -> LayerStatistics:
        """What has added up; a weight of several uses has the sum of their metrics."""
        if len(self.parts) > 1:
            return self._total()
        (part,) = self.parts
        outputs = part.outputs
        if part.needs_own_gradient:
            # Its moments have the whole of both sides, which is to count once.
            outputs = outputs.scaled(1 / (part.inputs.trace * part.positions or 1.0))
        return LayerStatistics(part.inputs, part.held_out, outputs, part.positions, self.unseen, part.use)

    def _total(self) -> LayerStatistics:
        """The moments of a sum of products of moments: each weighed by what the other one has."""
        parts = [part for part in self.parts if part.weight] or self.parts
        by_outputs = [(part.outputs.trace or 1.0) * part.positions for part in parts]
        by_inputs = [(part.inputs.trace or 1.0) * part.positions for part in parts]
        whole = sum(part.weight for part in parts) or 1.0

        inputs = [part.inputs.scaled(by) for part, by in zip(parts, by_outputs, strict=True)]
        held_out = [part.held_out.scaled(by) for part, by in zip(parts, by_outputs, strict=True)]
        outputs = [part.outputs.scaled(by / whole) for part, by in zip(parts, by_inputs, strict=True)]
        return LayerStatistics(
            Moments.total(inputs), Moments.total(held_out), Moments.total(outputs), 1, self.unseen
        )
