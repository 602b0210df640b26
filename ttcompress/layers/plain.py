"""Stock layers in the place of a TT layer: what each kind can become, what that costs, and its weights.

A kind of layer needs a row in `FACTORS`, a function that lists what its TT-cores can become, and its torch class
in `layers/spec.py`; all else is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.layers.base import TTLayer
from ttcompress.layers.spec import CONVOLUTIONS, empty_layer, layer_spec, unviewed
from ttcompress.records.layers import CONV_KINDS, ConvSpec, EmbeddingSpec, Execution, LayerSpec, LinearSpec
from ttcompress.records.plain import StockLayer
from ttcompress.tt.contract import dense_weight, merge_all, merge_groups
from ttcompress.tt.cost import (
    BETWEEN,
    Calls,
    ContractionPlan,
    Cost,
    LayerCosts,
    Shape,
    Unit,
    contracted_shapes,
    contraction_plan,
)

LINEAR = 200_000
"""Multiply-adds that take as long as it takes to begin one more Linear on a CPU (docs/speed.md)."""


@dataclass(frozen=True)
class StockForm:
    """Stock layers one after the other, each with the weight that neighbouring TT-cores make together."""

    specs: tuple[LayerSpec, ...]
    bounds: tuple[int, ...]
    """Of the TT-cores of each layer."""
    is_mirrored: bool = False
    """Whether an input meets the last core first."""

    @property
    def is_dense(self) -> bool:
        """Whether it is the one layer that the TT layer stands for."""
        return len(self.specs) == 1

    def cost(self, pixels: int, unit: Unit) -> float:
        """What a call takes that reads so many rows or pixels, in multiply-adds of a device."""
        last, total = len(self.specs) - 1, Cost(0, 0)
        for index, spec in enumerate(self.specs):
            out_pixels = outputs_of(spec, pixels)
            if not isinstance(spec, EmbeddingSpec):
                calls = Calls(pixels, out_pixels)
                total += LayerCosts(spec.view_shape, calls, unit, spec.transposed, spec.groups).dense()
            if not isinstance(spec, ConvSpec):
                total += Cost(LINEAR, 0)
            elif index < last:
                # Counted twice already, as what one layer writes and the next one reads.
                total += Cost(0, (BETWEEN - 2) * out_pixels * spec.out_channels)
            pixels = out_pixels
        return float(unit.total(total))

    def build(self, layer: TTLayer, dtype: torch.dtype) -> nn.Module:
        """The layers, with their weights in this type."""
        cores = wide_cores(layer, dtype)
        if self.is_dense:
            weights = [unviewed(dense_weight(cores, layer.spec.view_shape), layer.spec)]
        else:
            ordered = _mirrored(cores) if self.is_mirrored else cores
            merged = [merge_all(ordered[first:last]) for first, last in pairwise(self.bounds)]
            weights = [_as_weight(core, spec) for core, spec in zip(merged, self.specs, strict=True)]

        made: list[nn.Module] = [empty_layer(spec) for spec in self.specs]
        for stock, weight in zip(made, weights, strict=True):
            stock.weight = trainable_as(layer, weight.to(dtype))
        if layer.bias is not None:
            made[-1].register_parameter("bias", copied_bias(layer, dtype))
        return made[0] if self.is_dense else nn.Sequential(*made)


def _mirrored(cores: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with its modes in the other order."""
    return [core.permute(4, 1, 2, 3, 0) for core in reversed(cores)]


def outputs_of(spec: LayerSpec, pixels: int) -> int:
    """Rows or pixels that a layer writes which reads so many."""
    if not isinstance(spec, ConvSpec):
        return pixels
    strides = prod(spec.stride)
    return pixels * strides if spec.transposed else pixels // strides


def _as_weight(core: Tensor, spec: LayerSpec) -> Tensor:
    """A core (r, m, n, w, s) maps r n channels to m s."""
    lead = core.shape[:-5]
    count = len(lead)
    order = [count + axis for axis in (1, 4, 0, 2, 3)]
    view = core.permute(*range(count), *order).reshape(*lead, *spec.view_shape)
    return unviewed(view, spec)


# ---------------------------------------------------------------------------------------- inputs met core by core


