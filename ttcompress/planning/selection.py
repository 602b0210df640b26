"""Which layers of a network may be replaced, by name pattern, and why the others stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from ttcompress.errors import PlanError, shortlist
from ttcompress.layers.spec import layer_spec
from ttcompress.networks.matrices import Weights
from ttcompress.records.layers import LayerSpec


@dataclass(frozen=True)
class Layer:
    """A Linear or Conv2d of the network, and why its weight stays dense, if it does."""

    fqn: str
    module: nn.Linear | nn.Conv2d
    kept: str = ""

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


def find_layers(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Layer]:
    """All Linear and Conv2d layers in `named_modules()` order, those that stay dense with the reason.

    By default the candidates are all but the first convolution and the last Linear, or without an architecture all but
    `weights.LEFT_OUT`; `include` replaces them by what it matches, `exclude` is subtracted last.

    Raises:
        PlanError: a pattern that matches no layer, or names outright one that cannot be decomposed.
    """
    layers = list(_dense_layers(model))
    names = [layer.fqn for layer in layers]
    for pattern in (*include, *exclude):
        require_match(pattern, names)
    for layer in layers:
        if layer.kept and layer.fqn in include:
            raise PlanError(f"{layer.fqn} cannot be compressed ({layer.kept}); leave it out of --include")
    ends = model.left_out() if isinstance(model, Weights) else _ends(layers)
    return [replace(layer, kept=layer.kept or _left_out(layer.fqn, ends, include, exclude)) for layer in layers]


def require_match(pattern: str, names: Sequence[str]) -> None:
    """See that a pattern matches some layer.

    Raises:
        PlanError: it matches none, with the nearest.
    """
    if any(matches(pattern, name) for name in names):
        return
    near = [name for name in names if pattern.strip("*.") in name] or get_close_matches(pattern, names, 5, 0.3)
    raise PlanError(f"pattern {pattern!r} matches no Linear or Conv2d layer; near ones: {shortlist(near or names)}")


def _dense_layers(model: nn.Module) -> Iterator[Layer]:
    attention = tuple(name + "." for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    homes: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        homes.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            own = dict(module.named_parameters(recurse=False)).get("weight")
            others = [home for home in homes.get(id(own), []) if home != name]
            obstacle = _obstacle(module, others, name.startswith(attention))
            yield Layer(name, module, obstacle if name else "it is the whole network")


def _obstacle(module: nn.Linear | nn.Conv2d, others: Sequence[str], in_attention: bool) -> str:
    """Why a layer can never be replaced, or nothing."""
    if in_attention:
        return "nn.MultiheadAttention reads this weight directly"
    if others:
        return f"weight shared with {shortlist(others)}"
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return "weight is computed by a parametrization"
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"{type(module).__name__} may do more than its base class"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which another layer would not run"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"groups={module.groups}"
    return ""


def _ends(layers: Sequence[Layer]) -> dict[str, str]:
    convs = [layer.fqn for layer in layers if isinstance(layer.module, nn.Conv2d)]
    linears = [layer.fqn for layer in layers if isinstance(layer.module, nn.Linear)]
    return {**dict.fromkeys(convs[:1], "first convolution"), **dict.fromkeys(linears[-1:], "last Linear")}


def _left_out(fqn: str, ends: dict[str, str], include: Sequence[str], exclude: Sequence[str]) -> str:
    if include and not any(matches(pattern, fqn) for pattern in include):
        return "not selected"
    if any(matches(pattern, fqn) for pattern in exclude):
        return "--exclude"
    return "" if include or fqn not in ends else f"{ends[fqn]} (--include replaces this default)"
