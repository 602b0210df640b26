"""Which layers of a network may be replaced, by name pattern, and why the others stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from ttcompress.errors import PlanError, shortlist
from ttcompress.layers.spec import layer_spec
from ttcompress.networks.matrices import Weights
from ttcompress.networks.replaceable import obstacles
from ttcompress.records.layers import LayerSpec

ADDING = "+"
"""How a pattern of `include` begins that adds to the default instead of replacing it."""
LEFT_OUT_MARK = "(--include replaces this default)"


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d of the network, and why its weight stays dense, if it does.

    An `obstacle` is what stands against ever replacing it.
    """

    fqn: str
    module: nn.Linear | nn.Conv2d
    kept: str = ""
    obstacle: str = ""

    @property
    def spec(self) -> LayerSpec:
        """Shape and geometry."""
        return layer_spec(self.module)

    @property
    def weight_dtype(self) -> str:
        """As safetensors and users spell it: float32 and so on."""
        return str(self.module.weight.dtype).removeprefix("torch.")


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
) -> list[Layer]:
    """All Linear and Conv2d layers in `named_modules()` order, those that stay dense with the reason.

    By default the candidates are all but the first convolution and the last Linear, or without an
    architecture all but `weights.LEFT_OUT`. `include` replaces them by what it matches, or adds that to them
    where it begins with `+`; `exclude` is subtracted last. The last Linear is that of the `running_order`,
    where that is known.

    Raises:
        PlanError: a pattern that matches no layer, or only such as cannot be decomposed.
    """
    layers = list(_dense_layers(model))
    names = [layer.fqn for layer in layers]
    patterns = [pattern.removeprefix(ADDING) for pattern in include]
    for pattern in (*patterns, *exclude):
        require_match(pattern, names, model)
    for pattern in patterns:
        _require_able(pattern, layers)

    by_default = model.left_out() if isinstance(model, Weights) else _ends(layers, running_order)
    found = []
    for layer in layers:
        reason = layer.obstacle or _left_out(layer.fqn, by_default, include, exclude)
        found.append(replace(layer, kept=reason))
    return found


def _require_able(pattern: str, layers: Sequence[Layer]) -> None:
    """See that a pattern matches some layer that can be compressed; a glob may well match others beside it."""
    matched = [layer for layer in layers if matches(pattern, layer.fqn)]
    if not all(layer.obstacle for layer in matched):
        return
    if [layer.fqn for layer in matched] == [pattern]:
        raise PlanError(f"{pattern} cannot be compressed ({matched[0].obstacle}); leave it out of --include")
    raise PlanError(f"--include {pattern} matches only layers that cannot be compressed: {why_each(matched)}")


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
        raise PlanError(f"pattern {pattern!r} matches no Linear or Conv2d layer, only {shortlist(others, 3)}")

    holding = [name for name in names if pattern.strip("*.") in name]
    near = holding or get_close_matches(pattern, names, 5, 0.3) or names
    raise PlanError(f"pattern {pattern!r} matches no Linear or Conv2d layer; near ones: {shortlist(near)}")


def _dense_layers(model: nn.Module) -> Iterator[Layer]:
    """All Linear and Conv2d layers, with what stands against ever replacing them."""
    named = dict(model.named_modules())
    fused = [name for name, module in named.items() if isinstance(module, nn.MultiheadAttention)]
    inside_attention = tuple(f"{name}." for name in fused)

    reasons = obstacles(model)
    # A weight that several layers share is counted once, and its TT form would have to fit all of them.
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name.removesuffix(".weight"))

    for name, module in named.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = _own_weight(module)
            others = [home for home in homes.get(id(weight), []) if home != name]
            obstacle = _obstacle(module, others, name.startswith(inside_attention)) or reasons.get(name, "")
            yield Layer(name, module, obstacle=obstacle if name else "it is the whole network")


def class_name(module: nn.Module) -> str:
    """The class of a module as its user knows it, without the one that torch wraps around a parametrized one."""
    kind = type(module)
    return kind.__mro__[1].__name__ if parametrize.is_parametrized(module) else kind.__name__


def _own_weight(module: nn.Linear | nn.Conv2d) -> nn.Parameter | None:
    """The weight as a parameter of the module itself; under a parametrization there is none."""
    return dict(module.named_parameters(recurse=False)).get("weight")


def _obstacle(module: nn.Linear | nn.Conv2d, others: Sequence[str], in_attention: bool) -> str:
    """Why a layer can never be replaced, or nothing."""
    if in_attention:
        return "nn.MultiheadAttention reads this weight directly"
    if others:
        return f"weight shared with {shortlist(others)}"
    if _own_weight(module) is None:
        return "weight is computed by a parametrization"
    if parametrize.is_parametrized(module):
        return "bias is computed by a parametrization"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} may do more than its base class"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"groups={module.groups}"
    return ""


def _ends(layers: Sequence[Layer], running_order: Sequence[str]) -> dict[str, str]:
    """The layers that stay dense by default, which are small and which all others hang on."""
    convs = [layer.fqn for layer in layers if isinstance(layer.module, nn.Conv2d)]
    linears = [layer.fqn for layer in layers if isinstance(layer.module, nn.Linear)]
    # Names follow the order in which layers were made, which need not be that in which they run.
    linears = [fqn for fqn in running_order if fqn in linears] or linears
    return {**dict.fromkeys(convs[:1], "first convolution"), **dict.fromkeys(linears[-1:], "last Linear")}


def _left_out(fqn: str, by_default: dict[str, str], include: Sequence[str], exclude: Sequence[str]) -> str:
    """Why a layer that could be replaced is not to be, or nothing."""
    is_included = any(matches(pattern.removeprefix(ADDING), fqn) for pattern in include)
    adds = all(pattern.startswith(ADDING) for pattern in include)
    if not is_included and not adds:
        return "not selected"
    if any(matches(pattern, fqn) for pattern in exclude):
        return "--exclude"
    if not is_included and fqn in by_default:
        return f"{by_default[fqn]} {LEFT_OUT_MARK}"
    return ""
