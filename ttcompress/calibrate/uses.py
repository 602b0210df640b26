"""Where the inputs and outputs of a weight can be seen: at the modules that multiply by it, or look rows up in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import Call, batched, hooked, kernel_gradient, layer_inputs
from ttcompress.layers.spec import has_inputs_first
from ttcompress.networks.running import NetworkInput, call, device_of, placed
from ttcompress.records.layers import LayerSpec
from ttcompress.records.plan import weight_name

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip
PRODUCTS = (nn.Linear.forward, *(kind.forward for kind in CONVOLUTIONS))
ATTENTION = nn.MultiheadAttention.forward
PROJECTED = {"in_proj_weight": 0, "q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
"""Weights of attention, and which of its inputs (query, key, value) each multiplies."""


class Kind(StrEnum):
    """How a module uses a weight."""

    PRODUCT = "product"
    """What goes in is multiplied by it, and comes out."""
    LOOKUP = "lookup"
    """What goes in are indices of its rows, which come out."""
    PROJECTION = "projection"
    """What goes into an attention is multiplied by it, and does not come out."""
    ATTENDED = "attended"
    """What attention makes of its inputs is multiplied by it, and comes out."""


@dataclass(frozen=True)
class Use:
    """A module at which a weight is seen: what goes in there, and what comes out.

    `swapped` where what the module puts out runs along the inputs of the weight as it is decomposed: an output
    layer that is tied to a table. `argument` says which input of the module counts. `bias` is the name of the
    vector that is added to the product.
    """

    fqn: str
    kind: Kind
    swapped: bool = False
    argument: int = 0
    bias: str = ""

    @property
    def shows_outputs(self) -> bool:
        """Whether gradients at what comes out of the module are those at the product."""
        return self.kind is not Kind.PROJECTION

    def inputs(
        self, module: nn.Module, call: Call, offset: int, geometry: nn.Module | None = None
    ) -> tuple[Tensor, int]:
        """What the weight multiplies, as columns (size, rows), and how many positions an image has; or indices.

        `geometry` is the dense module, where that which runs is in its place.
        """
        if self.kind is Kind.LOOKUP:
            return call.first, max(1, call.first[0].numel())
        if self.kind is Kind.PROJECTION:
            return layer_inputs(None, call.argument(self.argument, ("query", "key", "value")))
        if self.kind is Kind.ATTENDED:
            return layer_inputs(None, attended(module, call))
        return layer_inputs(geometry or module, call.first, offset)

    def weight_gradients(
        self, module: nn.Module, call: Call, inputs: Tensor, gradient: Tensor, images: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The gradient of the weight for each image, (out, in window), and the sum (out) of that at what comes out.

        For a lookup there are columns only of the rows that are looked up, and no window. Where images are not along the
        first axis, the batch counts as one image.

        Args:
            inputs: those of `inputs`.
            gradient: that at what comes out of the module; channels may be others, and fewer, than the module has.
        """
        given = call.first.detach()
        of_one: Callable[[Tensor, Tensor], Tensor]
        if isinstance(module, nn.modules.conv._ConvNd):
            # The inputs are those at some of the positions.
            given = batched(module, given)
            ours, theirs, of_one = given, batched(module, gradient), partial(kernel_gradient, module)
        elif self.kind is Kind.LOOKUP:
            ours, theirs, of_one = inputs.flatten(), gradient.flatten(0, -2), _gradient_of_rows
        else:
            ours, theirs, of_one = inputs.T, gradient.flatten(0, -2), _gradient_of_product

        count = images if len(given) == images else 1
        for x, g in zip(ours.chunk(count), theirs.chunk(count), strict=True):
            yield of_one(x, g), g.transpose(0, 1).flatten(1).sum(1)


def _gradient_of_rows(indices: Tensor, gradient: Tensor) -> Tensor:
    rows, place = torch.unique(indices, return_inverse=True)
    return gradient.new_zeros(len(rows), gradient.shape[1]).index_add_(0, place, gradient).T


def _gradient_of_product(inputs: Tensor, gradient: Tensor) -> Tensor:
    return gradient.T @ inputs


@dataclass(frozen=True)
class Run:
    """A module as it ran: an attention with one input for all, or another; or as the layer of torch that it derives from."""

    is_self_attention: bool = False
    is_product: bool = False


