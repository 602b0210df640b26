"""Files of `--arch none`, which know weights by name and shape alone, in the network that the checkpoint came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from ttcompress.files.checkpoint import PREFIXES
from ttcompress.layers.spec import layer_spec
from ttcompress.networks.replaceable import is_plain, obstacles, owners_of, shared_otherwise
from ttcompress.records.layers import LayerSpec, WeightSpec
from ttcompress.records.plan import LayerPlan, weight_name
from ttcompress.records.report import Report


def is_by_name(report: Report) -> bool:
    """Whether a file was written without the architecture: no sum over the tensors of a network was then taken."""
    return report.architecture is None and bool(report.source) and "state_sha256" not in report.source


def without_prefixes(report: Report, tensors: Mapping[str, Tensor]) -> tuple[Report, dict[str, Tensor]]:
    """The same without what DataParallel and torch.compile put before all names."""
    named = dict(tensors)
    # Twice, for they may be nested in either order.
    for prefix in PREFIXES * 2:
        report, named = _without(prefix, report, named)
    return report, named


def without_first_part(
    report: Report, tensors: Mapping[str, Tensor]
) -> tuple[Report, dict[str, Tensor]] | None:
    """The same without the first part of the names where all share one, as trainers that wrap a network write."""
    prefixes = {first + dot for first, dot, _ in (name.partition(".") for name in tensors)}
    if len(prefixes) != 1 or not (prefix := prefixes.pop()).endswith("."):
        return None
    shorter, named = _without(prefix, report, dict(tensors))
    return None if shorter is report else (shorter, named)


def _without(prefix: str, report: Report, tensors: dict[str, Tensor]) -> tuple[Report, dict[str, Tensor]]:
    plan = report.plan
    names = [*tensors, *report.tied, *(layer.fqn for layer in plan.layers)]
    if not all(name.startswith(prefix) and name != prefix for name in names):
        return report, tensors

    def shorter(name: str) -> str:
        return name.removeprefix(prefix)

    layers = tuple(replace(layer, fqn=shorter(layer.fqn)) for layer in plan.layers)
    kept = tuple(replace(each, name=shorter(each.name)) for each in plan.kept)
    tied = {shorter(alias): shorter(name) for alias, name in report.tied.items()}
    report = replace(report, plan=replace(plan, layers=layers, kept=kept), tied=tied)
    return report, {shorter(name): tensor for name, tensor in tensors.items()}


def fitted(report: Report, model: nn.Module) -> Report:
    """The report with the kinds of weights that the network has, and the names that share a weight there.

    A weight runs by its cores where its module is a plain layer that views it in the same way; any other module
    computes it from them.
    """
    reasons = obstacles(model)
    others = shared_otherwise(model, reasons)
    modules = dict(model.named_modules())
    layers = [
        replace(layer, spec=_fitted(layer, modules.get(layer.module_fqn), reasons, others))
        for layer in report.plan.layers
    ]

    tied = dict(report.tied)
    replaced = {layer.weight_name for layer in layers}
    for owners in owners_of(model).values():
        names = [f"{fqn}.{own}".removeprefix(".") for fqn, _, own in owners]
        for name in replaced.intersection(names):
            tied |= {alias: name for alias in names if alias != name}
    return replace(report, plan=report.plan.with_layers(layers), tied=tied)


def _fitted(
    layer: LayerPlan, module: nn.Module | None, reasons: Mapping[str, str], others: set[int]
) -> LayerSpec:
    own_name = layer.spec.parameter
    parameter = None if module is None else module._parameters.get(own_name)
    if module is None or parameter is None:
        return layer.spec  # Refused where plans are compared with networks.

    if is_plain(module, own_name) and layer.fqn not in reasons and id(parameter) not in others:
        spec = layer_spec(module)  # type: ignore[arg-type]
        if spec.weight_shape == layer.spec.weight_shape and spec.view_shape == layer.spec.view_shape:
            return spec
    return WeightSpec(layer.spec.weight_shape, own_name, layer.spec.transposed)


def buffers(report: Report, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of a file that are no parameters: networks may lack them, which make them anew."""
    parameters = {kept.name for kept in report.plan.kept}
    for layer in report.plan.layers:
        parameters |= {weight_name(layer.fqn, layer.spec.parameter), *layer.stored_shapes}
    return {name for name in tensors if name not in parameters and name not in report.tied}
