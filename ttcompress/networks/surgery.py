"""Swap TT layers into a network: with weights, from a plan, or empty, to load a file into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import PlanError, ShapeError, shortlist
from ttcompress.layers.base import TTLayer
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.rebuilt import TTWeight, rebuild, rebuilt_in, restore
from ttcompress.layers.spec import Replaceable, empty_layer, layer_spec
from ttcompress.networks.replaceable import obstacles, own_attributes, shared_otherwise
from ttcompress.networks.weights import cores_of, parameter_of, tied_names, weight_of
from ttcompress.records.common import Progress
from ttcompress.records.layers import WeightSpec, cores_name
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.decompose import TTSVD, decompose_weight
from ttcompress.tt.quantize import as_stored


def check_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """See that a plan was made for this network.

    Raises:
        PlanError: layers or parameters that it lacks, another shape, or parameters that the plan does not list.
    """
    check_layers(model, plan.layers)

    count = sum(parameter.numel() for parameter in model.parameters())
    if plan.params_before != count:
        lists = f"the plan lists {plan.params_before:,} parameters, the network has {count:,}"
        raise PlanError(f"the plan does not fit this network: {lists}")

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    unknown = [kept.name for kept in plan.kept if kept.name not in sizes]
    if unknown:
        raise PlanError(f"the plan does not fit this network, which lacks {shortlist(unknown)}")

    wrong = [f"{kept.name} has {sizes[kept.name]:,}" for kept in plan.kept if kept.params != sizes[kept.name]]
    if wrong:
        raise PlanError(f"the plan has other numbers of parameters than this network: {shortlist(wrong)}")


def check_layers(model: nn.Module, layers: Sequence[LayerPlan]) -> None:
    """See that a network has these layers, and that they can be replaced.

    Raises:
        PlanError: it lacks some, they have another shape, or the network would go on with the dense ones.
    """
    modules = dict(model.named_modules())
    reasons = obstacles(model)
    others = shared_otherwise(model, reasons)
    wrong = []
    for layer in layers:
        if isinstance(layer.spec, WeightSpec):
            wrong += _misfit(modules.get(layer.module_fqn), layer)
            continue

        module = modules.get(layer.fqn)
        if not isinstance(module, Replaceable):
            wrong.append(f"{layer.fqn} is no Linear, Embedding or convolution of this network")
        elif layer_spec(module) != layer.spec:
            wrong.append(f"{layer.fqn} has another shape or geometry")
        elif layer.fqn in reasons:
            wrong.append(f"{layer.fqn} cannot be replaced: {reasons[layer.fqn]}")
        elif id(module.weight) in others:
            wrong.append(f"{layer.fqn} shares its weight with what cannot run by its cores")
    if wrong:
        raise PlanError("the plan does not fit this network: " + "; ".join(sorted(wrong)))


def _misfit(module: nn.Module | None, layer: LayerPlan) -> list[str]:
    """What stands against computing a parameter of a module from cores."""
    parameter = module._parameters.get(layer.spec.parameter) if module is not None else None
    if parameter is None:
        return [f"{layer.weight_name} is no parameter of this network"]
    if tuple(parameter.shape) != layer.spec.weight_shape:
        return [f"{layer.weight_name} has another shape"]
    if hasattr(module, cores_name(layer.spec.parameter)):
        return [f"{layer.weight_name} is of a module with cores of its own"]
    return []


def apply_plan(
    model: nn.Module,
    plan: CompressionPlan,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> CompressionPlan:
    """Decompose the planned layers one at a time and swap them in; returns the plan with the measured errors.

    The model is changed only once every decomposition has gone well.

    Args:
        device: where the decomposition runs; the cores come back to the device of the weight.
    """
    check_plan(model, plan)

    done, found = [], []
    for index, layer in enumerate(plan.layers):
        if progress:
            progress(f"decomposing {layer.fqn}", index, len(plan.layers))
        weight = weight_of(model, layer)
        result = decompose(layer, weight.to(device))
        found.append([core.to(weight.device) for core in result.cores])
        done.append(replace(layer, relative_error=result.relative_error))

    aliases = tied_names(model)
    for layer, cores in zip(done, found, strict=True):
        install(model, model, layer, cores, aliases.get(layer.weight_name, ()))
    return plan.with_layers(done)


def install(
    model: nn.Module, dense: nn.Module, layer: LayerPlan, cores: Sequence[Tensor], aliases: Sequence[str] = ()
) -> None:
    """Put these cores in the place of a weight, and of the parameters that are tied to it; copies are made.

    Args:
        model: the network, dense or compressed there already.
        dense: the dense network; it may be the same.
        aliases: other names of the parameter (see `tied_names`).
    """
    if isinstance(layer.spec, WeightSpec):
        like = parameter_of(dense, layer)
        copies = [core.detach().clone(memory_format=torch.contiguous_format) for core in cores]
        weight = TTWeight(layer.spec, layer.tensorization, copies, like.dtype, like.requires_grad)
        _rebuild_all(model, layer, weight, aliases)
        return

    module = dense.get_submodule(layer.fqn)
    made = tt_layer(layer.spec).from_cores(module, layer.tensorization, cores)
    made.execution = layer.execution
    _swap_all(model, dense, layer, made, aliases)


def _swap_all(
    model: nn.Module, dense: nn.Module, layer: LayerPlan, made: TTLayer, aliases: Sequence[str]
) -> None:
    """Put a layer in its place, and in the places of those that shared its weight ones that share its cores."""
    owners = {name: dense.get_submodule(name.removesuffix(".weight")) for name in aliases}
    twins: dict[int, TTLayer] = {id(dense.get_submodule(layer.fqn)): made}
    for module in owners.values():
        if id(module) not in twins:
            twins[id(module)] = _sharing(module, made, layer)

    for each in twins.values():
        if isinstance(each, TTEmbedding):
            each.dtype = getattr(torch, layer.weight_dtype)

    swap(model, layer.fqn, made)
    for name, module in owners.items():
        swap(model, name.removesuffix(".weight"), twins[id(module)])


def _sharing(module: nn.Module, source: TTLayer, layer: LayerPlan) -> TTLayer:
    twin = tt_layer(layer_spec(module)).sharing(module, source)  # type: ignore[arg-type]
    twin.execution = layer.execution
    return twin


def _rebuild_all(model: nn.Module, layer: LayerPlan, weight: TTWeight, aliases: Sequence[str]) -> None:
    for name in (layer.weight_name, *aliases):
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        rebuild(module, own_name, weight.train(module.training))


@torch.no_grad()
def store_cores(model: nn.Module, plan: CompressionPlan) -> None:
    """Give the cores of the planned layers the values that they have after being stored, in that type."""
    for layer in plan.layers:
        own = cores_of(model, layer)
        with _blaming(layer):
            stored = as_stored(list(own), getattr(torch, layer.stored_dtype))
        for k, core in enumerate(stored):
            own[k] = nn.Parameter(core, requires_grad=own[k].requires_grad)


def decompose(layer: LayerPlan, weight: Tensor) -> TTSVD:
    """A weight (out, in, window) decomposed as planned.

    Raises:
        ShapeError: values that cannot be, naming the layer.
    """
    with _blaming(layer):
        return decompose_weight(
            weight, layer.tensorization, layer.tt_ranks, dtype=getattr(torch, layer.stored_dtype)
        )


@contextmanager
def _blaming(layer: LayerPlan) -> Iterator[None]:
    try:
        yield
    except ShapeError as error:
        raise ShapeError(f"{layer.fqn}: {error}") from error


def insert_empty(model: nn.Module, layers: Sequence[LayerPlan], tied: Mapping[str, str]) -> None:
    """Put cores on the meta device in the places of weights, for a state dict to be assigned to.

    Args:
        tied: names of parameters that are the same as one of another name, and that name.
    """
    for layer in layers:
        aliases = [alias for alias, name in tied.items() if name == layer.weight_name]
        install_fresh(model, layer, aliases, "meta")


def install_fresh(
    model: nn.Module,
    layer: LayerPlan,
    aliases: Sequence[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put random cores in the place of a weight, and of the parameters that are tied to it."""
    if isinstance(layer.spec, WeightSpec):
        wide = dtype or getattr(torch, layer.weight_dtype)
        empty = [torch.empty(shape, device=device, dtype=wide) for shape in layer.core_shapes.values()]
        trains = parameter_of(model, layer).requires_grad
        weight = TTWeight(layer.spec, layer.tensorization, empty, wide, trains)
        weight.reset_parameters()
        _rebuild_all(model, layer, weight, aliases)
        return

    dense = model.get_submodule(layer.fqn)
    kind: Any = tt_layer(layer.spec)
    made: TTLayer = kind(layer.spec, layer.tensorization, layer.tt_ranks, device, dtype)
    made.execution = layer.execution
    _freeze_like(made, dense)
    _swap_all(model, model, layer, made.train(dense.training), aliases)


