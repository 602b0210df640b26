"""A checkpoint without its architecture as a module: every matrix called `X.weight` is an nn.Linear called X."""

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


class Weights(nn.Module):
    """Tensors in a flat module, whose state dict has exactly their names, whatever these are; nothing is copied.

    Floating-point tensors are parameters, but for the statistics of batch norms; the others are buffers.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        tensors = {name: tensors[name] for name in sorted(tensors, key=_natural)}
        parameters = _parameters(tensors)
        layers = {
            name.removesuffix(".weight"): name
            for name in parameters
            if not _why_no_layer(name, tensors[name])
        }
        inside = set[str]()
        for fqn, name in layers.items():
            bias = parameters.get(f"{fqn}.bias")
            if bias is not None and bias.shape != tensors[name].shape[:1]:
                bias = None
            inside |= {name} if bias is None else {name, f"{fqn}.bias"}
            # Past add_module and register_parameter, which forbid dots, and names that are attributes already.
            self._modules[fqn] = _linear(parameters[name], bias)
        for name, tensor in tensors.items():
            if name in parameters and name not in inside:
                self._parameters[name] = parameters[name]
            elif name not in parameters:
                self._buffers[name] = tensor

    def left_out(self) -> dict[str, str]:
        """What layers stay dense by default, by fqn: the kind that their names tell."""
        kinds = {fqn: _kind(fqn.lower()) for fqn in self._modules}
        return {fqn: f"{kind} by its name" for fqn, kind in kinds.items() if kind}

    def kept_reason(self, name: str) -> str:
        """Why a parameter that is no layer's weight stays as it is."""
        if name in self._parameters:
            return _why_no_layer(name, self._parameters[name])
        return "bias"


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


def _why_no_layer(name: str, tensor: Tensor | None) -> str:
    """Why a parameter is not the weight of a Linear, or nothing."""
    if tensor is None or not name.endswith(".weight"):
        return "bias" if name.endswith("bias") else "not called X.weight"
    if tensor.dim() != 2:
        return f"{tensor.dim()}-d, no matrix"
    if tensor.numel() == 0:
        return "empty"
    return "" if tensor.dtype in MATRIX_TYPES else str(tensor.dtype).removeprefix("torch.")


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer.eval()
