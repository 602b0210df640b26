"""What a file stores of a network: its tensors by name, tied ones once, cores as codes or numbers."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.compressed import check_size, check_stored, core_infos, layout, open_stored
from ttcompress.files.header import blaming
from ttcompress.files.tensors import is_finite, state_sha256, tensor_infos
from ttcompress.records.common import Json
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import Report
from ttcompress.tt.quantize import dequantize, quantize


def tied_parameters(model: nn.Module, known: Container[str] = ()) -> dict[str, str]:
    """Names that stand for a parameter which has another name before, and that name.

    Those that are `known`, as under which a file holds it, come before others.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    tied: dict[str, str] = {}
    for group in names.values():
        first = next((name for name in group if name in known), group[0])
        tied |= {name: first for name in group if name != first}
    return tied


def stored_tensors(
    model: nn.Module, original: Mapping[str, Tensor], plan: CompressionPlan | None = None
) -> dict[str, Tensor]:
    """What a file holds: the state dict without tied copies, and without counters that the original lacked.

    With a plan, the cores are as it says that they are stored.

    Raises:
        CheckpointError: a network without the layers of the plan.
    """
    planned = {name for layer in (plan.layers if plan else ()) for name in layer.core_shapes}
    tied = tied_parameters(model, planned)
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Checkpoints from before torch 0.4.1 have no such counters.
        is_added = name.endswith("num_batches_tracked") and name not in original
        if name not in tied and not is_added:
            tensors[name] = tensor

    for layer in plan.layers if plan else ():
        if missing := [name for name in layer.core_shapes if name not in tensors]:
            raise CheckpointError(f"the network lacks {shortlist(missing)}, which its report speaks of")
        cores = [tensors[name] for name in layer.core_shapes]
        tensors |= stored_cores(cores, layer)
    return tensors


def stored_sha256(stored: Mapping[str, Tensor]) -> str:
    """The digest by which a report knows the network that it is of.

    Counters of batches are left out: they decide nothing in eval mode, and come and go with versions of torch.
    """
    return state_sha256(
        {name: each for name, each in stored.items() if not name.endswith("num_batches_tracked")}
    )


def stored_cores(cores: Sequence[Tensor], layer: LayerPlan) -> dict[str, Tensor]:
    """What a file holds of a weight, by name: its cores, and the scales of int8 ones."""
    if layer.scale_shapes:
        if not all(map(is_finite, cores)):
            raise CheckpointError(f"{layer.fqn}: its cores hold NaN or Inf, which int8 cannot")
        codes, scales = zip(*map(quantize, cores), strict=True)
        return dict(zip(layer.stored_shapes, (*codes, *scales), strict=True))
    return dict(zip(layer.core_shapes, cores, strict=True))


def core_values(tensors: Mapping[str, Tensor], layer: LayerPlan) -> dict[str, Tensor]:
    """The cores of a weight that a file holds, by name; int8 ones become the float32 numbers that they stand for."""
    if not layer.scale_shapes:
        return {name: tensors[name] for name in layer.core_shapes}
    pairs = zip(layer.core_shapes, layer.scale_shapes, strict=True)
    return {core: dequantize(tensors[core], tensors[scales]) for core, scales in pairs}


def file_metadata(report: Report, tensors: Mapping[str, Tensor]) -> Json:
    """What a file with these tensors holds beside them: its report, and what shows that both belong together.

    Raises:
        CheckpointError: they do not, or a core holds NaN or Inf.
    """
    infos = tensor_infos(tensors)
    check_stored(report, infos)

    non_finite = [name for name in sorted(infos) if not is_finite(tensors[name])]
    _check_cores(report, non_finite)
    stated = {"non_finite": non_finite} if non_finite else {}
    return {**report.metadata(), "layout": layout(report, infos), **stated}


def read_stored(path: Path) -> tuple[Report, dict[str, Tensor]]:
    """The report and the tensors of a compressed file or folder, memory-mapped, checked against each other.

    Raises:
        CheckpointError: see `open_stored`; weights out of all proportion to the file; or NaN or Inf where the file
            does not say that there may be.
    """
    stored = open_stored(path)
    with blaming(path):
        check_size(stored.report, stored.infos)
        tensors = load_compressed(path)

        non_finite = [name for name, tensor in tensors.items() if not is_finite(tensor)]
        _check_cores(stored.report, non_finite)
        if wrong := sorted(set(non_finite) - set(stored.non_finite)):
            raise CheckpointError(
                f"holds NaN or Inf in {shortlist(wrong)}, which it did not when it was written"
            )
    return stored.report, tensors


def _check_cores(report: Report, non_finite: Sequence[str]) -> None:
    if wrong := sorted(core_infos(report).keys() & set(non_finite)):
        raise CheckpointError(f"holds NaN or Inf in {shortlist(wrong)}, of which no weight can be made")
