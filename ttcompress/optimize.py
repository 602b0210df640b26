"""Optimizers, learning rates and averages for networks with TT layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi

import torch
from torch import Tensor, nn

from ttcompress.layers import TTConv2d, TTLinear

STEPS_AT, STEP_FACTOR = (0.5, 0.75), 0.1
"""Shares of what follows the warm-up at which the `step` schedule multiplies the learning rate by the factor."""
MOMENTUM = 0.9
NORMS = nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


def tt_layers(model: nn.Module) -> list[TTLinear | TTConv2d]:
    """All TT layers of a network."""
    return [module for module in model.modules() if isinstance(module, TTLinear | TTConv2d)]


def make_optimizer(model: nn.Module, name: str, rate: float, decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, with weight decay on dense weights alone.

    Biases and the parameters of norms have none; TT-cores have that of their product, from `product_decays`.
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
def product_decays(layers: Sequence[TTLinear | TTConv2d]) -> list[tuple[Tensor, Tensor]]:
    """All trained cores with the gradients of ||B||^2 / 2: weight decay of what the cores stand for, padding included.

    Decay of each core is another thing: its minimum at a given product moves norm between the cores, and its strength
    on the product depends on how many they are.
    """
    pairs = [pair for layer in layers for pair in zip(layer.cores, _norm_gradients(list(layer.cores)), strict=True)]
    return [(core, gradient) for core, gradient in pairs if core.requires_grad]


def _norm_gradients(cores: Sequence[Tensor]) -> list[Tensor]:
    """Of ||B||^2 / 2 by each core: the core between the Gram matrices of all that is left and all that is right of it.

    Cores are (r_{k-1}, m_k, n_k, w_k, r_k); B is never built.
    """
    scaled, rights = list[Tensor](), [cores[-1].new_ones(1, 1)]
    left = rights[0]
    for core in cores:
        rank = core.shape[-1]
        scaled.append((left @ core.flatten(1)).reshape(-1, rank))
        left = core.reshape(-1, rank).T @ scaled[-1]
    for core in reversed(cores[1:]):
        flat = core.flatten(1)
        rights.append((core.reshape(-1, core.shape[-1]) @ rights[-1]).reshape(flat.shape) @ flat.T)
    found = zip(scaled, reversed(rights), cores, strict=True)
    return [(half @ right).reshape(core.shape) for half, right, core in found]


@torch.no_grad()
def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layers: Sequence[TTLinear | TTConv2d],
    clip: float,
    decay: float,
    step: Callable[[], object],
) -> None:
    """One step with the gradients cut to a norm of `clip` (0 for none); `step` is the optimizer's, scaled or not.

    Decay of the TT layers is as the optimizer's own: with SGD in the gradient, with AdamW beside it.
    """
    if clip:
        nn.utils.clip_grad_norm_([each for each in model.parameters() if each.grad is not None], clip)
    decays = product_decays(layers) if decay else []
    beside = isinstance(optimizer, torch.optim.AdamW)
    if not beside:
        for core, gradient in decays:
            if core.grad is not None:
                core.grad.add_(gradient, alpha=decay)
    step()
    if beside:
        rate = float(optimizer.param_groups[0]["lr"])
        for core, gradient in decays:
            core.sub_(gradient, alpha=rate * decay)


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
