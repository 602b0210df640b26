"""Moments of the inputs and outputs of each weight, from streaming passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import Call, gradients_in_eval, hooked, layer_outputs
from ttcompress.calibrate.uses import Kind, Use, around_weight, modules_run, parameter_named, uses_of
from ttcompress.data.calibration_images import Calibration
from ttcompress.errors import DataError
from ttcompress.layers.spec import viewed
from ttcompress.networks.running import batch_size, blaming, centred, device_of, forward, map_tensors, placed
from ttcompress.networks.weights import tied_names
from ttcompress.records.common import Progress
from ttcompress.records.layers import LayerSpec
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import MATRIX_LIMIT, ModeMetric, Moments, mode_metrics

GROUP_BYTES = 1 << 31
"""Moments that are held at a time; layers beyond take another pass over the images."""


EVEN = 0.2
"""Share of the output metric that is spread evenly over all directions.

A few hundred images do not show all that matters: outputs to which none of them is sensitive would cost
nothing, and would be given up for the others."""


UNSEEN = 0.1
"""Share of the input metric of a table that is spread evenly over its rows.

Rows that the calibration data never looks up would cost nothing, and would be given up for the others."""


DRAWS = 128
"""Gradients of a weight, each of a few images, that make its metric where its inputs and outputs are not seen."""


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one weight: inputs (in, window) row-major, the same held out, and gradients at its outputs.

    They are averages over the `positions` of an image at which a convolution has its weight. `unseen` is the share
    of the input metric that is spread evenly, `use` the one module at which the weight is seen, where there is one.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    positions: int = 1
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

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode, in which squared norms are changes of the network's outputs.

        An image passes a convolution's weight at all its `positions`, and their changes add up, so that
        layers with large maps weigh more.
        """
        first, *rest = mode_metrics(tensorization, self.input_metric, self.output_metric, diagonal)
        return [ModeMetric(first.out * sqrt(self.positions), first.inp), *rest]


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the weights."""


@torch.enable_grad()
def measure(
    model: nn.Module,
    specs: Mapping[str, LayerSpec],
    calibration: Calibration,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, LayerStatistics]:
    """Moments of the weights of a frozen dense network, by fqn, in streaming passes over the images.

    The metric of the outputs is the Gauss-Newton matrix E[J^T J] of the squared change of the network's
    (centred) outputs, J their derivative at the layer's outputs. It is never formed: for random v with E[v
    v^T] = 1 the gradient of <v, outputs> is J^T v, and E[J^T v v^T J] is the matrix (Hutchinson 1990; Martens
    and Grosse 2015 draw v from the network's own predictions). No label is needed, and a confident network
    still has a metric.

    Where a weight is used in ways that are not known, its own gradient D = sum_p g_p x_p^T (out, in) of <v, outputs>
    has both: E[D^T D] and E[D D^T] are the metrics of inputs and outputs, each with what the other side weighs (as in
    Gupta et al. 2018; their product is the best of its kind, Morwani et al. 2024). Signs of v differ between images, so
    that products of different images vanish in the mean.

    Weights that the network does not run are left out.

    Raises:
        DataError: images that do not fit the network, or NaN.
    """
    found: dict[str, LayerStatistics] = {}
    with gradients_in_eval(model):
        for group in _groups(_in_order(model, specs, calibration)):
            _fill(model, group, calibration, seed, progress)
            found |= {each.fqn: each.statistics() for each in group if each.has_run}
    return found


# -------------------------------------------------------------------------------------------------------- one weight


class _Part:
    """Moments of one use of a weight, along its inputs and outputs as it is decomposed; of its gradient without one."""

    def __init__(self, use: Use | None, inp: int, out: int, diagonals: tuple[bool, bool]) -> None:
        self.use = use
        self.inputs = Moments(inp, is_diagonal=diagonals[0])
        self.held_out = Moments(inp, is_diagonal=diagonals[0])
        self.outputs = Moments(out, is_diagonal=diagonals[1])
        self.positions = 1
        self.has_run = False

    @property
    def num_bytes(self) -> int:
        return self.inputs.num_bytes + self.held_out.num_bytes + self.outputs.num_bytes

    @property
    def weight(self) -> float:
        """What an image costs in all directions together."""
        return self.inputs.trace * self.outputs.trace * self.positions

    def _goal(self, is_along_outputs: bool, is_held_out: bool) -> Moments | None:
        """Where vectors add up; what is held out has moments of its inputs only."""
        if is_along_outputs:
            return None if is_held_out else self.outputs
        return self.held_out if is_held_out else self.inputs

    def add_inputs(self, module: nn.Module, call: Call, at: _Batch) -> None:
        """Add what goes into the module."""
        assert self.use is not None
        self.has_run = True
        found, self.positions = self.use.inputs(module, call, at.offset)
        goal = self._goal(self.use.swapped, at.is_held_out)
        if goal is not None:
            add = goal.count if self.use.kind is Kind.LOOKUP else goal.add
            add(found.detach(), weight=at.num_images)

    def add_gradient(self, module: nn.Module, gradient: Tensor, at: _Batch) -> None:
        """Add the gradients at what comes out of it."""
        assert self.use is not None
        goal = self._goal(not self.use.swapped, at.is_held_out)
        if goal is not None:
            goal.add(layer_outputs(module, gradient), weight=at.num_images)

    @property
    def needs_own_gradient(self) -> bool:
        """Whether inputs, outputs or both are not seen."""
        return self.use is None or not self.use.shows_outputs

    def add_own_gradient(self, gradient: Tensor, at: _Batch) -> None:
        """Add the gradient (out, in window) of the weight itself, a sum over the images of a batch."""
        self.has_run = True
        # Moments are averages over columns; here their sum counts, over the images.
        sides = ((True, gradient), (False, gradient.T)) if self.use is None else ((True, gradient),)
        for side, columns in sides:
            goal = self._goal(side, at.is_held_out)
            if goal is not None:
                goal.add(columns * sqrt(columns.shape[1] / at.num_images), weight=at.num_images)


class _Measured:
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
        self.parts = [_Part(use, inp, out, diagonals) for use in ways]

    @property
    def has_run(self) -> bool:
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


def _in_order(model: nn.Module, specs: Mapping[str, LayerSpec], calibration: Calibration) -> list[_Measured]:
    """The weights in the order in which they are used first, each with the uses at which it can be seen."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    ran = modules_run(model, names, next(iter(calibration.held_out())))
    order = {name: number for number, name in enumerate(ran)}
    tied = tied_names(model)

    found = []
    for fqn, spec in specs.items():
        uses = uses_of(model, fqn, spec, tied, ran)
        # A parent may read the weight of a child that never runs.
        innermost = next((name for name in around_weight(fqn, spec) if name in ran), "")
        first = uses[0].fqn if uses else innermost
        found.append((order.get(first, 0), _Measured(fqn, spec, uses)))
    return [measured for _, measured in sorted(found, key=itemgetter(0))]


def _groups(weights: Sequence[_Measured]) -> Iterator[list[_Measured]]:
    """Neighbouring weights whose moments fit into GROUP_BYTES together, but always at least one."""
    group: list[_Measured] = []
    held = 0
    for each in weights:
        if group and held + each.num_bytes > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(each)
        held += each.num_bytes
    if group:
        yield group


# ------------------------------------------------------------------------------------------------------------ passes


def _fill(
    model: nn.Module,
    group: Sequence[_Measured],
    calibration: Calibration,
    seed: int,
    progress: Progress | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = max(1, calibration.num_images // DRAWS)
    done = 0

    for number, batch in enumerate(calibration.fitting(0)):
        for inputs in _few(batch, most, group):
            _backward(model, group, inputs, _Batch(batch_size(inputs), number), generator)
        done += batch_size(batch)
        if progress:
            progress("statistics", min(done, calibration.num_images), calibration.num_images)

    for further, batch in enumerate(calibration.held_out(), number + 1):
        if any(each.held_out_needs_gradients for each in group):
            for inputs in _few(batch, most, group):
                _backward(model, group, inputs, _Batch(batch_size(inputs), further, True), generator)
        else:
            _watch(model, group, batch, _Batch(batch_size(batch), further, True))


def _few(batch: Any, most: int, group: Sequence[_Measured]) -> list[Any]:
    """A batch in pieces, where it gives weights one gradient each."""
    size = batch_size(batch)
    if not any(each.needs_own_gradient for each in group) or size <= most:
        return [batch]
    return [map_tensors(itemgetter(slice(start, start + most)), batch) for start in range(0, size, most)]


@dataclass(frozen=True)
class _Batch:
    """Images on their way through the network, at positions moved along by `offset`."""

    num_images: int
    offset: int
    is_held_out: bool = False


def _parts(group: Sequence[_Measured]) -> dict[str, list[_Part]]:
    """By the name of the module at which they are seen."""
    found: dict[str, list[_Part]] = {}
    for each in group:
        for part in each.parts:
            if part.use is not None:
                found.setdefault(part.use.fqn, []).append(part)
    return found


@torch.no_grad()
def _watch(model: nn.Module, group: Sequence[_Measured], inputs: Any, at: _Batch) -> None:
    """Add what the weights see of a batch."""
    parts = _parts(group)

    def observe(name: str, module: nn.Module, call: Call) -> None:
        for part in parts[name]:
            part.add_inputs(module, call, at)

    with hooked(model, parts, observe):
        forward(model, placed(inputs, device_of(model)))


def _backward(
    model: nn.Module, group: Sequence[_Measured], inputs: Any, at: _Batch, generator: torch.Generator
) -> None:
    """Add what the weights see of a batch, and the gradients of a random projection of its outputs."""
    parts = _parts(group)

    def observe(name: str, module: nn.Module, call: Call, output: Any) -> Any:
        if not torch.is_grad_enabled():
            raise DataError(
                f"{name} runs without gradients, which calibration needs: exclude it, or leave out calib"
            )
        for part in parts[name]:
            part.add_inputs(module, call, at)

        seen = [part for part in parts[name] if part.use is not None and part.use.shows_outputs]
        if not seen:
            return None
        # Attention returns its weights beside its output.
        first, *others = output if isinstance(output, tuple) else (output,)
        leaf = _leaf(first)
        for part in seen:
            leaf.register_hook(partial(_add_gradient, part, module, at))  # type: ignore[no-untyped-call]
        return (leaf, *others) if isinstance(output, tuple) else leaf

    own = [each for each in group if each.needs_own_gradient]
    parameters = [parameter_named(model, each.fqn, each.spec) for each in own]
    with hooked(model, parts, observe, after=True), _trained(parameters):
        output = forward(model, placed(inputs, device_of(model)))
        projection = torch.randn(output.shape, generator=generator).to(output)
        with blaming("the network has no gradients"):
            (output * centred(projection)).sum().backward()  # type: ignore[no-untyped-call]

        for each, parameter in zip(own, parameters, strict=True):
            if parameter.grad is not None:
                gradient = viewed(parameter.grad, each.spec).flatten(1)
                each.parts[0].add_own_gradient(gradient, at)


def _leaf(output: Tensor) -> Tensor:
    """The same output, from which gradients flow on, whatever the input of the network is."""
    leaf = output if output.requires_grad else output.detach().requires_grad_()
    # A copy, for a leaf may not be overwritten, as an in-place ReLU would.
    return leaf.clone()


def _add_gradient(part: _Part, module: nn.Module, at: _Batch, gradient: Tensor) -> None:
    part.add_gradient(module, gradient, at)


@contextmanager
def _trained(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gradients of parameters that are frozen before and after."""
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
