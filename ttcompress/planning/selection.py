"""Which weights of a network may be replaced, by name pattern, and why the others stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from ttcompress.errors import PlanError, shortlist
from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.layers.spec import has_inputs_first, layer_spec
from ttcompress.networks.held import held_tensors
from ttcompress.networks.matrices import MATRIX_TYPES, Weights
from ttcompress.networks.replaceable import is_depthwise, is_plain, obstacles, owners_of, shared_otherwise
from ttcompress.records.layers import LayerSpec, WeightSpec, cores_name
from ttcompress.records.plan import weight_name

ADDING = "+"
"""How a pattern of `include` begins that adds to the default instead of replacing it."""
LEFT_OUT_MARK = "(--include replaces this default)"
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
KNOWN = (nn.Linear, *CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Modules whose weights are candidates whatever their size."""
COMPUTED = "weight is computed by a parametrization"
HELD = "also held by something outside the module tree"
LARGE_END = 1 / 20
"""Share of the network from which on its first convolution and last Linear are candidates under a budget."""
SMALL_TABLE = 1 / 100
"""Share of the network below which tables and parameters of unknown modules are none."""


@dataclass(frozen=True)
class Layer:
    """A weight of the network, by name and with its module, and why it stays dense, if it does.

    An `obstacle` is what stands against ever replacing it; `aliases` are the fqns of other layers with that weight.
    """

    fqn: str
    module: nn.Module
    spec: LayerSpec
    kept: str = ""
    obstacle: str = ""
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Under which patterns may mean it: those of all layers that share the weight."""
        return (self.fqn, *self.aliases)

    @property
    def weight(self) -> Tensor:
        """The parameter."""
        # Past attributes that a module of a checkpoint without classes may have under the same name.
        own = self.module._parameters.get(self.spec.parameter)
        weight: Tensor = getattr(self.module, self.spec.parameter) if own is None else own
        return weight

    @property
    def weight_name(self) -> str:
        """Of the parameter."""
        return weight_name(self.fqn, self.spec.parameter)

    @property
    def weight_dtype(self) -> str:
        """As safetensors and users spell it: float32 and so on."""
        return str(self.weight.dtype).removeprefix("torch.")


def matches(pattern: str, fqn: str) -> bool:
    """A glob on the fqn (`*` crosses dots), or `re:` and a regular expression that matches all of it.

    Raises:
        PlanError: not a regular expression.
    """
    if not pattern.startswith("re:"):
        return pattern == fqn or fnmatchcase(fqn, pattern)
    try:
        return re.fullmatch(pattern[3:], fqn) is not None
    except re.error as error:
        raise PlanError(f"{pattern!r} is not a regular expression: {error}") from error


def find_layers(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    running_order: Sequence[str] = (),
    by_hand: bool = False,
) -> list[Layer]:
    """All weights of two and more dimensions in `named_modules()` order, those that stay dense with the reason.

    By default the candidates are all but the first convolution and the last Linear, unless these hold much of
    the network and TT-ranks are not given `by_hand`, and all but small tables; or without an architecture all
    but `weights.LEFT_OUT`. `include` replaces them by what it matches, or adds that to them where it begins
    with `+`; `exclude` is subtracted last. The last Linear is that of the `running_order`, where that is known.

    Raises:
        PlanError: a pattern that matches no layer, or only such as cannot be decomposed.
    """
    layers = list(_dense_layers(model))
    names = [name for layer in layers for name in layer.names]
    patterns = [pattern.removeprefix(ADDING) for pattern in include]
    for pattern in (*patterns, *exclude):
        require_match(pattern, names, model)
    for pattern in patterns:
        _require_able(pattern, layers)
    _require_all_names(exclude, layers)

    if isinstance(model, Weights):
        by_default = model.left_out()
    else:
        by_default = _small_tables(model, layers) | _ends(model, layers, running_order, by_hand)
    found = []
    for layer in layers:
        reason = layer.obstacle or _left_out(layer, by_default, include, exclude)
        found.append(replace(layer, kept=reason))
    return found


def _require_able(pattern: str, layers: Sequence[Layer]) -> None:
    """See that a pattern matches some layer that can be compressed; a glob may well match others beside it."""
    matched = [layer for layer in layers if any(matches(pattern, name) for name in layer.names)]
    if not all(layer.obstacle for layer in matched):
        return
    if len(matched) == 1 and pattern in matched[0].names:
        raise PlanError(f"{pattern} cannot be compressed ({matched[0].obstacle}); leave it out of --include")
    raise PlanError(f"--include {pattern} matches only layers that cannot be compressed: {why_each(matched)}")


def _require_all_names(exclude: Sequence[str], layers: Sequence[Layer]) -> None:
    """See that a weight which several layers share is excluded under all of their names, or none.

    Raises:
        PlanError: it is not, and one of them would be compressed all the same, or dense unasked.
    """
    for layer in layers:
        named = [name for name in layer.names if any(matches(pattern, name) for pattern in exclude)]
        others = [name for name in layer.names if name not in named]
        if named and others:
            raise PlanError(
                f"--exclude names {shortlist(named)} but not {shortlist(others)}, which has the same weight: name both"
            )


def why_each(layers: Sequence[Layer]) -> str:
    """The reasons why layers stay dense, each with the layers that it is true of."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.kept or layer.obstacle, []).append(layer.fqn)
    return "; ".join(f"{shortlist(names, 3) or 'the network'}: {reason}" for reason, names in groups.items())


