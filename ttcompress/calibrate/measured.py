"""Moments of one weight while they add up, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor, nn

from ttcompress.calibrate.layer_statistics import LayerStatistics, around_mean, varying
from ttcompress.calibrate.observe import Call, channel_axis, layer_outputs
from ttcompress.calibrate.shifts import Shift
from ttcompress.calibrate.shrinkage import likeliest_share, sampling_share
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.records.layers import LayerSpec
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import MATRIX_LIMIT, Moments

EVEN = 0.2
"""Least share of the output metric that is spread evenly over all directions.

A few hundred images do not show all that matters: outputs to which none of them is sensitive would cost
nothing, and would be given up for the others."""


UNSEEN = 0.05
"""Share of the input metric of a table that is spread evenly over its rows.

Rows that the calibration data never looks up would cost nothing, and would be given up for the others."""


PROBES = 8
"""Random sums of a layer's outputs whose gradients stand for those of all outputs."""


@dataclass(frozen=True)
class Batch:
    """Images on their way through the network, at positions moved along by `offset`."""

    num_images: int
    offset: int
    is_held_out: bool = False


class Part:
    """Moments of one use of a weight, along its inputs and outputs as it is decomposed; of its gradient without one."""

    def __init__(
        self, use: Use | None, inp: int, out: int, diagonals: tuple[bool, bool], shift: Shift | None = None
    ) -> None:
        self.use, self.shift = use, shift
        self.inputs = Moments(inp, is_diagonal=diagonals[0])
        self.held_out = Moments(inp, is_diagonal=diagonals[0])
        self.outputs = Moments(out, is_diagonal=diagonals[1])
        self.summed = Moments(inp, is_diagonal=diagonals[0])
        self.has_run = False
        self._images = 0
        self._cost: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._is_around_mean = False
        self._usual = {False: 0, True: 0}
        self._generator = torch.Generator().manual_seed(0)

    @property
    def num_bytes(self) -> int:
        """Memory that the moments take at a time: those that are fitted to are laid aside before the others add up."""
        fitted = (1 + self.has_summed) * self.inputs.num_bytes + self.outputs.num_bytes
        return max(fitted, self.held_out.num_bytes)

    def _counts(self, at: Batch, positions: int, is_gradient: bool = False) -> float:
        """What a batch counts for: every position as much as another, in units of those that the first image has."""
        usual = self._usual[is_gradient] = self._usual[is_gradient] or positions
        return at.num_images * (positions / usual)

    @property
    def cost(self) -> float:
        """What an image costs in all directions together: E||G||^2, G the gradient of the weight.

        It is a sum over all positions at which the image meets the weight. What they change may go together, as before
        a pooling, or not at all: moments of single positions do not tell.
        """
        if self.needs_own_gradient:
            return self.outputs.trace
        return float(self._cost) / (self._images or 1)

    @property
    def spread(self) -> float:
        """The trace of the moment of the inputs that `cost` has: around their mean or not."""
        return (around_mean(self.inputs) if self._is_around_mean else self.inputs).trace

    @property
    def unseen(self) -> float:
        """The share of the inputs that is spread evenly, where an image meets the weight once.

        There are only as many directions as images, and what truncation gives up are the others.
        """
        if not self.has_summed or self.summed.trace or not self.held_out.trace:
            return 0.0
        return likeliest_share(varying(self.inputs, self.shift), varying(self.held_out, self.shift))

    @property
    def unfelt(self) -> float:
        """The share of the outputs that is spread evenly: more where images differ much in what they are sensitive to."""
        if not self._squares or self.outputs.is_sketch or self.outputs.is_diagonal:
            return EVEN
        return max(EVEN, sampling_share(self.outputs, float(self._squares) / self._images, self._images))

    @property
    def needs_own_gradient(self) -> bool:
        """Whether inputs, outputs or both are not seen."""
        return self.use is None or not self.use.shows_outputs

    def _goal(self, is_along_outputs: bool, is_held_out: bool) -> Moments | None:
        """Where vectors add up; what is held out has moments of its inputs only."""
        if is_along_outputs:
            return None if is_held_out else self.outputs
        return self.held_out if is_held_out else self.inputs

    def add_inputs(self, use: Use, module: nn.Module, call: Call, at: Batch) -> Tensor:
        """Add what goes into the module, and return it, as columns or indices."""
        self.has_run = True
        found, positions = use.inputs(module, call, at.offset)
        if not at.is_held_out:
            self._images += at.num_images
        goal = self._goal(use.swapped, at.is_held_out)
        if goal is not None:
            add = goal.count if use.kind is Kind.LOOKUP else goal.add
            add(found.detach(), weight=self._counts(at, positions))
        return found.detach()

    def add_gradient(
        self, use: Use, module: nn.Module, call: Call, inputs: Tensor, at: Batch, gradient: Tensor
    ) -> None:
        """Add the gradients at what comes out of it, `inputs` being what went in."""
        columns = layer_outputs(module, gradient)
        positions = max(1, columns.shape[1] // at.num_images)
        goal = self._goal(not use.swapped, at.is_held_out)
        if goal is not None:
            goal.add(columns, weight=self._counts(at, positions, is_gradient=True))
        if at.is_held_out:
            return
        if goal is self.outputs and positions * at.num_images == columns.shape[1]:
            self._add_squares(columns, at.num_images)
        if positions > 1:
            self._add_summed(use, module, call, inputs, at, gradient)
        else:
            self._add_single(use, inputs, columns)

    def _add_single(self, use: Use, inputs: Tensor, gradient: Tensor) -> None:
        """Add the cost of images that meet the weight once, from columns of both."""
        powers = gradient.square().sum(0, dtype=torch.float64)
        if use.kind is not Kind.LOOKUP:
            powers = powers * inputs.square().sum(0, dtype=torch.float64)
        self._cost = self._cost + powers.sum()

    def _add_squares(self, columns: Tensor, images: int) -> None:
        """Add ||M||_F^2, M the moment of the gradients at the positions of one image, which come one after the other."""
        each = columns.reshape(len(columns), images, -1).transpose(0, 1)
        # Either has the same norm.
        gram = each @ each.mT if each.shape[2] > each.shape[1] else each.mT @ each
        self._squares = self._squares + (gram / each.shape[2]).double().square().sum()

    def _add_summed(
        self, use: Use, module: nn.Module, call: Call, inputs: Tensor, at: Batch, gradient: Tensor
    ) -> None:
        """Add what all positions of each image say together, of a few random sums of the outputs."""
        channels = channel_axis(module, gradient)
        signs = torch.randint(0, 2, (PROBES, gradient.shape[channels]), generator=self._generator) * 2 - 1
        probed = torch.tensordot(
            signs.to(gradient.device, gradient.dtype) / sqrt(PROBES), gradient, ([1], [channels])
        )
        probed = probed.movedim(0, channels)

        # That of the inputs so far.
        mean = self.inputs.means[0].to(gradient.device, gradient.dtype) if self.shift else None
        self._is_around_mean = mean is not None
        rows = []
        for gradient_of_one, sums in use.weight_gradients(module, call, inputs, probed, at.num_images):
            rows.append(gradient_of_one if mean is None else gradient_of_one - sums.outer(mean))
        self._cost = self._cost + torch.stack([each.square().sum(dtype=torch.float64) for each in rows]).sum()
        if self.has_summed:
            self.summed.add(torch.cat(rows).T, weight=at.num_images)

    @property
    def has_summed(self) -> bool:
        """Whether sums over positions are the metric of the inputs: of tables and sketches only their size counts."""
        are_inputs = self.use is not None and self.use.shows_outputs and not self.use.swapped
        return are_inputs and not self.inputs.is_diagonal and not self.inputs.is_sketch

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

    def __init__(self, fqn: str, spec: LayerSpec, uses: Sequence[Use], shift: Shift | None) -> None:
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
        self.parts = [Part(use, inp, out, diagonals, shift) for use in ways]

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
            for moments in (part.inputs, part.outputs, part.summed):
                moments.lay_aside(spool.lay)

    def statistics(self) -> LayerStatistics:
        """What has added up; a weight of several uses has the sum of their metrics."""
        if len(self.parts) > 1:
            return self._total()
        (part,) = self.parts
        outputs = part.outputs.scaled(_ratio(part.cost, part.spread * part.outputs.trace))
        summed = part.summed if part.has_summed and part.summed.trace else None
        return LayerStatistics(
            part.inputs,
            part.held_out,
            outputs,
            self.unseen or part.unseen,
            part.unfelt,
            part.use,
            part.shift,
            summed,
        )

    def _total(self) -> LayerStatistics:
        """The moments of a sum of products of moments, each of which counts for what its uses cost."""
        parts = [part for part in self.parts if part.cost] or self.parts
        whole = sum(part.cost for part in parts)
        by_inputs = [_ratio(part.cost, part.inputs.trace) for part in parts]
        by_outputs = [_ratio(part.cost, part.outputs.trace * whole) for part in parts]

        inputs = [part.inputs.scaled(by) for part, by in zip(parts, by_inputs, strict=True)]
        held_out = [part.held_out.scaled(by) for part, by in zip(parts, by_inputs, strict=True)]
        outputs = [part.outputs.scaled(by) for part, by in zip(parts, by_outputs, strict=True)]
        return LayerStatistics(
            Moments.total(inputs), Moments.total(held_out), Moments.total(outputs), self.unseen, EVEN
        )


def _ratio(cost: float, by: float) -> float:
    """Their ratio; 1 where nothing costs anything."""
    return cost / by if cost and by else 1.0
