"""Shapes and geometries of the layers that can take TT form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ttcompress.errors import ShapeError
from ttcompress.tt.shapes import Tensorization, is_contracted


class Execution(StrEnum):
    """How a layer runs: left to a cost model, or always in one of the three ways that give the same result."""

    AUTO = "auto"
    CONTRACT = "contract"
    """Inputs are contracted with the TT-cores one after the other."""
    CHAIN = "chain"
    """The TT-cores are convolutions, run one after the other."""
    DENSE = "dense"
    """The dense weight is rebuilt from the TT-cores."""

    # Printed as the text that users write and that files hold.
    __repr__ = str.__repr__


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


def executions(spec: LayerSpec, tensorization: Tensorization) -> tuple[Execution, Execution, Execution]:
    """The executions that a layer has: `auto`, then the one by its TT-cores, then `dense`."""
    by_cores = Execution.CONTRACT if is_contracted(spec.weight_shape, tensorization) else Execution.CHAIN
    return (Execution.AUTO, by_cores, Execution.DENSE)


def checked_execution(name: object, executions: Sequence[Execution]) -> Execution:
    """The execution of this name, which has to be one of a layer's.

    Raises:
        ShapeError: it is not.
    """
    for execution in executions:
        if execution == name:
            return execution
    raise ShapeError(f"execution must be one of {', '.join(executions)}, not {name!r}")
