"""Shapes and geometries of the layers that can take TT form."""

from __future__ import annotations

from dataclasses import dataclass

from ttcompress.tt.shapes import Tensorization, is_swept


@dataclass(frozen=True)
class LinearSpec:
    """Shape of a fully-connected layer, attributes as in torch.nn.Linear."""

    in_features: int
    out_features: int
    bias: bool

    kind = "linear"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_features, in_features)."""
        return (self.out_features, self.in_features)


@dataclass(frozen=True)
class ConvSpec:
    """Shape and geometry of a 2-d convolution with groups=1, attributes as in torch.nn.Conv2d."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    padding_mode: str = "zeros"
    bias: bool = True

    kind = "conv2d"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels, kh, kw)."""
        return (self.out_channels, self.in_channels, *self.kernel_size)


LayerSpec = LinearSpec | ConvSpec


def executions(spec: LayerSpec, tensorization: Tensorization) -> tuple[str, ...]:
    """The ways a layer can run: by choice, by its TT-cores (a `chain` of convolutions or a contraction), or dense."""
    return ("auto", "contract" if is_swept(spec.weight_shape, tensorization) else "chain", "dense")
