"""A file of a module in memory, with a report of what the module is now."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ttcompress.commands.reports import saved_bytes
from ttcompress.errors import PlanError, shortlist
from ttcompress.files.output import check_output
from ttcompress.files.tensors import tensor_bytes
from ttcompress.files.writing import write_safetensors
from ttcompress.networks.stored import file_metadata, stored_sha256, stored_tensors
from ttcompress.networks.weights import TTPart, tied_weights, tt_parts
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Report
from ttcompress.version import __version__

CHANGED = "changed since it was compressed: errors and accuracy of before are not of this network"


def save_module(
    module: nn.Module, report: Report, path: str | os.PathLike[str], force: bool = False
) -> Report:
    """Write a module and return the report that the file has.

    That is the report given where the module still is what it describes. Else, as after a training in one's own loop,
    what was measured before is left out, and types, parameters and bytes are those of the module.

    Raises:
        CheckpointError: the file exists and `force` is not set, or its folder does not.
        PlanError: the TT layers of the module are not those of the report.
    """
    check_output(Path(path), force)
    _check_layers(module, report.plan)

    state = module.state_dict()
    plan = _plan_of(module, report.plan)
    stored = stored_tensors(module, state, plan)
    if plan != report.plan or stored_sha256(stored) != report.tensors_sha256:
        report = _changed(module, report, plan, stored)
    write_safetensors(Path(path), stored, file_metadata(report, stored))
    return report


def _check_layers(module: nn.Module, plan: CompressionPlan) -> None:
    planned, found = {layer.fqn: layer for layer in plan.layers}, tt_parts(module)
    wrong = [f"{fqn} is no TT layer" for fqn in planned if fqn not in found]
    wrong += [f"{fqn} is in TT form, the report has it dense" for fqn in found if fqn not in planned]
    for fqn in planned.keys() & found.keys():
        layer, now = planned[fqn], found[fqn]
        if (layer.spec, layer.tensorization, layer.tt_ranks) != (now.spec, now.tensorization, now.tt_ranks):
            wrong.append(f"{fqn} has other modes or TT-ranks")
    if wrong:
        raise PlanError(f"the report is of another module: {shortlist(sorted(wrong))}")


def _plan_of(module: nn.Module, former: CompressionPlan) -> CompressionPlan:
    """The same plan with the types and executions that the layers have now, and the parameters that are there."""
    layers = [_layer_now(layer, found) for layer in former.layers if (found := tt_parts(module)[layer.fqn])]
    in_cores = {id(core) for layer in tt_parts(module).values() for core in layer.cores}
    known = {kept.name: kept for kept in former.kept}

    kept = []
    for name, parameter in module.named_parameters():
        if id(parameter) not in in_cores:
            before = known.get(name, KeptParameter(name, 0, "added after it was compressed"))
            kept.append(replace(before, params=parameter.numel()))

    # In the order of the plan, as far as it goes: equal plans are then equal.
    order = {name: place for place, name in enumerate(known)}
    kept.sort(key=lambda each: order.get(each.name, len(order)))
    return replace(former, layers=tuple(layers), kept=tuple(kept))


def _layer_now(layer: LayerPlan, found: TTPart) -> LayerPlan:
    held = str(found.cores[0].dtype).removeprefix("torch.")
    # Eight-bit codes are made when the file is written; in memory they are the numbers that they stand for.
    stored = layer.stored_dtype if layer.stored_dtype == "int8" else held
    core_dtype = layer.core_dtype if stored == layer.stored_dtype else stored
    return replace(layer, core_dtype=core_dtype, execution=found.execution)


def _changed(
    module: nn.Module, report: Report, plan: CompressionPlan, stored: Mapping[str, Tensor]
) -> Report:
    """What is still true of a module that is another than the one that was measured."""
    forgotten = [
        replace(layer, predicted_error=None, relative_error=None, output_error=None) for layer in plan.layers
    ]
    notes = plan.notes if CHANGED in plan.notes else (*plan.notes, CHANGED)
    saved = sum(map(saved_bytes, plan.layers))
    bytes_after = tensor_bytes(stored)
    return replace(
        report,
        plan=replace(plan, layers=tuple(forgotten), notes=notes, latency=None),
        version=__version__,
        bytes_before=bytes_after + saved,
        bytes_after=bytes_after,
        tied=tied_weights(module),
        accuracy=None,
        calibration=None,
        search=(),
        finetuning=None,
        bench=None,
        prediction=None,
        tensors_sha256=stored_sha256(stored),
    )
