"""The drop-in convolutions, in one to three dimensions, transposed ones too."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.base import TTMap
from ttcompress.layers.spec import unviewed
from ttcompress.records.layers import ConvSpec, Execution
from ttcompress.tt.contract import contract_groups, dense_weight, merge_all, merge_groups, pad_features
from ttcompress.tt.cost import Calls, ContractionPlan

AXES = {1: "length", 2: "height, width", 3: "depth, height, width"}
"""What follows the channels of an input, by the dimensions of the window."""
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats by the dimensions of a batch or a kernel; there is none for signals."""


class TTConv(TTMap):
    """A convolution with its kernel in TT form, in any of the formats (Garipov et al. 2016, section 4).

    Input (batch, in_channels, *size) or without the batch axis. `chain`, `naive` and `lowrank` run as stock
    convolutions one after the other, `matrix` contracts the channels of each pixel first and the window after.
    Each dimension has a class of its own below.

    Raises:
        ShapeError: when called with another number of axes or channels, or with whole numbers.
    """

    spec: ConvSpec
    _dims: ClassVar[int]
    """Dimensions of the window."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    output_padding: tuple[int, ...]
    groups: int

    def _calls(self, x: Tensor) -> Calls:
        if x.dim() not in (self._dims + 1, self._dims + 2) or x.shape[-1 - self._dims] != self.in_channels:
            raise ShapeError(
                f"the layer takes ([batch,] {self.in_channels}, {AXES[self._dims]}), not {tuple(x.shape)}"
            )
        pixels = x.numel() // max(1, self.in_channels)
        strides = prod(self.stride)
        return Calls(pixels, pixels * strides if self.spec.transposed else pixels // strides)

    def _operands(
        self, execution: Execution, x: Tensor, plan: ContractionPlan | None, keeps: bool, cores: list[Tensor]
    ) -> Any:
        if execution is Execution.DENSE:
            kernel = unviewed(dense_weight(cores, self.spec.view_shape), self.spec)
            # A convolution brings it into order itself; done once it pays where the kernel is cached.
            return _in_format_of(x, kernel) if keeps else kernel.contiguous()
        if plan is None:
            return self._chain_kernels(cores, x)
        return plan, *self._window_and_groups(cores, plan)

    def _run(
        self, execution: Execution, x: Tensor, operands: Any, output_padding: Sequence[int] | None = None
    ) -> Tensor:
        added = self.output_padding if output_padding is None else output_padding
        if execution is Execution.DENSE:
            return self._window(x, operands, added, self._bias_as(x))

        is_batch = x.dim() == self._dims + 2
        images = x if is_batch else x[None]
        run = self._chain if execution is Execution.CHAIN else self._contract
        y = run(images, added, *operands)
        return y if is_batch else y[0]

    def _chain(
        self, images: Tensor, added: Sequence[int], first: Tensor | None, kernel: Tensor, last: Tensor
    ) -> Tensor:
        """1x1, window, 1x1; or window, 1x1 with everything before the output core merged into one kernel."""
        bias = self._bias_as(images)
        if first is not None:
            images = _pointwise(images, first)
        return _pointwise(self._window(images, kernel, added), last, bias)

    def _chain_kernels(self, cores: list[Tensor], x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """The matrices of the 1x1 convolutions, (out, in), and the kernel between them as the window takes it.

        Groups come in front of matrices, and are part of the first axis of the kernel.
        """
        *head, last = cores
        first = None
        if self.tensorization.format == "chain":
            first_core, middle = head
            first = first_core[..., 0, 0, :, 0, :].mT
            kernel = middle[..., 0, 0, :, :]
        else:
            kernel = merge_all(head)[..., 0, 0, :, :, :]

        # (in, window, out) so far.
        kernel = kernel.mT if self.spec.transposed else kernel.movedim(-1, -3)
        kernel = kernel.reshape(-1, kernel.shape[-2], *self.kernel_size)
        return first, _in_format_of(x, kernel), last[..., 0, 0, 0].mT

    def _contract(
        self,
        images: Tensor,
        added: Sequence[int],
        plan: ContractionPlan,
        window: Tensor,
        merged: list[Tensor],
    ) -> Tensor:
        """Channel cores pixel by pixel, then the window core for all outputs (Garipov et al. 2016, section 4)."""
        if self.groups == 1:
            mixed = self._mixed(images, plan, merged)
        else:
            # One set of cores for each group of channels.
            blocks = zip(images.chunk(self.groups, 1), zip(*merged, strict=True), strict=True)
            parts = [self._mixed(block, plan, cores) for block, cores in blocks]
            mixed = torch.cat(parts, dim=2)

        # For each output of a group one image, whose channels are the TT-ranks of all groups.
        n, outs, rank, *_ = mixed.shape
        ends = (rank, 1) if self.spec.transposed else (self.groups, -1)
        # Some of torch's kernels have no gradient for a weight in another order.
        kernel = window.reshape(*ends, *self.kernel_size).contiguous()
        y = self._window(mixed.flatten(0, 1), kernel, added)
        y = y.reshape(n, outs, *y.shape[1:]).transpose(1, 2).reshape(n, self.out_channels, *y.shape[2:])
        bias = self._bias_as(images)
        return y if bias is None else y + _beside(bias, y).to(y.dtype)

    def _mixed(self, images: Tensor, plan: ContractionPlan, merged: Sequence[Tensor]) -> Tensor:
        """The channels of a group contracted: (n, out, TT-rank of the window, *size)."""
        n, _, *size = images.shape
        spatial = range(2, images.dim())
        padded_in, padded_out = prod(self.tensorization.in_modes), prod(self.tensorization.out_modes)
        pixels = pad_features(images.permute(0, *spatial, 1), padded_in).flatten(0, -2)

        mixed = contract_groups(merged, pixels, plan)
        rank = mixed.shape[-1] // padded_out
        mixed = mixed.reshape(n, *size, rank, padded_out)[..., : self.spec.view_shape[0]]
        return mixed.movedim((-1, -2), (1, 2))

    def _window_and_groups(self, cores: list[Tensor], plan: ContractionPlan) -> tuple[Tensor, list[Tensor]]:
        """The window core as (TT-rank, window), 1 where there is none, and the channel cores merged as planned.

        Groups of channels come in front.
        """
        if self.tensorization.window_modes[0] > 1:
            return cores[0][..., 0, 0, 0, :, :].mT, merge_groups(cores[1:], plan)
        lead = cores[0].shape[:-5]
        return cores[0].new_ones(*lead, 1, 1), merge_groups(cores, plan)

    def _window(
        self, x: Tensor, weight: Tensor, output_padding: Sequence[int], bias: Tensor | None = None
    ) -> Tensor:
        """Convolve with this layer's stride, padding and dilation."""
        spec = self.spec
        # Kinds are called as torch's functions are.
        convolve = getattr(functional, self.kind)
        y: Tensor
        if spec.transposed:
            y = convolve(
                x, weight, bias, spec.stride, spec.padding, output_padding, self.groups, spec.dilation
            )
        elif spec.padding_mode == "zeros":
            y = convolve(x, weight, bias, spec.stride, spec.padding, spec.dilation, self.groups)
        else:
            padded = functional.pad(x, self._sides(), mode=spec.padding_mode)
            y = convolve(padded, weight, bias, spec.stride, 0, spec.dilation, self.groups)
        return y

    def _sides(self) -> list[int]:
        """Padding as (left, right, top, bottom) and so on from the last axis, as torch's own 'same' spreads it."""
        spec = self.spec
        sides = list[int]()
        for axis in reversed(range(self._dims)):
            # `same` puts the odd one behind, numbers are put on both sides.
            total = spec.dilation[axis] * (spec.kernel_size[axis] - 1) if spec.padding == "same" else 0
            before = total // 2
            fixed = 0 if isinstance(spec.padding, str) else spec.padding[axis]
            sides += [before + fixed, total - before + fixed]
        return sides


