"""The drop-in 2-d convolution."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.execution import TTLayer, Way
from ttcompress.records.layers import ConvSpec
from ttcompress.tt import cost
from ttcompress.tt.contract import dense_weight, merge_all, merge_groups, pad_features, sweep_groups


class TTConv2d(TTLayer):
    """A 2-d convolution with its kernel in TT form, in any of the formats (Garipov et al. 2016, section 4).

    Input (batch, in_channels, height, width) or without the batch axis. `chain`, `naive` and `lowrank` run as stock
    convolutions one after the other, `matrix` contracts the channels of each pixel first and the window after.
    """

    spec: ConvSpec

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str
    groups = 1

    def _chosen(self, x: Tensor) -> tuple[Way, Any]:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ShapeError(f"the layer takes ([batch,] {self.in_channels}, height, width), not {tuple(x.shape)}")
        pixels = x.numel() // max(1, self.in_channels)
        if self._runs_dense(pixels, pixels // (self.stride[0] * self.stride[1])):
            return TTConv2d._dense, self._made("dense", x, lambda cores: self._dense_kernel(cores, x))
        if self.tensorization.format == "matrix":
            plan = self._plan()
            return TTConv2d._mixed, (plan, *self._made("groups", x, lambda cores: self._window_and_groups(cores, plan)))
        return TTConv2d._chain, self._made("chain", x, lambda cores: self._chain_kernels(cores, x))

    def _dense(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self._window(x, kernel, self._bias_as(x))

    def _dense_kernel(self, cores: list[Tensor], x: Tensor) -> Tensor:
        kernel = dense_weight(cores, self.spec.weight_shape)
        # A convolution brings it into order itself; done once it pays where the kernel is kept.
        return _in_format_of(x, kernel) if self._keeps() else kernel

    def _chain(self, x: Tensor, kernels: tuple[Tensor | None, Tensor, Tensor]) -> Tensor:
        """1x1, kh x kw, 1x1; or kh x kw, 1x1 with everything before the output core merged into one kernel."""
        first, kernel, last = kernels
        bias = self._bias_as(x)
        images = x if x.dim() == 4 else x[None]
        if first is not None:
            images = _pointwise(images, first)
        y = _pointwise(self._window(images, kernel), last, bias)
        return y if x.dim() == 4 else y[0]

    def _chain_kernels(self, cores: list[Tensor], x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        head, last = cores[:-1], cores[-1]
        first = None
        if self.tensorization.format == "chain":
            first, *head = head
            first = first[0, 0, :, 0].T
            kernel = head[0][:, 0, 0].permute(2, 0, 1)
        else:
            kernel = merge_all(head)[0, 0].permute(2, 0, 1)
        kernel = _in_format_of(x, kernel.reshape(*kernel.shape[:2], *self.kernel_size))
        return first, kernel, last[:, :, 0, 0, 0].T

    def _mixed(self, x: Tensor, made: tuple[cost.SweepPlan, Tensor, list[Tensor]]) -> Tensor:
        """Channel cores pixel by pixel, then the window core for all outputs (Garipov et al. 2016, section 4)."""
        plan, window, groups = made
        images = x if x.dim() == 4 else x[None]
        n, _, height, width = images.shape
        pixels = pad_features(images.permute(0, 2, 3, 1), prod(self.tensorization.in_modes)).flatten(0, 2)
        mixed = sweep_groups(groups, pixels, plan)
        padded_out = prod(self.tensorization.out_modes)
        mixed = mixed.reshape(n, height, width, window.shape[0], padded_out)[..., : self.out_channels]
        mixed = mixed.permute(0, 4, 3, 1, 2).flatten(0, 1)
        y = self._window(mixed, window.reshape(1, -1, *self.kernel_size))
        y = y.reshape(n, self.out_channels, *y.shape[2:])
        bias = self._bias_as(x)
        y = y if bias is None else y + bias[:, None, None].to(y.dtype)
        return y if x.dim() == 4 else y[0]

    def _window_and_groups(self, cores: list[Tensor], plan: cost.SweepPlan) -> tuple[Tensor, list[Tensor]]:
        if self._is_windowed():
            return cores[0][0, 0, 0].T, merge_groups(cores[1:], plan)
        return cores[0].new_ones(1, 1), merge_groups(cores, plan)

    def _is_windowed(self) -> bool:
        return self.tensorization.window_modes[0] > 1

    def _window(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with this layer's stride, padding and dilation."""
        spec = self.spec
        if spec.padding_mode == "zeros":
            return functional.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation)
        padded = functional.pad(x, self._sides(), mode=spec.padding_mode)
        return functional.conv2d(padded, weight, bias, spec.stride, 0, spec.dilation)

    def _sides(self) -> list[int]:
        """Padding as (left, right, top, bottom), as torch's own 'same' spreads it."""
        spec, sides = self.spec, []
        for axis in (1, 0):
            total = spec.dilation[axis] * (spec.kernel_size[axis] - 1) if spec.padding == "same" else 0
            fixed = 0 if isinstance(spec.padding, str) else spec.padding[axis]
            sides += [total // 2 + fixed, total - total // 2 + fixed]
        return sides


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _in_format_of(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel in the memory format of the images."""
    return kernel.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution by a matrix (out, in).

    A product of matrices needs no other order of the channels, which a convolution makes and undoes; but only a
    convolution of channels_last adds the bias in passing.
    """
    if torch.compiler.is_compiling():
        return functional.conv2d(x, matrix[:, :, None, None], bias)
    if bias is None and _is_channels_last(x):
        return functional.linear(x.permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
    if x.is_contiguous() and not torch.is_grad_enabled():
        # matmul would bring the images into another order, to have one large product.
        y = torch.bmm(matrix.expand(len(x), -1, -1), x.flatten(2)).reshape(len(x), len(matrix), *x.shape[2:])
        return y if bias is None else y.add_(bias[:, None, None].to(y.dtype))
    return functional.conv2d(x, matrix[:, :, None, None], bias)
