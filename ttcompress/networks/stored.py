"""What a file stores of a network: its tensors by name, tied ones once, cores as codes or numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.tensors import state_sha256
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt.quantize import dequantize, quantize


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Names that stand for a parameter which has another name before, and that name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def stored_tensors(
    model: nn.Module, original: Mapping[str, Tensor], plan: CompressionPlan | None = None
) -> dict[str, Tensor]:
    """What a file holds: the state dict without tied copies, and without counters that the original lacked.

    With a plan, the cores are as it says that they are stored.
    """
    tied = tied_parameters(model)
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Checkpoints from before torch 0.4.1 have no such counters.
        is_added = name.endswith("num_batches_tracked") and name not in original
        if name not in tied and not is_added:
            tensors[name] = tensor

    for layer in plan.layers if plan else ():
        cores = [tensors[name] for name in layer.core_shapes]
        tensors |= stored_cores(cores, layer)
    return tensors


def stored_sha256(stored: Mapping[str, Tensor]) -> str:
    """The digest by which a report knows the network that it is of.

    Counters of batches are left out: they decide nothing in eval mode, and come and go with versions of torch.
    """
    return state_sha256({name: each for name, each in stored.items() if not name.endswith("num_batches_tracked")})


def stored_cores(cores: Sequence[Tensor], layer: LayerPlan) -> dict[str, Tensor]:
    """What a file holds of a weight, by name: its cores, and the scales of int8 ones."""
    if layer.scale_shapes:
        codes, scales = zip(*map(quantize, cores), strict=True)
        return dict(zip(layer.stored_shapes, (*codes, *scales), strict=True))
    return dict(zip(layer.core_shapes, cores, strict=True))


def core_values(tensors: Mapping[str, Tensor], layer: LayerPlan) -> dict[str, Tensor]:
    """The cores of a weight that a file holds, by name; int8 ones become the float32 numbers that they stand for.

    Raises:
        CheckpointError: see `check_cores`.
    """
    check_cores(tensors, layer)
    if not layer.scale_shapes:
        return {name: tensors[name] for name in layer.core_shapes}
    pairs = zip(layer.core_shapes, layer.scale_shapes, strict=True)
    return {core: dequantize(tensors[core], tensors[scales]) for core, scales in pairs}


def check_cores(tensors: Mapping[str, Tensor], layer: LayerPlan) -> None:
    """See that a file holds what its plan says of a weight.

    Raises:
        CheckpointError: tensors that are missing, or that have another type or shape.
    """
    wrong = [name for name, shape in layer.stored_shapes.items() if not _fits(tensors.get(name), name, shape, layer)]
    if wrong:
        raise CheckpointError(f"lacks {shortlist(wrong)}, or they have another shape or type")


def _fits(tensor: Tensor | None, name: str, shape: tuple[int, ...], layer: LayerPlan) -> bool:
    if tensor is None or tuple(tensor.shape) != shape:
        return False
    is_code = name in layer.core_shapes and bool(layer.scale_shapes)
    return tensor.dtype == torch.int8 if is_code else tensor.is_floating_point()