def require_match(pattern: str, names: Sequence[str], model: nn.Module | None = None) -> None:
    """See that a pattern matches some layer.

    Raises:
        PlanError: it matches none, with the nearest, or with what else of the model it matches.
    """
    if any(matches(pattern, name) for name in names):
        return

    leaves = {
        name: each
        for name, each in (model or nn.Module()).named_modules()
        if name and not any(each.children())
    }
    others = [f"{name} ({class_name(each)})" for name, each in leaves.items() if matches(pattern, name)]
    if others and not isinstance(model, Weights):
        raise PlanError(
            f"pattern {pattern!r} matches no weight that could be compressed, only {shortlist(others, 3)}"
        )

    holding = [name for name in names if pattern.strip("*.") in name]
    near = holding or get_close_matches(pattern, names, 5, 0.3) or names
    raise PlanError(
        f"pattern {pattern!r} matches no weight that could be compressed; near ones: {shortlist(near)}"
    )


def _dense_layers(model: nn.Module) -> Iterator[Layer]:
    """All weights of two and more dimensions, with what stands against ever replacing them."""
    reasons = obstacles(model)
    held = held_tensors(model)
    owners = owners_of(model)
    shared = shared_otherwise(model, reasons)
    compressed = {id(layer.cores) for layer in model.modules() if isinstance(layer, TTLayer)}

    # A weight that several modules share is listed once, by its first name.
    seen = set[int]()
    for fqn, module in model.named_modules():
        if _is_computed(module):
            yield Layer(fqn, module, layer_spec(module), obstacle=COMPUTED)
            continue

        is_ours = isinstance(module, TTWeight) or id(module) in compressed
        for own_name, parameter in () if is_ours else _weights(module):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))

            stays = fqn in reasons or id(parameter) in shared
            places = owners[id(parameter)]
            layer = _layer(fqn, module, own_name, stays)
            obstacle = next(filter(None, (_obstacle(each, own) for _, each, own in places)), "")
            # Recurrent modules hold their own weights in a list, which is made anew.
            is_held = layer.weight_name in held and not isinstance(module, nn.RNNBase)
            obstacle = obstacle or (HELD if is_held and _is_rebuilt(layer) else "")
            names = [listed_name(each, own) for each, other, own in places if other is not module]
            yield replace(
                layer, obstacle=obstacle if layer.fqn else "it is the whole network", aliases=tuple(names)
            )


def _is_rebuilt(layer: Layer) -> bool:
    return isinstance(layer.spec, WeightSpec)


def _weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a module that are more than vectors; those of norms only scale."""
    if isinstance(module, (*NORMS, parametrize.ParametrizationList)):
        return
    for own_name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, Weights) and module.kept_reason(own_name):
            continue

        is_known = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and own_name == "weight"
        if is_known or sum(size > 1 for size in parameter.shape) > 1:
            yield own_name, parameter


def _is_computed(module: nn.Module) -> bool:
    """Whether a Linear or a convolution has no weight of its own, but one that is made at each step."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) and "weight" not in module._parameters


