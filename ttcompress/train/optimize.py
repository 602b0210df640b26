"""Optimizers, learning rates and averages for networks with TT layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi

import torch
from torch import nn

from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear

STEPS_AT, STEP_FACTOR = (0.3, 0.6, 0.9), 0.1
"""Shares of what follows the warm-up at which the `step` schedule multiplies the learning rate by the factor.

As in Garipov et al. 2016: after 30, 60 and 90 of 100 epochs.
"""
MOMENTUM = 0.9
NORMS = nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


def tt_layers(model: nn.Module) -> list[TTLinear | TTConv2d]:
    """All TT layers of a network."""
    return [module for module in model.modules() if isinstance(module, TTLinear | TTConv2d)]


def make_optimizer(model: nn.Module, name: str, rate: float, decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, with weight decay on dense weights alone.

    Biases and the parameters of norms have none; TT-cores have that of their product, in `update`.
    """
    decayed, others = list[nn.Parameter](), list[nn.Parameter]()
    for owner in model.modules():
        for own_name, parameter in owner.named_parameters(recurse=False):
            plain = isinstance(owner, NORMS | nn.ParameterList) or parameter.dim() <= 1 or own_name.startswith("bias")
            (others if plain else decayed).append(parameter)
    decayed, others = (_trained_once(parameters) for parameters in (decayed, others))
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)


def _trained_once(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained, shared ones once."""
    return [*dict.fromkeys(parameter for parameter in parameters if parameter.requires_grad)]


def rate_at(step: int, total: int, warm_up: int, schedule: str) -> float:
    """Learning rate of a step as a share of the highest: linear warm-up, then down to 0 by cosine, or by steps."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    done = (step - warm_up) / max(1, total - warm_up)
    if schedule == "step":
        return float(STEP_FACTOR ** sum(done >= at for at in STEPS_AT))
    return (1 + cos(pi * done)) / 2


@torch.no_grad()
def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layers: Sequence[TTLinear | TTConv2d],
    clip: float,
    decay: float,
    step: Callable[[], object],
) -> None:
    """One step with the gradients cut to a norm of `clip` (0 for none); `step` is the optimizer's, scaled or not."""
    if clip:
        nn.utils.clip_grad_norm_([each for each in model.parameters() if each.grad is not None], clip)
    shrink_products(layers, _shrinkage(optimizer, decay))
    step()


def _shrinkage(optimizer: torch.optim.Optimizer, decay: float) -> float:
    """By which share a dense weight without gradient shrinks in a step; with SGD, once the momentum has built up."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * decay / (1 - group.get("momentum", 0)))


@torch.no_grad()
def shrink_products(layers: Sequence[TTLinear | TTConv2d], share: float) -> None:
    """Weight decay of TT layers: make the weight that the cores stand for smaller by a share, as that of a dense layer.

    The trained cores of a layer bear it alike. Decay of each core at the rate of dense weights would be another thing:
    the more cores, the stronger, and its minimum at a given product moves norm between them.
    """
    for layer in layers if share else ():
        trained = [core for core in layer.cores if core.requires_grad]
        for core in trained:
            core.mul_(max(0.0, 1 - share) ** (1 / len(trained)))


class Average:
    """Exponential moving average of a network's parameters and running statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the network in; early averages are short."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)
