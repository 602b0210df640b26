"""Moments of the inputs and outputs of each weight, from streaming passes over unlabelled images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.measured import Batch, Measured, Part
from ttcompress.calibrate.observe import Call, gradients_in_eval, hooked
from ttcompress.calibrate.room import MOMENT_BYTES, parts_of, thrift
from ttcompress.calibrate.shifts import batch_norms_after, shift_of
from ttcompress.calibrate.uses import Use, around_weight, modules_run, parameter_named, uses_of
from ttcompress.errors import DataError
from ttcompress.layers.spec import viewed
from ttcompress.networks.running import (
    batch_size,
    blaming,
    centred,
    device_of,
    finite,
    placed,
)
from ttcompress.networks.weights import tied_names
from ttcompress.records.common import Progress
from ttcompress.records.layers import LayerSpec
from ttcompress.tt.spool import Spool

DRAWS = 128
"""Gradients of a weight, each of a few images, that make its metric where its inputs and outputs are not seen."""


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
    spool = Spool()
    with gradients_in_eval(model):
        groups = [*_groups(_in_order(model, specs, calibration))]
    with gradients_in_eval(model), thrift(each.num_bytes for group in groups for each in group):
        for group in groups:
            _fill(model, group, calibration, seed, spool, progress)
            for each in group:
                if each.has_run:
                    found[each.fqn] = each.statistics()
                    found[each.fqn].lay_aside(spool)
    return found


def _in_order(model: nn.Module, specs: Mapping[str, LayerSpec], calibration: Calibration) -> list[Measured]:
    """The weights in the order in which they are used first, each with the uses at which it can be seen."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    first, *_ = calibration.pieces(next(iter(calibration.held_out())), gradients=False)
    ran = modules_run(model, names, first)
    order = {name: number for number, name in enumerate(ran)}
    tied = tied_names(model)
    norms = batch_norms_after(model, first)

    found = []
    for fqn, spec in specs.items():
        uses = uses_of(model, fqn, spec, tied, ran)
        # A parent may read the weight of a child that never runs.
        innermost = next((name for name in around_weight(fqn, spec) if name in ran), "")
        first = uses[0].fqn if uses else innermost
        shift = shift_of(model, fqn, spec, uses, norms)
        found.append((order.get(first, 0), Measured(fqn, spec, uses, shift)))
    return [measured for _, measured in sorted(found, key=itemgetter(0))]


def _groups(weights: Sequence[Measured]) -> Iterator[list[Measured]]:
    """Neighbouring weights whose moments fit into MOMENT_BYTES together, but always at least one."""
    group: list[Measured] = []
    held = 0
    for each in weights:
        if group and held + each.num_bytes > MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(each)
        held += each.num_bytes
    if group:
        yield group


# ------------------------------------------------------------------------------------------------------------ passes


def _fill(
    model: nn.Module,
    group: Sequence[Measured],
    calibration: Calibration,
    seed: int,
    spool: Spool,
    progress: Progress | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = max(1, calibration.num_images // DRAWS)
    done = 0

    for number, batch in enumerate(calibration.fitting(0)):
        for inputs in _few(calibration.pieces(batch), most, group):
            _backward(model, group, calibration, inputs, Batch(batch_size(inputs), number), generator)
        done += batch_size(batch)
        if progress:
            progress("statistics", min(done, calibration.num_images), calibration.num_images)

    for each in group:
        each.lay_aside(spool)

    for further, batch in enumerate(calibration.held_out(), number + 1):
        if any(each.held_out_needs_gradients for each in group):
            for inputs in _few(calibration.pieces(batch), most, group):
                at = Batch(batch_size(inputs), further, True)
                _backward(model, group, calibration, inputs, at, generator)
        else:
            for inputs in calibration.pieces(batch, gradients=False):
                _watch(model, group, calibration, inputs, Batch(batch_size(inputs), further, True))


def _few(pieces: Sequence[Any], most: int, group: Sequence[Measured]) -> Iterator[Any]:
    """Pieces of a batch, in smaller ones where they give weights one gradient each."""
    are_few = any(each.needs_own_gradient for each in group)
    for piece in pieces:
        size = batch_size(piece)
        if are_few and size > most:
            yield from parts_of(piece, [*range(0, size, most), size])
        else:
            yield piece


def _parts(group: Sequence[Measured]) -> dict[str, list[tuple[Use, Part]]]:
    """By the name of the module at which they are seen."""
    found: dict[str, list[tuple[Use, Part]]] = {}
    for each in group:
        for part in each.parts:
            if part.use is not None:
                found.setdefault(part.use.fqn, []).append((part.use, part))
    return found


@torch.no_grad()
def _watch(
    model: nn.Module, group: Sequence[Measured], calibration: Calibration, inputs: Any, at: Batch
) -> None:
    """Add what the weights see of a batch."""
    parts = _parts(group)

    def observe(name: str, module: nn.Module, called: Call) -> None:
        for use, part in parts[name]:
            part.add_inputs(use, module, called, at)

    with hooked(model, parts, observe):
        finite(calibration.answer(model, placed(inputs, device_of(model))))


def _backward(
    model: nn.Module,
    group: Sequence[Measured],
    calibration: Calibration,
    inputs: Any,
    at: Batch,
    generator: torch.Generator,
) -> None:
    """Add what the weights see of a batch, and the gradients of a random projection of its outputs."""
    parts = _parts(group)

    def observe(name: str, module: nn.Module, called: Call, output: Any) -> Any:
        if not torch.is_grad_enabled():
            raise DataError(
                f"{name} runs without gradients, which calibration needs: exclude it, or leave out calib"
            )
        seen = [(use, part, part.add_inputs(use, module, called, at)) for use, part in parts[name]]
        shown = [each for each in seen if each[0].shows_outputs]
        if not shown:
            return None
        # Attention returns its weights beside its output.
        first, *others = output if isinstance(output, tuple) else (output,)
        leaf = _leaf(first)
        for use, part, found in shown:
            add = partial(part.add_gradient, use, module, called, found, at)
            leaf.register_hook(add)  # type: ignore[no-untyped-call]
        return (leaf, *others) if isinstance(output, tuple) else leaf

    own = [each for each in group if each.needs_own_gradient]
    parameters = [parameter_named(model, each.fqn, each.spec) for each in own]
    with hooked(model, parts, observe, after=True), _trained(parameters):
        output = finite(calibration.answer(model, placed(inputs, device_of(model))))
        projection = torch.randn(output.shape, generator=generator).to(output)
        with blaming("the network has no gradients"):
            (output * centred(projection)).sum().backward()  # type: ignore[no-untyped-call]

        for each, parameter in zip(own, parameters, strict=True):
            if parameter.grad is not None:
                each.parts[0].add_own_gradient(viewed(parameter.grad, each.spec), at)


def _leaf(output: Tensor) -> Tensor:
    """The same output, from which gradients flow on, whatever the input of the network is."""
    leaf = output if output.requires_grad else output.detach().requires_grad_()
    # A copy, for a leaf may not be overwritten, as an in-place ReLU would.
    return leaf.clone()


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