def _layer(fqn: str, module: nn.Module, own_name: str, stays: bool) -> Layer:
    """A weight with a layer that runs by its cores, where there is one, else as a parameter that is rebuilt.

    `stays` where the module has to remain the object that it is.
    """
    if is_plain(module, own_name) and not stays:
        return Layer(fqn, module, layer_spec(module))  # type: ignore[arg-type]

    parameter: Tensor = module._parameters[own_name]  # type: ignore[assignment]
    spec = WeightSpec(tuple(parameter.shape), own_name, has_inputs_first(module))
    return Layer(listed_name(fqn, own_name), module, spec)


def listed_name(fqn: str, own_name: str) -> str:
    """The name under which plans list a parameter."""
    name = f"{fqn}.{own_name}".removeprefix(".")
    return name.removesuffix(".weight") if fqn else name.removesuffix("weight")


def _obstacle(module: nn.Module, own_name: str) -> str:
    """Why a parameter can never take TT form, or nothing."""
    weight: Tensor = module._parameters[own_name]  # type: ignore[assignment]
    if parametrize.is_parametrized(module):
        return "bias is computed by a parametrization"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and own_name == "weight":
        if module.max_norm is not None:
            return "max_norm changes the rows that are looked up, which cores share"
        if module.sparse:
            return "sparse=True asks for sparse gradients, which cores do not have"
    if weight.layout != torch.strided:
        return f"its weight is sparse ({str(weight.layout).removeprefix('torch.')}); .to_dense() makes it one that is not"
    if weight.dtype not in MATRIX_TYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"

    if is_depthwise(module):
        return f"depthwise (groups={module.groups}), which no TT form makes smaller"
    if hasattr(module, cores_name(own_name)):
        return f"its module has something called {cores_name(own_name)} already"
    return ""


def class_name(module: nn.Module) -> str:
    """The class of a module as its user knows it, without the one that torch wraps around a parametrized one."""
    kind = type(module)
    return kind.__mro__[1].__name__ if parametrize.is_parametrized(module) else kind.__name__


def _ends(
    model: nn.Module, layers: Sequence[Layer], running_order: Sequence[str], by_hand: bool
) -> dict[str, str]:
    """The layers that stay dense by default, which are small and which all others hang on."""
    total = _size(model)

    def is_small(layer: Layer) -> bool:
        return by_hand or layer.weight.numel() < LARGE_END * total

    convs = [layer for layer in layers if isinstance(layer.module, CONVOLUTIONS)]
    first = [layer.fqn for layer in convs[:1] if is_small(layer)]

    linears = [name for name, module in model.named_modules() if _may_be_last(module)]
    # Names follow the order in which layers were made, which need not be that in which they run.
    linears = [fqn for fqn in running_order if fqn in linears] or linears
    # The weight of the last one may be that of an embedding, and listed there.
    last = [layer.fqn for layer in layers if layer.fqn in linears[-1:] and is_small(layer)]
    return {**dict.fromkeys(first, "first convolution"), **dict.fromkeys(last, "last Linear")}


def _may_be_last(module: nn.Module) -> bool:
    """A Linear, but not the one inside of an attention."""
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _small_tables(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Tables of positions and the like, and small parameters of modules of which nothing is known."""
    least = SMALL_TABLE * _size(model)
    small = [
        layer for layer in layers if layer.weight.numel() < least and not isinstance(layer.module, KNOWN)
    ]
    return {layer.fqn: "under 1 % of the network" for layer in small}


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _left_out(
    layer: Layer, by_default: dict[str, str], include: Sequence[str], exclude: Sequence[str]
) -> str:
    """Why a layer that could be replaced is not to be, or nothing."""

    def is_meant(pattern: str) -> bool:
        return any(matches(pattern, name) for name in layer.names)

    is_included = any(is_meant(pattern.removeprefix(ADDING)) for pattern in include)
    adds = all(pattern.startswith(ADDING) for pattern in include)
    if not is_included and not adds:
        return "not selected"
    if any(map(is_meant, exclude)):
        return "--exclude"
    if not is_included and layer.fqn in by_default:
        return f"{by_default[layer.fqn]} {LEFT_OUT_MARK}"
    return ""