class TTConv1d(TTConv):
    """A convolution of signals, input ([batch,] in_channels, length).

    >>> import torch
    >>> from ttcompress import TTConv1d
    >>> dense = torch.nn.Conv1d(16, 32, 5, padding="same", padding_mode="circular")
    >>> layer = TTConv1d.from_dense(dense)
    >>> signals = torch.randn(4, 16, 50)
    >>> torch.allclose(layer(signals), dense(signals), atol=1e-5)
    True
    """

    kind = "conv1d"
    _dims = 1


class TTConv2d(TTConv):
    """A convolution of images, input ([batch,] in_channels, height, width).

    >>> import torch
    >>> from ttcompress import TTConv2d
    >>> dense = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
    >>> layer = TTConv2d.from_dense(dense)
    >>> images = torch.randn(4, 16, 8, 8)
    >>> torch.allclose(layer(images), dense(images), atol=1e-5)
    True
    """

    kind = "conv2d"
    _dims = 2


class TTConv3d(TTConv):
    """A convolution of volumes or videos, input ([batch,] in_channels, depth, height, width).

    >>> import torch
    >>> from ttcompress import TTConv3d
    >>> dense = torch.nn.Conv3d(8, 16, (3, 1, 3), padding=(1, 0, 1))
    >>> layer = TTConv3d.from_dense(dense)
    >>> videos = torch.randn(2, 8, 4, 6, 6)
    >>> torch.allclose(layer(videos), dense(videos), atol=1e-5)
    True
    """

    kind = "conv3d"
    _dims = 3


class TTConvTranspose(TTConv):
    """A transposed convolution: a chain is 1x1, the transposed window, 1x1."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer; `output_size` decides between the sizes that a stride can have come from, as in torch.

        Raises:
            ShapeError: input of another shape, or of whole numbers; an output that is not possible.
        """
        call = self._call(input)
        added = None if output_size is None else self._output_padding(input, output_size)
        return self._run(call.execution, input, call.made.operands, added)

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        """What is added behind so that the output has a size, given with or without batch and channels."""
        wanted = list(output_size)
        if len(wanted) == x.dim():
            wanted = wanted[-self._dims :]

        spec, size = self.spec, x.shape[-self._dims :]
        least = []
        for axis in range(self._dims):
            window = spec.dilation[axis] * (spec.kernel_size[axis] - 1) + 1
            cut = 2 * int(spec.padding[axis])
            least.append((size[axis] - 1) * spec.stride[axis] + window - cut)

        added = [asked - smallest for asked, smallest in zip(wanted, least, strict=False)]
        within = zip(added, spec.stride, strict=False)
        if len(wanted) != self._dims or not all(0 <= more < stride for more, stride in within):
            most = [smallest + stride - 1 for smallest, stride in zip(least, spec.stride, strict=True)]
            raise ShapeError(f"output_size must lie between {least} and {most}, not {list(output_size)}")
        return added


