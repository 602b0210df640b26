"""Where the inputs and outputs of a weight can be seen: at the modules that multiply by it, or look rows up in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import hooked
from ttcompress.layers.spec import has_inputs_first
from ttcompress.networks.running import NetworkInput, device_of, forward, placed
from ttcompress.records.layers import LayerSpec
from ttcompress.records.plan import weight_name

PRODUCTS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
LOOKUPS = (nn.Embedding.forward,)


@dataclass(frozen=True)
class Use:
    """A module at which a weight is seen: what goes in there, and what comes out.

    A lookup takes whole numbers, everything else vectors. `swapped` where what the module puts out runs along
    the inputs of the weight as it is decomposed: an output layer that is tied to a table.
    """

    fqn: str
    is_lookup: bool
    swapped: bool


def uses_of(model: nn.Module, fqn: str, spec: LayerSpec, tied: Mapping[str, Sequence[str]]) -> list[Use]:
    """The modules at which a weight can be seen, if all that have it are such (`tied` as of `tied_names`).

    Others may do anything with it: recurrent ones, attention, modules with a forward of their own.
    """
    name = weight_name(fqn, spec.parameter)
    uses = [_use(model, each, spec) for each in (name, *tied.get(name, ()))]
    return [use for use in uses if use is not None] if None not in uses else []


def _use(model: nn.Module, name: str, spec: LayerSpec) -> Use | None:
    fqn, _, parameter = name.rpartition(".")
    module = model.get_submodule(fqn)
    runs = _forward(module)
    if parameter != "weight" or runs not in (*PRODUCTS, *LOOKUPS):
        return None
    # A group sees some of the inputs only.
    if getattr(module, "groups", 1) != 1:
        return None
    return Use(fqn, runs in LOOKUPS, has_inputs_first(module) != spec.transposed)


def _forward(module: nn.Module) -> Any:
    """The function that runs it; a subclass or somebody's own object may have another than its class of torch."""
    return None if "forward" in vars(module) else type(module).forward


def parameter_named(model: nn.Module, fqn: str, spec: LayerSpec) -> Tensor:
    """The parameter of a weight."""
    return model.get_parameter(weight_name(fqn, spec.parameter))


def around_weight(fqn: str, spec: LayerSpec) -> list[str]:
    """The module that has a weight and those around it, from the inside out."""
    owner = weight_name(fqn, spec.parameter).rpartition(".")[0]
    names = [owner]
    while owner:
        owner = owner.rpartition(".")[0]
        names.append(owner)
    return names


@torch.no_grad()
def modules_run(model: nn.Module, names: Iterable[str], inputs: NetworkInput) -> list[str]:
    """Those of the modules that run for a batch, in that order."""
    seen: dict[str, None] = {}
    with hooked(model, names, lambda name, *_: seen.setdefault(name)):
        forward(model, placed(inputs, device_of(model)))
    return [*seen]