class ContractedLinear(nn.Module):
    """A Linear in the format `matrix`: two to four Linears without bias, with the axes turned between them.

    No row of stock layers computes it: each of its Linears sees one axis of the input, which is viewed as a tensor
    (Novikov et al. 2015, section 4), and the bias is of all outputs.

    Args:
        in_features: of the layer that it stands for.
        out_features: likewise.
        bias: likewise.
        groups: shapes (r, m, n, s) of the merged TT-cores.
        from_last: which end the input is contracted from.

    >>> import torch
    >>> layer = ContractedLinear(12, 6, True, [(1, 2, 3, 5), (5, 3, 4, 1)], from_last=True)
    >>> layer(torch.ones(7, 12)).shape, [tuple(step.weight.shape) for step in layer.steps]
    (torch.Size([7, 6]), [(15, 4), (2, 15)])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        groups: Sequence[Sequence[int]],
        from_last: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.groups = tuple(tuple(group) for group in groups)
        self.from_last = from_last
        self.padded = prod(n for _, _, n, _ in self.groups)
        self.padded_out = prod(m for _, m, _, _ in self.groups)

        self.views = self._views()
        shapes = [(n * s, r * m) if from_last else (r * n, m * s) for r, m, n, s in self._ordered()]
        self.steps = nn.ModuleList(
            nn.Linear(read, written, bias=False, device=device, dtype=dtype) for read, written in shapes
        )
        empty = torch.zeros(out_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)

    def _ordered(self) -> list[tuple[int, ...]]:
        return list(reversed(self.groups)) if self.from_last else list(self.groups)

    def _views(self) -> list[tuple[int, int]]:
        """The axis that each step contracts, and what follows it."""
        views = []
        tail = 1 if self.from_last else self.padded
        for r, m, n, s in self._ordered():
            if self.from_last:
                views.append((n * s, tail))
                tail *= m
            else:
                tail //= n
                views.append((r * n, tail))
        return views

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to (..., in_features)."""
        z = input.reshape(-1, self.in_features)
        if self.padded > self.in_features:
            z = functional.pad(z, (0, self.padded - self.in_features))
        for step, (size, tail) in zip(self.steps, self.views, strict=True):
            z = step(z.reshape(-1, size)) if tail == 1 else step(z.reshape(-1, size, tail).mT).mT

        y = z.reshape(-1, self.padded_out)[:, : self.out_features].reshape(
            *input.shape[:-1], self.out_features
        )
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Its shape."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


@dataclass(frozen=True)
class ContractedForm:
    """The format `matrix` of a Linear, as `ContractedLinear` has it."""

    shapes: tuple[Shape, ...]
    plan: ContractionPlan

    is_dense = False

    def cost(self, pixels: int, unit: Unit) -> float:
        """What a call takes that reads so many rows, in multiply-adds of a device."""
        read = sum(prod(shape) for shape in self.shapes)
        # Turning the axes takes as long to begin as the product itself.
        begun = 2 * self.plan.products(merged=True) * max(LINEAR, unit.product)
        return float(unit.total(self.plan.cost(pixels, merged=True) + Cost(begun, read)))

    def build(self, layer: TTLayer, dtype: torch.dtype) -> nn.Module:
        """The layer, with its weights in this type."""
        merged = merge_groups(wide_cores(layer, dtype), self.plan)
        out_features, in_features = layer.spec.view_shape
        groups = [(r, m, n, s) for r, m, n, _, s in (core.shape for core in merged)]
        has_bias = layer.bias is not None
        made = ContractedLinear(in_features, out_features, has_bias, groups, self.plan.from_last, "meta")

        ordered = reversed(merged) if self.plan.from_last else merged
        for step, core in zip(made.steps, ordered, strict=True):
            step.weight = trainable_as(layer, self._matrix(core).to(dtype))
        made.bias = copied_bias(layer, dtype)
        return made

    def _matrix(self, core: Tensor) -> Tensor:
        r, m, n, _, s = core.shape
        if self.plan.from_last:
            return core.reshape(r * m, n * s)
        return core[:, :, :, 0].permute(1, 3, 0, 2).reshape(m * s, r * n)


Form = StockForm | ContractedForm

# ------------------------------------------------------------------------------------------- what each kind can become


def _linear_factors(layer: TTLayer) -> Iterator[Form]:
    """Two Linears where some cut has all inputs on one side and all outputs on the other, else a contraction."""
    modes, spec = layer.tensorization, layer.spec
    out_features, in_features = spec.view_shape
    count = len(layer.cores)
    for is_mirrored in (False, True):
        if cut := two_matrices(layer, is_mirrored):
            rank = layer.tt_ranks[count - cut if is_mirrored else cut]
            specs = LinearSpec(in_features, rank, False), LinearSpec(rank, out_features, spec.bias)
            yield StockForm(specs, (0, cut, count), is_mirrored)
            return

    if len(layer.cores) > 1:
        shapes = contracted_shapes(modes.core_shapes(layer.tt_ranks))
        yield ContractedForm(shapes, contraction_plan(shapes))


def two_matrices(layer: TTLayer, is_mirrored: bool = False) -> int:
    """The cut with all inputs before it and all outputs behind it, 0 where there is none."""
    modes = layer.tensorization
    outs, ins = modes.out_modes, modes.in_modes
    if is_mirrored:
        outs, ins = outs[::-1], ins[::-1]

    is_exact = (prod(outs), prod(ins)) == layer.spec.view_shape
    for cut in range(1, len(layer.cores)):
        if is_exact and prod(outs[:cut]) == prod(ins[cut:]) == 1:
            return cut
    return 0


