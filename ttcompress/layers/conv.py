"""The drop-in 2-d convolution."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.base import TTLayer
from ttcompress.records.layers import ConvSpec, Execution
from ttcompress.tt.contract import contract_groups, dense_weight, merge_all, merge_groups, pad_features
from ttcompress.tt.cost import Calls, ContractionPlan

FEW_CHANNELS = 256


class TTConv2d(TTLayer):
    """A 2-d convolution with its kernel in TT form, in any of the formats (Garipov et al. 2016, section 4).

    Input (batch, in_channels, height, width) or without the batch axis. `chain`, `naive` and `lowrank` run as stock
    convolutions one after the other, `matrix` contracts the channels of each pixel first and the window after.

    Raises:
        ShapeError: when called with another number of axes or channels, or with whole numbers.

    >>> import torch
    >>> from ttcompress import TTConv2d
    >>> dense = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
    >>> layer = TTConv2d.from_dense(dense)
    >>> images = torch.randn(4, 16, 8, 8)
    >>> torch.allclose(layer(images), dense(images), atol=1e-5)
    True
    """

    spec: ConvSpec
    kind = ConvSpec.kind

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str
    groups = 1

    def _calls(self, x: Tensor) -> Calls:
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ShapeError(
                f"the layer takes ([batch,] {self.in_channels}, height, width), not {tuple(x.shape)}"
            )
        pixels = x.numel() // max(1, self.in_channels)
        return Calls(pixels, pixels // prod(self.stride))

    def _operands(
        self, execution: Execution, x: Tensor, plan: ContractionPlan | None, keeps: bool, cores: list[Tensor]
    ) -> Any:
        if execution is Execution.DENSE:
            kernel = dense_weight(cores, self.spec.weight_shape)
            # A convolution brings it into order itself; done once it pays where the kernel is cached.
            return _in_format_of(x, kernel) if keeps else kernel
        if plan is None:
            return self._chain_kernels(cores, x)
        return plan, *self._window_and_groups(cores, plan)

    def _run(self, execution: Execution, x: Tensor, operands: Any) -> Tensor:
        if execution is Execution.DENSE:
            return self._window(x, operands, self._bias_as(x))

        images = x if x.dim() == 4 else x[None]
        run = self._chain if execution is Execution.CHAIN else self._contract
        y = run(images, *operands)
        return y if x.dim() == 4 else y[0]

    def _chain(self, images: Tensor, first: Tensor | None, kernel: Tensor, last: Tensor) -> Tensor:
        """1x1, kh x kw, 1x1; or kh x kw, 1x1 with everything before the output core merged into one kernel."""
        bias = self._bias_as(images)
        if first is not None:
            images = _pointwise(images, first)
        return _pointwise(self._window(images, kernel), last, bias)

    def _chain_kernels(self, cores: list[Tensor], x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The matrices of the 1x1 convolutions, (out, in), and the kernel between them, (out, in, kh, kw)."""
        *head, last = cores
        first = None
        if self.tensorization.format == "chain":
            first_core, middle = head
            first = first_core[0, 0, :, 0].T
            kernel = middle[:, 0, 0].permute(2, 0, 1)
        else:
            kernel = merge_all(head)[0, 0].permute(2, 0, 1)

        kernel = kernel.reshape(*kernel.shape[:2], *self.kernel_size)
        return first, _in_format_of(x, kernel), last[:, :, 0, 0, 0].T

    def _contract(
        self, images: Tensor, plan: ContractionPlan, window: Tensor, groups: list[Tensor]
    ) -> Tensor:
        """Channel cores pixel by pixel, then the window core for all outputs (Garipov et al. 2016, section 4)."""
        n, _, height, width = images.shape
        padded_in, padded_out = prod(self.tensorization.in_modes), prod(self.tensorization.out_modes)
        pixels = pad_features(images.permute(0, 2, 3, 1), padded_in).flatten(0, 2)

        # (n, height, width, TT-rank of the window, out) to one image of TT-rank channels for each output.
        mixed = contract_groups(groups, pixels, plan)
        mixed = mixed.reshape(n, height, width, window.shape[0], padded_out)[..., : self.out_channels]
        mixed = mixed.permute(0, 4, 3, 1, 2).flatten(0, 1)

        y = self._window(mixed, window.reshape(1, -1, *self.kernel_size))
        y = y.reshape(n, self.out_channels, *y.shape[2:])
        bias = self._bias_as(images)
        return y if bias is None else y + bias[:, None, None].to(y.dtype)

    def _window_and_groups(self, cores: list[Tensor], plan: ContractionPlan) -> tuple[Tensor, list[Tensor]]:
        """The window core as (TT-rank, kh kw), 1 where there is none, and the channel cores merged as planned."""
        if self.tensorization.window_modes[0] > 1:
            return cores[0][0, 0, 0].T, merge_groups(cores[1:], plan)
        return cores[0].new_ones(1, 1), merge_groups(cores, plan)

    def _window(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve with this layer's stride, padding and dilation."""
        spec = self.spec
        if spec.padding_mode == "zeros":
            return functional.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation)
        padded = functional.pad(x, self._sides(), mode=spec.padding_mode)
        return functional.conv2d(padded, weight, bias, spec.stride, 0, spec.dilation)

    def _sides(self) -> list[int]:
        """Padding as (left, right, top, bottom), as torch's own 'same' spreads it."""
        spec = self.spec
        sides = list[int]()
        for axis in (1, 0):
            # `same` puts the odd one behind, numbers are put on both sides.
            total = spec.dilation[axis] * (spec.kernel_size[axis] - 1) if spec.padding == "same" else 0
            before = total // 2
            fixed = 0 if isinstance(spec.padding, str) else spec.padding[axis]
            sides += [before + fixed, total - before + fixed]
        return sides


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _in_format_of(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel in the memory format of the images."""
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return kernel.contiguous(memory_format=memory_format)


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution by a matrix (out, in).

    A product of matrices needs no other order of the channels, which a convolution makes and undoes. Of channels_last
    that pays for many pixels of few channels; with a bias, which a convolution adds in passing, nowhere.
    """
    if torch.compiler.is_compiling():
        return functional.conv2d(x, matrix[:, :, None, None], bias)

    if bias is None and _is_channels_last(x) and x.shape[1] < FEW_CHANNELS and len(x) > 1:
        pixels = x.permute(0, 2, 3, 1)
        return functional.linear(pixels, matrix).permute(0, 3, 1, 2)

    if x.is_contiguous() and not torch.is_grad_enabled():
        # matmul would bring the images into another order, to have one large product.
        n, _, *size = x.shape
        y = torch.bmm(matrix.expand(n, -1, -1), x.flatten(2))
        y = y.reshape(n, len(matrix), *size)
        return y if bias is None else y.add_(bias[:, None, None].to(y.dtype))

    return functional.conv2d(x, matrix[:, :, None, None], bias)