class TTConvTranspose1d(TTConvTranspose):
    """A transposed convolution of signals, input ([batch,] in_channels, length).

    >>> import torch
    >>> from ttcompress import TTConvTranspose1d
    >>> dense = torch.nn.ConvTranspose1d(16, 8, 4, stride=2, padding=1)
    >>> layer = TTConvTranspose1d.from_dense(dense)
    >>> signals = torch.randn(4, 16, 50)
    >>> torch.allclose(layer(signals), dense(signals), atol=1e-5)
    True
    """

    kind = "conv_transpose1d"
    _dims = 1


class TTConvTranspose2d(TTConvTranspose):
    """A transposed convolution of images, input ([batch,] in_channels, height, width).

    >>> import torch
    >>> from ttcompress import TTConvTranspose2d
    >>> dense = torch.nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1)
    >>> layer = TTConvTranspose2d.from_dense(dense)
    >>> images = torch.randn(4, 16, 8, 8)
    >>> layer(images).shape, layer(images, output_size=(16, 16)).shape
    (torch.Size([4, 8, 15, 15]), torch.Size([4, 8, 16, 16]))
    """

    kind = "conv_transpose2d"
    _dims = 2


class TTConvTranspose3d(TTConvTranspose):
    """A transposed convolution of volumes, input ([batch,] in_channels, depth, height, width).

    >>> import torch
    >>> from ttcompress import TTConvTranspose3d
    >>> dense = torch.nn.ConvTranspose3d(8, 4, 2, stride=2)
    >>> layer = TTConvTranspose3d.from_dense(dense)
    >>> volumes = torch.randn(2, 8, 3, 4, 5)
    >>> torch.allclose(layer(volumes), dense(volumes), atol=1e-5)
    True
    """

    kind = "conv_transpose3d"
    _dims = 3


CONV_LAYERS: dict[str, type[TTConv]] = {
    layer.kind: layer
    for layer in (TTConv1d, TTConv2d, TTConv3d, TTConvTranspose1d, TTConvTranspose2d, TTConvTranspose3d)
}
"""Layer classes by kind."""


def _is_channels_last(x: Tensor) -> bool:
    memory_format = CHANNELS_LAST.get(x.dim())
    if memory_format is None or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=memory_format)


def _in_format_of(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel in the memory format of the images."""
    is_batch = x.dim() == kernel.dim()
    last = is_batch and _is_channels_last(x)
    memory_format = CHANNELS_LAST[x.dim()] if last else torch.contiguous_format
    return kernel.contiguous(memory_format=memory_format)


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution by a matrix (out, in), or by one for each group of channels, (groups, out, in).

    A product of matrices needs no other order of the channels, which a convolution makes and undoes; but only a
    convolution of channels_last adds the bias in passing.
    """
    if matrix.dim() == 3:
        return _grouped(x, matrix, bias)
    if torch.compiler.is_compiling():
        return _convolved(x, matrix, bias)

    if bias is None and _is_channels_last(x):
        pixels = x.movedim(1, -1)
        return functional.linear(pixels, matrix).movedim(-1, 1)

    if x.is_contiguous() and not torch.is_grad_enabled():
        # matmul would bring the images into another order, to have one large product.
        n, _, *size = x.shape
        y = torch.bmm(matrix.expand(n, -1, -1), x.flatten(2))
        y = y.reshape(n, len(matrix), *size)
        return y if bias is None else y.add_(_beside(bias, y).to(y.dtype))

    return _convolved(x, matrix, bias)


def _grouped(x: Tensor, matrices: Tensor, bias: Tensor | None) -> Tensor:
    groups, outs, ins = matrices.shape
    if torch.compiler.is_compiling() or not x.is_contiguous():
        return _convolved(x, matrices.flatten(0, 1), bias, groups)

    # Twice as fast as a grouped convolution.
    n, _, *size = x.shape
    y = matrices @ x.reshape(n, groups, ins, -1)
    y = y.reshape(n, groups * outs, *size)
    return y if bias is None else y + _beside(bias, y).to(y.dtype)


def _convolved(x: Tensor, matrix: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    dims = x.dim() - 2
    kernel = matrix[(..., *[None] * dims)]
    y: Tensor = getattr(functional, f"conv{dims}d")(x, kernel, bias, groups=groups)
    return y


def _beside(bias: Tensor, y: Tensor) -> Tensor:
    """A bias with as many axes behind it as the channels of y have."""
    return bias[(..., *[None] * (y.dim() - 2))]
