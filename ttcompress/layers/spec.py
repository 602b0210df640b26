"""What a TT layer takes over from the dense layer that it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.records.layers import ConvSpec, EmbeddingSpec, LayerSpec, LinearSpec, Spec

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConvolution
Replaceable = nn.Linear | nn.Embedding | Convolution
"""Layers in whose place a TT layer can run."""


CONVOLUTIONS: dict[str, type[Any]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
"""Convolutions by kind."""


def layer_spec(module: Replaceable) -> LayerSpec:
    """Shape and geometry of a dense layer."""
    if isinstance(module, nn.Embedding):
        return EmbeddingSpec(
            module.num_embeddings, module.embedding_dim, module.padding_idx, module.scale_grad_by_freq
        )

    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return LinearSpec(module.in_features, module.out_features, bias)

    transposed = isinstance(module, TransposedConvolution)
    return ConvSpec(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=_whole(module.kernel_size),
        stride=_whole(module.stride),
        padding=module.padding if isinstance(module.padding, str) else _whole(module.padding),
        dilation=_whole(module.dilation),
        padding_mode=module.padding_mode,
        bias=bias,
        transposed=transposed,
        groups=module.groups,
        output_padding=_whole(module.output_padding) if transposed else (),
    )


FOREIGN_INPUTS_FIRST = ("Conv1D",)
"""Names of classes that other libraries have, whose weight (in, out) is multiplied from the right: GPT-2's Linear."""


def empty_layer(spec: LayerSpec) -> Replaceable:
    """A dense layer on the meta device."""
    # The fields of specs have the names of torch's arguments.
    arguments = dict(vars(spec))
    if isinstance(spec, LinearSpec):
        return nn.Linear(**arguments, device="meta")
    if isinstance(spec, EmbeddingSpec):
        # A table of its own would be drawn at random, for which torch loads a second of modules on this device.
        table = torch.empty(spec.num_embeddings, spec.embedding_dim, device="meta")
        return nn.Embedding(**arguments, _weight=table)

    if not arguments.pop("transposed"):
        del arguments["output_padding"]
    made: Replaceable = CONVOLUTIONS[spec.kind](**arguments, device="meta")
    return made


def has_inputs_first(module: nn.Module) -> bool:
    """Whether the weight of a module has its inputs first: tables that are looked up, transposed convolutions."""
    is_ours = isinstance(module, nn.Embedding | nn.EmbeddingBag | TransposedConvolution)
    return is_ours or type(module).__name__ in FOREIGN_INPUTS_FIRST


def viewed(weight: Tensor, spec: Spec) -> Tensor:
    """A weight as (out, in, window), with groups in front where there are several."""
    axis = 1 if spec.groups > 1 else 0
    blocks = weight.reshape(spec.groups, -1, *weight.shape[1:]) if axis else weight
    return blocks.transpose(axis, axis + 1) if spec.transposed else blocks


def unviewed(view: Tensor, spec: Spec) -> Tensor:
    """The weight of a view as its layer has it."""
    axis = 1 if spec.groups > 1 else 0
    blocks = view.transpose(axis, axis + 1) if spec.transposed else view
    return blocks.flatten(0, 1) if axis else blocks


def _whole(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
