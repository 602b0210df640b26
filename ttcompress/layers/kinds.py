"""Layer classes by kind: a fixed table, since files name kinds and never classes."""

from __future__ import annotations

from ttcompress.layers.conv import CONV_LAYERS, TTConv
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.linear import TTLinear
from ttcompress.records.layers import EmbeddingSpec, LayerSpec, LinearSpec


def tt_layer(spec: LayerSpec) -> type[TTLinear] | type[TTEmbedding] | type[TTConv]:
    """The layer class of a kind: a fixed table, since files name kinds and never classes."""
    if isinstance(spec, EmbeddingSpec):
        return TTEmbedding
    return TTLinear if isinstance(spec, LinearSpec) else CONV_LAYERS[spec.kind]
