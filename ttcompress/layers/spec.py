"""What a TT layer takes over from the dense layer that it replaces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ttcompress.records.layers import ConvSpec, EmbeddingSpec, LayerSpec, LinearSpec, Spec


def layer_spec(module: nn.Linear | nn.Embedding | nn.Conv2d) -> LayerSpec:
    """Shape and geometry of a dense layer."""
    if isinstance(module, nn.Embedding):
        return EmbeddingSpec(
            module.num_embeddings, module.embedding_dim, module.padding_idx, module.scale_grad_by_freq
        )

    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return LinearSpec(module.in_features, module.out_features, bias)

    return ConvSpec(
        in_channels=module.in_channels,
        out_channels=module.out_channels,
        kernel_size=_pair(module.kernel_size),
        stride=_pair(module.stride),
        padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
        dilation=_pair(module.dilation),
        padding_mode=module.padding_mode,
        bias=bias,
    )


INPUTS_FIRST = (nn.Embedding, nn.EmbeddingBag, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOREIGN_INPUTS_FIRST = ("Conv1D",)
"""Names of classes that other libraries have, whose weight (in, out) is multiplied from the right: GPT-2's Linear."""


def has_inputs_first(module: nn.Module) -> bool:
    """Whether the weight of a module has its inputs first, as tables and transposed convolutions have."""
    return isinstance(module, INPUTS_FIRST) or type(module).__name__ in FOREIGN_INPUTS_FIRST


def viewed(weight: Tensor, spec: Spec) -> Tensor:
    """A weight as (out, in, window), or back from there: its first two axes change places where inputs come first."""
    return weight.transpose(0, 1) if spec.transposed else weight


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[1])
