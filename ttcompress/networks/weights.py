"""The weights that plans speak of, by name: in a dense network and in a compressed one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight, rebuilt_in
from ttcompress.layers.spec import viewed
from ttcompress.records.layers import cores_name
from ttcompress.records.plan import LayerPlan

TTPart = TTLayer | TTWeight
"""What has TT-cores: a layer that runs by them, or a parameter that a module computes from them."""


def parameter_of(model: nn.Module, layer: LayerPlan) -> Tensor:
    """The parameter of a planned weight; of a compressed network, what its cores stand for."""
    owner = model.get_submodule(layer.module_fqn)
    parameter: Tensor = getattr(owner, layer.spec.parameter)
    return parameter


def weight_of(model: nn.Module, layer: LayerPlan) -> Tensor:
    """The same as (out, in, window), without gradients: what is decomposed."""
    return viewed(parameter_of(model, layer).detach(), layer.spec)


def cores_of(model: nn.Module, layer: LayerPlan) -> nn.ParameterList:
    """The cores of a weight of a compressed network."""
    cores: nn.ParameterList = model.get_submodule(layer.cores_fqn)  # type: ignore[assignment]
    return cores


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Names of the dense network that stand for a parameter which has another name before, and that name.

    Those of a compressed network are the same: where modules share cores, they shared what these stand for.
    """
    first: dict[int, str] = {}
    tied = {}
    for name, held in _held(model):
        if first.setdefault(id(held), name) != name:
            tied[name] = first[id(held)]
    return tied


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """By name of a parameter of the dense network the other names that stand for it."""
    names: dict[str, list[str]] = {}
    for alias, name in tied_weights(model).items():
        names.setdefault(name, []).append(alias)
    return names


def _held(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Every parameter of the dense network by each of its names, as itself or as the cores that stand for it."""
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.ParameterList) and _is_of_cores(model, fqn, module):
            continue
        own: dict[str, object] = {**module._parameters, **rebuilt_in(module)}
        if isinstance(module, TTLayer):
            own["weight"] = module.cores
        for name, held in own.items():
            if held is not None:
                yield f"{fqn}.{name}".removeprefix("."), held


def _is_of_cores(model: nn.Module, fqn: str, module: nn.ParameterList) -> bool:
    owner = model.get_submodule(fqn.rpartition(".")[0])
    return isinstance(module, TTWeight) or (isinstance(owner, TTLayer) and module is owner.cores)


def tt_parts(model: nn.Module) -> dict[str, TTPart]:
    """All that has TT-cores, by the names under which plans list it, each once."""
    return dict(_tt_parts(model))


def _tt_parts(model: nn.Module) -> Iterator[tuple[str, TTPart]]:
    seen = set[int]()
    for name, module in model.named_modules():
        if isinstance(module, TTLayer) and id(module.cores) not in seen:
            seen.add(id(module.cores))
            yield name, module
        if isinstance(module, TTWeight):
            owner = name.removesuffix(cores_name(module.spec.parameter))
            own = "" if module.spec.parameter == "weight" else module.spec.parameter
            yield f"{owner}{own}".removesuffix("."), module
