"""Optimizers, learning rates and averages for networks with TT layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi

import torch
from torch import Tensor, nn

from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight

STEPS_AT, STEP_FACTOR = (0.3, 0.6, 0.9), 0.1
"""Shares of what follows the warm-up at which the `step` schedule multiplies the learning rate by the factor.

As in Garipov et al. 2016: after 30, 60 and 90 of 100 epochs.
"""
MOMENTUM = 0.9
NORMS = nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


def tt_layers(model: nn.Module) -> list[TTLayer | TTWeight]:
    """All TT layers of a network, one of those that share their cores."""
    found = [module for module in model.modules() if isinstance(module, TTLayer | TTWeight)]
    by_cores = {id(next(iter(module.cores))): module for module in reversed(found)}
    return [module for module in found if by_cores[id(next(iter(module.cores)))] is module]


def make_optimizer(model: nn.Module, name: str, rate: float, decay: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW, with weight decay on dense weights alone.

    Biases and the parameters of norms have none; TT-cores have that of their product, in `update`.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for owner in model.modules():
        for own_name, parameter in owner.named_parameters(recurse=False):
            is_decayed = _is_dense_weight(owner, own_name, parameter)
            (decayed if is_decayed else undecayed).append(parameter)

    groups = [
        {"params": _trained_once(decayed), "weight_decay": decay},
        {"params": _trained_once(undecayed), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)


def _is_dense_weight(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    # TT layers keep their cores in a ParameterList.
    if isinstance(owner, NORMS | nn.ParameterList):
        return False
    return parameter.dim() > 1 and not name.startswith("bias")


def _trained_once(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained, shared ones once."""
    trained = (parameter for parameter in parameters if parameter.requires_grad)
    return [*dict.fromkeys(trained)]


def rate_at(step: int, total: int, warm_up: int, schedule: str) -> float:
    """Learning rate of a step as a share of the highest: linear warm-up, then down by cosine or in steps."""
    if step < warm_up:
        return (step + 1) / (warm_up + 1)

    done = (step - warm_up) / max(1, total - warm_up)
    if schedule == "step":
        num_drops = sum(done >= at for at in STEPS_AT)
        return float(STEP_FACTOR**num_drops)
    return (1 + cos(pi * done)) / 2


@torch.no_grad()
def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layers: Sequence[TTLayer | TTWeight],
    clip: float,
    decay: float,
    step: Callable[[], object],
) -> None:
    """Take one step with the gradients clipped to a norm of `clip`, 0 for any.

    `step` is the optimizer's, of scaled gradients or not.
    """
    if clip:
        with_gradient = [each for each in model.parameters() if each.grad is not None]
        nn.utils.clip_grad_norm_(with_gradient, clip)
    shrink_products(layers, _shrinkage(optimizer, decay))
    step()


def _shrinkage(optimizer: torch.optim.Optimizer, decay: float) -> float:
    """Share by which a dense weight without gradient shrinks in a step, once the momentum has built up."""
    group = optimizer.param_groups[0]
    momentum = group.get("momentum", 0)
    return float(group["lr"] * decay / (1 - momentum))


@torch.no_grad()
def shrink_products(layers: Sequence[TTLayer | TTWeight], share: float) -> None:
    """Decay TT layers as dense ones: the weight that the cores stand for becomes smaller by a share.

    The trained cores of a layer bear it alike. Decay of each core at the rate of dense weights would be
    another thing: the more cores, the stronger, and its minimum at a given product moves norm between them.
    """
    if not share:
        return
    left = max(0.0, 1 - share)
    alike: dict[int, list[Tensor]] = {}
    for layer in layers:
        trained = [core for core in layer.cores if core.requires_grad]
        alike.setdefault(len(trained), []).extend(trained)
    # At once: a GPU waits longer for each of many small operations than it takes for it.
    for count, cores in alike.items():
        if cores:
            torch._foreach_mul_(cores, left ** (1 / count))


def not_finite(model: nn.Module) -> set[str]:
    """Names of what has NaN or Inf in a state dict, such as the mask of an attention."""
    state = model.state_dict()
    return {
        name
        for name, value in state.items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    }


class Average:
    """Exponential moving average of a network's parameters and running statistics."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        # Between infinities there is nothing to average.
        self._copied = not_finite(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the network in; early averages are short."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[tuple[Tensor, Tensor]] = []
        for name, value in model.state_dict().items():
            if value.is_floating_point() and name not in self._copied:
                averaged.append((self.values[name], value))
            else:
                self.values[name].copy_(value)

        ours, theirs = ([pair[side] for pair in averaged] for side in (0, 1))
        torch._foreach_lerp_(ours, theirs, 1 - decay)
