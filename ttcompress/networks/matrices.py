"""A checkpoint without its architecture as a module: its weights by name, under whatever modules these would be of.

A matrix called `X.weight` is an nn.Linear called X; of any other weight no more is known than its shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

MATRIX_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STATISTICS = ("running_mean", "running_var")
LEFT_OUT = {
    "embedding": ("*embed*", "*emb", "*wte", "*wpe", "shared", "*.shared", "*relative_attention_bias"),
    "output layer": ("*lm_head", "*head", "output", "*classifier", "*score"),
    "router": ("*router*", "*.gate"),
    "norm": ("*norm", "*norm?", "*ln_?", "*ln_f"),
}
"""Names of layers, in lower case, that stay dense by default: tables, what is small, and what errors hurt most."""


MOST_AXES = 5
"""Of a weight: outputs, inputs and a window of three."""


class Weights(nn.Module):
    """Tensors in a flat module, whose state dict has exactly their names, whatever these are; nothing is copied.

    Floating-point tensors are parameters, but for the statistics of batch norms; the others are buffers.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        tensors = {name: tensors[name] for name in sorted(tensors, key=_natural)}
        parameters = _parameters(tensors)
        weights = [name for name in parameters if not _why_no_weight(name, tensors[name])]
        owners: dict[str, list[str]] = {}
        for name in weights:
            owner, dot, _ = name.rpartition(".")
            if dot:
                owners.setdefault(owner, []).append(name)

        inside = set[str]()
        for owner, names in owners.items():
            held = {name: parameters[name] for name in names}
            # Past add_module and register_parameter, which forbid dots, and names that are attributes already.
            if names == [f"{owner}.weight"] and held[names[0]].dim() == 2:
                bias = parameters.get(f"{owner}.bias")
                if bias is not None and bias.shape == held[names[0]].shape[:1]:
                    held[f"{owner}.bias"] = bias
                self._modules[owner] = _linear(*held.values())
            else:
                self._modules[owner] = _holder(owner, held)
            inside |= held.keys()

        for name, tensor in tensors.items():
            if name in parameters and name not in inside:
                self._parameters[name] = parameters[name]
            elif name not in parameters:
                self._buffers[name] = tensor

    def left_out(self) -> dict[str, str]:
        """What stays dense by default, by fqn: the kind that the name of a layer or of its parameter tells."""
        found = {}
        for owner, module in self._modules.items():
            names = [] if module is None else [name for name in module._parameters if name != "bias"]
            for own_name in names:
                fqn = owner if own_name == "weight" else f"{owner}.{own_name}"
                found[fqn] = _kind(owner.lower()) or _kind(fqn.lower())
        found |= {name: _kind(name.lower()) for name in self._parameters if not self.kept_reason(name)}
        return {fqn: f"{kind} by its name" for fqn, kind in found.items() if kind}

    def kept_reason(self, name: str) -> str:
        """Why a parameter that is no weight stays as it is; nothing for a weight without a module."""
        if name in self._parameters:
            return _why_no_weight(name, self._parameters[name])
        return "bias"


class Holder(nn.Module):
    """A module of which no more is known than the weights that it has."""


def _natural(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10, however the shards have them."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name))]


def _parameters(tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Tensors that are the same memory become the same parameter, as tied weights are."""
    by_memory: dict[object, nn.Parameter] = {}
    found = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(STATISTICS):
            memory = (
                (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
            )
            found[name] = by_memory.setdefault(memory, nn.Parameter(tensor, requires_grad=False))
    return found


def _kind(fqn: str) -> str:
    return next(
        (kind for kind, patterns in LEFT_OUT.items() if any(fnmatchcase(fqn, each) for each in patterns)), ""
    )


def _why_no_weight(name: str, tensor: Tensor | None) -> str:
    """Why a parameter is none of those that are decomposed, or nothing."""
    own_name = name.rpartition(".")[2]
    # Masks of attention are called so, too.
    if tensor is None or own_name.endswith("bias"):
        return "bias"
    if not own_name:
        return "its name ends in a dot"
    if tensor.numel() == 0:
        return "empty"
    if sum(size > 1 for size in tensor.shape) < 2 and not (tensor.dim() == 2 and own_name == "weight"):
        return "a vector" if tensor.dim() else "a number"
    if tensor.dim() > MOST_AXES:
        return f"{tensor.dim()}-d, no weight"
    return "" if tensor.dtype in MATRIX_TYPES else str(tensor.dtype).removeprefix("torch.")


def _holder(owner: str, held: Mapping[str, nn.Parameter]) -> Holder:
    holder = Holder()
    for name, parameter in held.items():
        holder._parameters[name.removeprefix(f"{owner}.")] = parameter
    return holder.eval()


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer.eval()
