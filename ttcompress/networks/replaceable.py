"""Why a layer of a network cannot be replaced by another object without the network noticing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from ttcompress.errors import shortlist
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.spec import CONVOLUTIONS, Replaceable, empty_layer, layer_spec
from ttcompress.networks.held import COMPILED, held_layers
from ttcompress.networks.matrices import MATRIX_TYPES
from ttcompress.records.layers import ConvSpec, EmbeddingSpec, LayerSpec, LinearSpec
from ttcompress.tt.shapes import tensorize_shape

HOOKS = {
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward hooks",
    "_state_dict_hooks": "hooks of its state dict",
    "_state_dict_pre_hooks": "hooks of its state dict",
    "_load_state_dict_pre_hooks": "hooks of its state dict",
    "_load_state_dict_post_hooks": "hooks of its state dict",
}


def obstacles(model: nn.Module) -> dict[str, str]:
    """Layers by fqn that have to stay the objects that they are, and why.

    What else hangs on a Linear or a convolution goes along (`own_attributes`).
    """
    shared = _shared_biases(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Replaceable):
            reason = _own_obstacle(module) or shared.get(name, "")
            if reason:
                found[name] = reason

    held = {
        name: f"also held by {holder}, outside the module tree" for name, holder in held_layers(model).items()
    }
    return {**held, **found}


def own_attributes(module: nn.Module) -> dict[str, object]:
    """What somebody has put on a layer, which layers of its kind do not have."""
    usual = _usual(type(module)) | {COMPILED}  # type: ignore[arg-type]
    return {name: value for name, value in vars(module).items() if name not in usual}


@cache
def _usual(kind: Any) -> frozenset[str]:
    """The attributes that a layer of this kind has of itself."""
    for spec in SMALLEST:
        dense = empty_layer(spec)
        ours: Any = tt_layer(spec)
        if issubclass(kind, ours):
            view = tensorize_shape("lowrank", spec.view_shape)
            return frozenset(vars(ours(spec, view, 1, device="meta")))
        if issubclass(kind, type(dense)):
            return frozenset(vars(dense))
    return frozenset()


SMALLEST: tuple[LayerSpec, ...] = (
    LinearSpec(1, 1, bias=True),
    EmbeddingSpec(1, 1),
    *(ConvSpec(1, 1, (1,) * dims, transposed=each) for dims in (1, 2, 3) for each in (False, True)),
)
"""A layer of each kind that can be replaced."""


def _own_obstacle(module: Replaceable) -> str:
    hooks = [words for name, words in HOOKS.items() if vars(module).get(name)]
    if hooks:
        return f"it has {hooks[0]}, which another layer would not run"

    weight = module._parameters.get("weight")
    if weight is not None and weight.dtype not in MATRIX_TYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"

    own = own_attributes(module)
    # Plain values go along, under whatever names: networks parsed from lists call one `type`.
    overridden = sorted(
        name for name, value in own.items() if hasattr(type(module), name) and callable(value)
    )
    if overridden:
        return f"its object has a {shortlist(overridden)} of its own"

    replacement: Any = tt_layer(layer_spec(module))
    taken = sorted(name for name in own if name in _usual(replacement) or _is_ours(replacement, name))
    if taken:
        return f"its object has a {shortlist(taken)}, as a TT layer has"

    extra = [
        *module._modules,
        *module._buffers,
        *(name for name in module._parameters if name not in ("weight", "bias")),
    ]
    return f"it holds {shortlist(extra)} besides weight and bias" if extra else ""


def _is_ours(replacement: type, name: str) -> bool:
    return hasattr(replacement, name) and not hasattr(nn.Module, name)


def is_plain(module: nn.Module, own_name: str) -> bool:
    """Whether a parameter is the weight of a layer of torch's own, for which there is one that runs by cores."""
    has_layer = type(module) in (nn.Linear, nn.Embedding, *CONVOLUTIONS.values()) and own_name == "weight"
    return has_layer and not is_depthwise(module)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel has a window of its own, and nothing else."""
    if not isinstance(module, tuple(CONVOLUTIONS.values())) or module.groups == 1:
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.shape[1] == 1


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """By id of a parameter all its places: the fqn of a module, the module, and its own name for it."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        for own_name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((fqn, module, own_name))
    return owners


def shared_otherwise(model: nn.Module, reasons: Mapping[str, str]) -> set[int]:
    """Parameters, by id, that are shared with something else than plain layers that can all run by the same cores.

    Args:
        reasons: the `obstacles` of the model.
    """
    modules = dict(model.named_modules())
    stuck = {id(modules[fqn]) for fqn in reasons}

    def runs(module: nn.Module, own_name: str) -> bool:
        return is_plain(module, own_name) and id(module) not in stuck

    found = set[int]()
    for parameter, owners in owners_of(model).items():
        if len(owners) > 1 and not all(runs(module, own_name) for _, module, own_name in owners):
            found.add(parameter)
    return found


def _shared_biases(model: nn.Module) -> dict[str, str]:
    homes = dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name)

    found = {}
    for names in homes.values():
        for name in names if len(names) > 1 else ():
            owner, _, own = name.rpartition(".")
            if own == "bias":
                found[owner] = f"bias shared with {shortlist(other for other in names if other != name)}"
    return found
