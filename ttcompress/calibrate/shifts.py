"""What can move the mean output of a layer: its bias, or the mean that a batch norm takes off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import Call, hooked
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.networks.running import NetworkInput, call, device_of, placed
from ttcompress.records.layers import LayerSpec
from ttcompress.records.plan import weight_name


@dataclass(frozen=True)
class Shift:
    """A vector, by its name in the network, that is added to a layer's output, or with the sign -1 taken off."""

    name: str
    sign: int = 1

    @torch.no_grad()
    def move(self, model: nn.Module, dense: nn.Module, by: Tensor) -> None:
        """Give the network the vector of the dense one, moved so that outputs have this added."""
        own = self._of(dense)
        self._of(model).copy_(own + self.sign * by.to(own))

    def _of(self, model: nn.Module) -> Tensor:
        owner, _, name = self.name.rpartition(".")
        vector: Tensor = getattr(model.get_submodule(owner), name)
        return vector


def shift_of(
    model: nn.Module, fqn: str, spec: LayerSpec, uses: Sequence[Use], norms: dict[str, str]
) -> Shift | None:
    """What moves the mean output of a weight of one use, None where nothing does.

    Args:
        norms: as of `batch_norms_after`.
    """
    if len(uses) != 1 or uses[0].kind is Kind.LOOKUP or uses[0].swapped:
        return None
    (use,) = uses
    owner = weight_name(fqn, spec.parameter).rpartition(".")[0]
    if use.bias and getattr(model.get_submodule(owner), use.bias) is not None:
        return Shift(f"{owner}.{use.bias}")
    if use.kind is Kind.PRODUCT and use.fqn in norms:
        return Shift(f"{norms[use.fqn]}.running_mean", -1)
    return None


@torch.no_grad()
def batch_norms_after(model: nn.Module, inputs: NetworkInput) -> dict[str, str]:
    """By the name of a module: the batch norm that takes its output, where each of both runs once for a batch."""
    calls: Counter[str] = Counter()
    # Not held: all outputs of a batch are much memory.
    outputs: list[tuple[str, ReferenceType[Tensor]]] = []
    found: dict[str, str] = {}

    def see(name: str, module: nn.Module, at: Call, output: Any) -> None:
        calls[name] += 1
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            found.update({layer: name for layer, made in outputs if made() is at.first})
        if isinstance(output, Tensor):
            outputs.append((name, ref(output)))

    leaves = [name for name, module in model.named_modules() if not any(module.children())]
    with hooked(model, leaves, see, after=True):
        call(model, placed(inputs, device_of(model)))
    return {layer: norm for layer, norm in found.items() if calls[layer] == calls[norm] == 1}
