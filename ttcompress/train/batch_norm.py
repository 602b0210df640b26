"""Batch norm over several processes, and gradients averaged over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from ttcompress.processes import World


class ReducedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the training statistics of the global batch, on CPUs too, unlike SyncBatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...)."""
        if not self.training and self.running_mean is not None:
            return super().forward(input)

        axes = [0, *range(2, input.dim())]
        channel_shape = [1, -1, *[1] * (input.dim() - 2)]
        values = input.float()
        own_count = values.numel() / values.shape[1]
        # Every process has at least one; to look at the sum would be to wait for the device in every layer.
        if self.training and own_count * distributed.get_world_size() <= 1:
            raise ValueError(
                f"batch norm needs more than one value a channel in training, not {tuple(input.shape)}"
            )
        count = _summed(values.new_full((1,), own_count))

        mean = _summed(values.sum(axes)) / count
        deviations = values - mean.view(channel_shape)
        variance = _summed(deviations.square().sum(axes)) / count
        if self.training:
            # As in torch, the running variance is the unbiased one.
            unbiased = variance.detach() * (count / (count - 1))
            self._track(mean.detach(), unbiased)

        scale = (variance + self.eps).rsqrt()
        shift = -mean * scale
        if self.weight is not None:
            scale = scale * self.weight
            shift = shift * self.weight + self.bias
        normalised = torch.addcmul(shift.view(channel_shape), values, scale.view(channel_shape))
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, where they are kept, towards those of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)

        share = self.momentum
        if share is None:
            # Without momentum they are the plain average over all batches.
            share = 1 / float(self.num_batches_tracked or 1)
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
    """Make torch's own batch norms, but no subclass, take the statistics of the global batch, in place."""
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = ReducedBatchNorm


def parallel(model: nn.Module, world: World) -> Any:
    """The module to call in training: gradients are averaged over the processes."""
    if world.size == 1:
        return model
    reduce_batch_norms(model)
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    # The statistics of batch norms are alike everywhere already.
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)
