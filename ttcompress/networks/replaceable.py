"""Why a layer of a network cannot be replaced by another object without the network noticing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import nn

from ttcompress.errors import shortlist
from ttcompress.layers.base import TTLayer
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.held import COMPILED, held_layers
from ttcompress.networks.matrices import MATRIX_TYPES
from ttcompress.records.layers import ConvSpec, EmbeddingSpec, LinearSpec
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

    What else hangs on a Linear or Conv2d goes along (`own_attributes`).
    """
    shared = _shared_biases(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
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
def _usual(kind: type) -> frozenset[str]:
    """The attributes that a layer of this kind has of itself."""
    made: nn.Module
    if issubclass(kind, TTLinear):
        linear = LinearSpec(1, 1, bias=True)
        made = TTLinear(linear, tensorize_shape("lowrank", (1, 1)), 1, device="meta")
    elif issubclass(kind, TTConv2d):
        conv = ConvSpec(1, 1, (1, 1))
        made = TTConv2d(conv, tensorize_shape("lowrank", (1, 1, 1, 1)), 1, device="meta")
    elif issubclass(kind, TTEmbedding):
        table = EmbeddingSpec(1, 1)
        made = TTEmbedding(table, tensorize_shape("lowrank", (1, 1)), 1, device="meta")
    elif issubclass(kind, nn.Conv2d):
        made = nn.Conv2d(1, 1, 1, device="meta")
    elif issubclass(kind, nn.Embedding):
        made = nn.Embedding(1, 1, device="meta")
    else:
        made = nn.Linear(1, 1, device="meta")
    return frozenset(vars(made))


def _own_obstacle(module: nn.Linear | nn.Embedding | nn.Conv2d) -> str:
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

    replacement: type[TTLayer] = TTLinear if isinstance(module, nn.Linear) else TTConv2d
    if isinstance(module, nn.Embedding):
        replacement = TTEmbedding
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
    has_layer = type(module) in (nn.Linear, nn.Embedding, nn.Conv2d) and own_name == "weight"
    return has_layer and getattr(module, "groups", 1) == 1


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
