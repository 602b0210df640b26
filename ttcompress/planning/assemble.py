"""The plan of a whole network from what was decided about its layers: every parameter, replaced or kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.utils import parametrize

from ttcompress.networks.matrices import Weights
from ttcompress.planning.selection import CONVOLUTIONS, Layer, class_name
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan

Decisions = Mapping[str, LayerPlan | str]
"""By fqn: the plan of a layer, or the reason why it stays dense after all."""


def assemble(
    model: nn.Module, layers: Sequence[Layer], decisions: Decisions, notes: Sequence[str] = ()
) -> CompressionPlan:
    """Every parameter of the network, replaced or kept with the reason, so that totals add up."""
    decided = [decisions.get(layer.fqn) for layer in layers]
    plans = [plan for plan in decided if isinstance(plan, LayerPlan)]
    replaced = {plan.weight_name for plan in plans}
    dense = {
        layer.weight_name: (layer.kept or str(decision), layer.spec.kind, bool(layer.obstacle))
        for layer, decision in zip(layers, decided, strict=True)
    }

    kept = []
    for name, parameter in model.named_parameters():
        if name not in replaced:
            reason, kind, is_fixed = dense.get(name) or (_kept_reason(model, name), "", False)
            kept.append(KeptParameter(name, parameter.numel(), reason, kind, is_fixed))
    return CompressionPlan(tuple(plans), tuple(kept), tuple(notes))


def _kept_reason(model: nn.Module, name: str) -> str:
    """Why a parameter stays that is no weight of a layer that could be replaced."""
    if isinstance(model, Weights):
        return model.kept_reason(name)

    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    if own_name == "bias" and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return "bias"
    if isinstance(module, parametrize.ParametrizationList):
        layer = model.get_submodule(owner.rpartition(".parametrizations.")[0])
        return f"{class_name(layer)}, {owner.rpartition('.')[2]} is computed by a parametrization"
    return class_name(module)
