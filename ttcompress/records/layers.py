"""Shapes and geometries of the layers that can take TT form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from ttcompress.errors import ShapeError
from ttcompress.records.common import Json, listed
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


class Spec(ABC):
    """What all kinds of weights have in common: their shape, and how that is viewed as (out, in, window)."""

    kind: ClassVar[str]
    bias = False
    parameter: str = "weight"
    """Its own name in its module."""
    transposed: bool = False
    """Whether the parameter has its inputs first."""
    groups: int = 1
    """Of channels, each with a weight of its own."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    def to_json(self) -> Json:
        """The `spec` of plans, reports and files."""
        return listed(self)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """(out, in), with the axes of the window behind: what is decomposed, in each group."""
        first, second, *window = self.weight_shape
        first //= self.groups
        return (second, first, *window) if self.transposed else (first, second, *window)


@dataclass(frozen=True)
class LinearSpec(Spec):
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
class WeightSpec(Spec):
    """A parameter of two or more dimensions of any module, which computes it from TT-cores and goes on as it is.

    `parameter` is its own name in the module; `transposed` tells that its inputs come first.
    """

    shape: tuple[int, ...]
    parameter: str = "weight"
    transposed: bool = False

    kind = "weight"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As in the module."""
        return self.shape


CONV_KINDS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
"""Of convolutions, by the names of torch.nn.functional."""


@dataclass(frozen=True)
class EmbeddingSpec(Spec):
    """Shape of a table that is looked up, attributes as in torch.nn.Embedding: a row for each index, its inputs."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    kind = "embedding"
    transposed = True

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(num_embeddings, embedding_dim)."""
        return (self.num_embeddings, self.embedding_dim)


@dataclass(frozen=True)
class ConvSpec(Spec):
    """Shape and geometry of a convolution in one to three dimensions, attributes as in torch.nn.

    What is left out is as torch has it by default. `output_padding` is of transposed convolutions only.

    >>> ConvSpec(8, 4, (3,), transposed=True).kind, ConvSpec(8, 4, (3, 3)).stride
    ('conv_transpose1d', (1, 1))
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    bias: bool = True
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            if getattr(self, name) == ():
                object.__setattr__(self, name, (usual,) * self.dims)

    @property
    def dims(self) -> int:
        """Dimensions of the window: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def kind(self) -> str:  # type: ignore[override]
        """Of CONV_KINDS."""
        return f"conv_transpose{self.dims}d" if self.transposed else f"conv{self.dims}d"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *window); transposed (in_channels, out_channels / groups, *window)."""
        first, second = self.out_channels, self.in_channels
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel_size)

    def to_json(self) -> Json:
        """As files have it: the kind tells whether it is transposed."""
        fields = super().to_json()
        del fields["transposed"]
        if not any(self.output_padding):
            del fields["output_padding"]
        if self.groups == 1:
            del fields["groups"]
        return fields


def cores_name(parameter: str) -> str:
    """What the cores of a parameter are called in its module."""
    return "cores" if parameter == "weight" else f"{parameter}_cores"


LayerSpec = LinearSpec | EmbeddingSpec | ConvSpec | WeightSpec


def executions(spec: LayerSpec, tensorization: Tensorization) -> tuple[Execution, ...]:
    """The executions that a layer has: `auto`, then the one by its TT-cores if it has one, then `dense`."""
    if isinstance(spec, WeightSpec):
        return (Execution.AUTO, Execution.DENSE)
    by_cores = Execution.CONTRACT if is_contracted(spec.view_shape, tensorization) else Execution.CHAIN
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
