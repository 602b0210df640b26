"""A network with stock layers in the place of its TT layers, each in the form that takes least time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from ttcompress.errors import ArchitectureError, PlanError
from ttcompress.layers.base import TTLayer
from ttcompress.layers.plain import Form, plain_forms
from ttcompress.networks.replaceable import own_attributes
from ttcompress.networks.running import Example, blaming, call, input_dtype, run
from ttcompress.networks.surgery import restore_rebuilt
from ttcompress.records.layers import ConvSpec, EmbeddingSpec
from ttcompress.tt.cost import time_on

Shape = tuple[int, ...]
Pick = Callable[[TTLayer, Sequence[Form], Shape | None], Form]
"""Chooses a form of a layer, given the shape of its input; None for a layer that does not run."""


def plain_network(
    model: nn.Module, example: Example | None, batch_size: int = 1, pick: Pick | None = None
) -> nn.Module:
    """The network with stock layers in the place of its TT layers, which are changed in the network itself.

    Args:
        example: what the network runs on, to see what its layers receive; None where that is not known.
        batch_size: how many inputs a call has.
        pick: by default what the cost model says.

    Raises:
        PlanError: a batch size below 1.
        DataError: inputs that the network does not take, with its TT layers or without.
        ArchitectureError: no example, and convolutions whose cost depends on it.
    """
    if batch_size < 1:
        raise PlanError(f"--batch-size takes numbers from 1 on, not {batch_size}")
    layers = tt_layers(model)
    example = example.suited(model) if example and layers else None
    shapes = _input_shapes(model, layers, example, batch_size)
    dtype = input_dtype(model)

    made: dict[int, nn.Module] = {}
    for fqn, layer in layers.items():
        # One layer under several names stays one.
        if id(layer) not in made:
            form = (pick or cheapest)(layer, plain_forms(layer), shapes.get(id(layer)))
            made[id(layer)] = form.build(layer, dtype).train(layer.training)
            vars(made[id(layer)]).update(own_attributes(layer))
        model = _put(model, fqn, made[id(layer)])

    _share_equals(layers.values(), made)
    restore_rebuilt(model)

    # Code of a network may read what rows of layers lack, such as a weight.
    if example is not None:
        with blaming("the network does not run with stock layers in the place of its TT layers"):
            _run_once(run, model, example.batch(model, 1))
    return model


def _share_equals(layers: Iterable[TTLayer], made: Mapping[int, nn.Module]) -> None:
    """Have what stands for layers with the same cores, as of a table and the output layer, share equal weights."""
    groups: dict[int, list[TTLayer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.cores), []).append(layer)

    for first, *others in groups.values():
        known = [*made[id(first)].parameters()]
        for module in (each for other in others for each in made[id(other)].modules()):
            for name, own in [*module.named_parameters(recurse=False)]:
                twin = next((each for each in known if torch.equal(each, own)), None)
                if twin is not None:
                    setattr(module, name, twin)


def tt_layers(model: nn.Module) -> dict[str, TTLayer]:
    """The TT layers of a network under all of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {fqn: module for fqn, module in modules if isinstance(module, TTLayer)}


def cheapest(layer: TTLayer, forms: Sequence[Form], shape: Shape | None) -> Form:
    """What takes least time by the cost model; of a layer that does not run, its factors, as they are smaller."""
    if shape is None:
        return forms[-1]
    is_table = isinstance(layer.spec, EmbeddingSpec)
    pixels = prod(shape) // (1 if is_table else layer.spec.view_shape[1] * layer.spec.groups)
    unit = time_on(layer.cores[0].device.type)
    return min(forms, key=lambda form: form.cost(max(1, pixels), unit))


def _input_shapes(
    model: nn.Module, layers: dict[str, TTLayer], example: Example | None, batch_size: int
) -> dict[int, Shape]:
    """By layer the shape of its input in a call with so many inputs; of one that is called twice, the larger."""
    if example is None:
        unknown = [fqn for fqn, layer in layers.items() if isinstance(layer.spec, ConvSpec)]
        if unknown:
            raise ArchitectureError(
                f"what {unknown[0]} costs depends on the size of an input, which is not known; "
                "give it with --input-size, such as 3,224,224"
            )
        return {id(layer): (batch_size, layer.spec.view_shape[1]) for layer in layers.values()}

    shapes: dict[int, Shape] = {}

    def remember(layer: nn.Module, given: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        x = given[0] if given else named["input"]
        # One input is run, as time grows with their number and shapes only in the first axis.
        shape = (x.shape[0] * batch_size, *x.shape[1:])
        shapes[id(layer)] = max(shape, shapes.get(id(layer), shape), key=prod)

    hooks = [
        layer.register_forward_pre_hook(remember, with_kwargs=True)
        for layer in {id(layer): layer for layer in layers.values()}.values()
    ]
    try:
        _run_once(call, model, example.batch(model, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def _run_once(how: Callable[[nn.Module, Any], Any], model: nn.Module, inputs: Any) -> None:
    with _evaluating(model), torch.no_grad():
        how(model, inputs)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, and then each module in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _put(model: nn.Module, fqn: str, layer: nn.Module) -> nn.Module:
    """The model with a layer in the place of the one of that name, which may be the model itself."""
    if not fqn:
        return layer
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
    return model