def _embedding_factors(layer: TTLayer) -> Iterator[Form]:
    """A table of short rows, and a Linear that makes long ones of them."""
    spec = layer.spec
    assert isinstance(spec, EmbeddingSpec)
    if cut := two_matrices(layer):
        rank = layer.tt_ranks[cut]
        specs = replace(spec, embedding_dim=rank), LinearSpec(rank, spec.embedding_dim, False)
        yield StockForm(specs, (0, cut, len(layer.cores)))


def _conv_factors(layer: TTLayer) -> Iterator[Form]:
    """Convolutions where the input channels are in the first one, the output channels in the last."""
    spec = layer.spec
    assert isinstance(spec, ConvSpec)
    count = len(layer.cores)
    cuts: list[tuple[int, ...]] = []
    if layer.tensorization.format == "chain":
        cuts = [(0, 1, 2, 3), (0, 1, 3), (0, 2, 3)]
    elif Execution.CHAIN in layer.executions:
        cuts = [(0, count - 1, count)]

    window = 1 if layer.tensorization.format == "chain" else 0
    for bounds in cuts:
        yield StockForm(tuple(_conv_specs(spec, layer.tt_ranks, bounds, window)), bounds)


def _conv_specs(
    spec: ConvSpec, tt_ranks: Sequence[int], bounds: tuple[int, ...], window: int
) -> Iterator[ConvSpec]:
    """Of the convolutions of these cores; the one with the core `window` has the geometry of the whole."""
    for first, last in pairwise(bounds):
        is_last = last == bounds[-1]
        channels = {
            "in_channels": spec.in_channels if first == 0 else spec.groups * tt_ranks[first],
            "out_channels": spec.out_channels if is_last else spec.groups * tt_ranks[last],
            "bias": spec.bias and is_last,
        }
        if first <= window < last:
            yield replace(spec, **channels)  # type: ignore[arg-type]
        else:
            yield ConvSpec(**channels, kernel_size=(1,) * spec.dims, groups=spec.groups)  # type: ignore[arg-type]


FACTORS: Mapping[str, Callable[[TTLayer], Iterator[Form]]] = {
    "linear": _linear_factors,
    "embedding": _embedding_factors,
    **dict.fromkeys(CONV_KINDS, _conv_factors),
}
"""By kind, what the TT-cores of a layer can become."""


def plain_forms(layer: TTLayer) -> list[Form]:
    """What a layer can become: the dense layer, then what its cores are by themselves.

    An execution that is forced leaves the forms that are like it.
    """
    dense = StockForm((layer.spec,), (0, len(layer.cores)))
    if layer.execution is Execution.DENSE:
        return [dense]
    factors = list(FACTORS[layer.spec.kind](layer))
    # A dense table is looked up faster, but is what the compression was to spare.
    if (layer.execution is not Execution.AUTO or layer.is_table) and factors:
        # In the order of their cores, none merged with another kind of core.
        return factors[:1]
    return [dense, *factors]


# -------------------------------------------------------------------------------------------------------------- weights


def wide_cores(layer: TTLayer, dtype: torch.dtype) -> list[Tensor]:
    """Its cores, wide enough to be multiplied with each other before they are rounded to a type."""
    wide = torch.promote_types(dtype, torch.float32)
    return [core.detach().to(wide) for core in layer.own_cores()]


def trainable_as(layer: TTLayer, weight: Tensor) -> nn.Parameter:
    """A weight that shares no memory, and is trained where the cores are."""
    trains = any(core.requires_grad for core in layer.cores)
    return nn.Parameter(weight.clone(memory_format=torch.contiguous_format), trains)


def copied_bias(layer: TTLayer, dtype: torch.dtype) -> nn.Parameter | None:
    """The bias of a layer, if it has one."""
    bias = layer.bias
    return None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True), bias.requires_grad)


# ----------------------------------------------------------------------------------------------------------- descriptions


CLASSES: Mapping[str, type[nn.Module]] = {
    **{each.__name__: each for each in (nn.Linear, nn.Embedding, *CONVOLUTIONS.values())},
    "ContractedLinear": ContractedLinear,
}
"""What descriptions may name."""


def described(plain: nn.Module) -> list[StockLayer]:
    """Classes and arguments of what stands for one TT layer."""
    if isinstance(plain, nn.Sequential):
        return [layer for each in plain for layer in described(each)]
    if not isinstance(plain, ContractedLinear):
        return [StockLayer(type(plain).__name__, layer_spec(plain).to_json())]  # type: ignore[arg-type]

    arguments = {
        "in_features": plain.in_features,
        "out_features": plain.out_features,
        "bias": plain.bias is not None,
        "groups": [list(group) for group in plain.groups],
        "from_last": plain.from_last,
    }
    return [StockLayer("ContractedLinear", arguments)]


def from_description(layers: Sequence[StockLayer]) -> nn.Module:
    """The layers that were described, on the meta device."""
    made = [CLASSES[layer.name](**layer.arguments, device="meta") for layer in layers]
    return made[0] if len(made) == 1 else nn.Sequential(*made)