def uses_of(
    model: nn.Module,
    fqn: str,
    spec: LayerSpec,
    tied: Mapping[str, Sequence[str]],
    ran: Mapping[str, Run],
) -> list[Use]:
    """The modules at which a weight is seen, if all that have it are such and run.

    Others may do anything with it: recurrent modules, those with a forward of their own.

    Args:
        tied: as of `tied_names`.
        ran: as of `modules_run`.
    """
    name = weight_name(fqn, spec.parameter)
    # A module may have several names, and is to be watched once.
    owners = {model.get_submodule(each.rpartition(".")[0]): each for each in (*tied.get(name, ()), name)}
    uses = [_use(model, each, spec, ran) for each in owners.values()]
    found = [use for use in uses if use is not None and use.fqn in ran]

    are_seen = len(found) == len(uses)
    in_attention = any(use.kind in (Kind.PROJECTION, Kind.ATTENDED) for use in found)
    return found if are_seen and not (len(uses) > 1 and in_attention) else []


def _use(model: nn.Module, name: str, spec: LayerSpec, ran: Mapping[str, Run]) -> Use | None:
    fqn, _, parameter = name.rpartition(".")
    module = model.get_submodule(fqn)
    if forward_of(module) is ATTENTION and parameter in PROJECTED:
        is_fused = parameter == "in_proj_weight"
        # Else a part of the weight multiplies each of the inputs.
        if is_fused and fqn in ran and not ran[fqn].is_self_attention:
            return None
        bias = "in_proj_bias" if is_fused else ""
        return Use(fqn, Kind.PROJECTION, argument=PROJECTED[parameter], bias=bias)

    outer, _, own = fqn.rpartition(".")
    if own == "out_proj" and forward_of(model.get_submodule(outer)) is ATTENTION and parameter == "weight":
        return Use(outer, Kind.ATTENDED, bias="bias")

    runs = forward_of(module)
    is_product = runs in PRODUCTS or (fqn in ran and ran[fqn].is_product)
    swapped = has_inputs_first(module) != spec.transposed
    if parameter == "weight" and runs is nn.Embedding.forward:
        return Use(fqn, Kind.LOOKUP, swapped)
    # A group sees some of the inputs only.
    if parameter == "weight" and is_product and getattr(module, "groups", 1) == 1:
        return Use(fqn, Kind.PRODUCT, swapped, bias="bias")
    return None


def forward_of(module: nn.Module) -> Any:
    """The function that runs it; a subclass or somebody's own object may have another than its class of torch."""
    return None if "forward" in vars(module) else type(module).forward


@torch.no_grad()
def attended(module: Any, call: Call) -> Tensor:
    """What the output projection of an attention multiplies: its output with the identity in the place of that."""
    own = module._modules["out_proj"]
    size = module.embed_dim
    identity = nn.Linear(size, size, bias=False)
    identity.weight = nn.Parameter(torch.eye(size).to(own.weight))
    module._modules["out_proj"] = identity
    try:
        # Past its hooks.
        output, _ = type(module).forward(module, *call.given, **call.named)
    finally:
        module._modules["out_proj"] = own
    return output  # type: ignore[no-any-return]


def _is_product(module: nn.Module, call: Call) -> bool:
    """Whether a layer with a forward of its own comes to what the layer of torch that it derives from does."""
    kinds: list[Any] = [kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(module, kind)]
    if not kinds or forward_of(module) in PRODUCTS:
        return bool(kinds)
    given, named = call.given, call.named
    own = module.forward(*given, **named)
    try:
        plain = kinds[0].forward(module, *given, **named)
    except (RuntimeError, TypeError):
        return False
    return isinstance(own, Tensor) and own.shape == plain.shape and torch.allclose(own, plain)


def parameter_named(model: nn.Module, fqn: str, spec: LayerSpec) -> Tensor:
    """The parameter of a weight."""
    return model.get_parameter(weight_name(fqn, spec.parameter))


def around_weight(fqn: str, spec: LayerSpec) -> list[str]:
    """The module that has a weight and those around it, from the inside out."""
    owner = weight_name(fqn, spec.parameter).rpartition(".")[0]
    names = [owner]
    while owner:
        owner = owner.rpartition(".")[0]
        names.append(owner)
    return names


@torch.no_grad()
def modules_run(model: nn.Module, names: Iterable[str], inputs: NetworkInput) -> dict[str, Run]:
    """Those of the modules that run for a batch, in that order."""
    found: dict[str, Run] = {}

    def see(name: str, module: nn.Module, call: Call) -> None:
        if forward_of(module) is not ATTENTION:
            so_far = found.get(name, Run(is_product=True))
            found[name] = Run(is_product=so_far.is_product and _is_product(module, call))
            return
        query, key, value = (call.argument(k, ("query", "key", "value")) for k in range(3))
        is_self = query is key and key is value
        before = found.get(name)
        found[name] = Run(is_self and (before is None or before.is_self_attention))

    with hooked(model, names, see):
        call(model, placed(inputs, device_of(model)))
    return found
