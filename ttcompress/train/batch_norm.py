"""Batch norm over several processes, and gradients averaged over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from ttcompress.processes import World


class ReducedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of the global batch; unlike SyncBatchNorm it runs on CPUs too."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...)."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        axes, shape = [0, *range(2, input.dim())], [1, -1, *[1] * (input.dim() - 2)]
        values = input.float()
        count = _summed(values.new_full((1,), values.numel() / values.shape[1]))
        if self.training and float(count) <= 1:
            raise ValueError(f"batch norm needs more than one value a channel in training, not {tuple(input.shape)}")
        mean = _summed(values.sum(axes)) / count
        variance = _summed((values - mean.view(shape)).square().sum(axes)) / count
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.weight is not None:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return torch.addcmul(shift.view(shape), values, scale.view(shape)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked or 1) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for each process's loss counts."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        distributed.all_reduce(gradient)
        return gradient


def _summed(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


def reduce_batch_norms(model: nn.Module) -> None:
    """Make torch's own batch norms take the statistics of the global batch, in place; subclasses stay as they are."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = ReducedBatchNorm


def parallel(model: nn.Module, world: World) -> Any:
    """The module to call in training: gradients are averaged over the processes."""
    if world.size == 1:
        return model
    reduce_batch_norms(model)
    ids = [world.device.index] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