def expand_layers(model: nn.Module) -> nn.Module:
    """Put dense layers in the place of the TT layers, in the same module, which is returned."""
    # Modules that share cores share what these stand for.
    weights: dict[nn.Module, nn.Parameter] = {}
    denses: dict[nn.Module, nn.Module] = {}
    for fqn, module in [*model.named_modules(remove_duplicate=False)]:
        if isinstance(module, TTLayer):
            if module not in denses:
                denses[module] = dense_layer(module, weights.get(module.cores))
                weights[module.cores] = denses[module].weight  # type: ignore[assignment]
            swap(model, fqn, denses[module])

    restore_rebuilt(model)
    return model


def restore_rebuilt(model: nn.Module) -> None:
    """Give modules the parameters back that they compute from TT-cores."""
    made: dict[TTWeight, nn.Parameter] = {}
    for module in [*model.modules()]:
        for parameter, weight in rebuilt_in(module).items():
            if weight not in made:
                made[weight] = weight.dense()
            restore(module, parameter, made[weight])


def dense_layer(layer: TTLayer, weight: nn.Parameter | None = None) -> Replaceable:
    """The layer that a TT layer stands for, with a weight of its own or that of another one which shares its cores."""
    dense = empty_layer(layer.spec)
    trains = any(core.requires_grad for core in layer.cores)
    if weight is None:
        values = layer.weight.detach().clone(memory_format=torch.contiguous_format)
        weight = nn.Parameter(values, trains)
    dense.weight = weight
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return dense.train(layer.training)


def swap(model: nn.Module, fqn: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one named `fqn`, with the attributes that somebody has put on that one."""
    parent, _, name = fqn.rpartition(".")
    vars(layer).update(own_attributes(model.get_submodule(fqn)))
    setattr(model.get_submodule(parent), name, layer)


def _freeze_like(layer: nn.Module, dense: nn.Module) -> None:
    """Train what the dense layer trains: cores as its weight, bias as its bias."""
    for name, parameter in layer.named_parameters():
        own: Any = dense.bias if name == "bias" else dense.weight
        parameter.requires_grad_(own is None or own.requires_grad)
