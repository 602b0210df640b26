"""What a plan should be doubted for, and what nothing here can compress: lines for its notes.

Decisions are made by the error of each weight. Where that error is large, or says little about what the network
loses, the notes of the plan say so, and what would help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ttcompress.errors import shortlist
from ttcompress.layers.spec import Convolution, Replaceable
from ttcompress.networks.matrices import Weights
from ttcompress.planning.selection import LEFT_OUT_MARK, Layer, class_name
from ttcompress.records.common import WARNING
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan

FADED = 0.98
"""Relative error at which a layer has a fifth of its norm left."""
NORMED, NORMED_IN_ALL = 0.75, 4.0
"""Largest relative error of a layer under a batch norm, and largest sum of their squares, without a warning.

Published ResNet-20 and ResNet-32 lose 4 to 7 points at sums of 2.4 and 3.5, 26 and 46 points at 4.1 and 6.6."""
MUCH = 0.2
"""Share of the parameters that is worth a note if nothing here can compress it."""
WORTH_NAMING = 0.01
"""Share of the parameters of a kind of layer that is named."""


# -------------------------------------------------------------------------------------------------------------- doubts


def doubted(plan: CompressionPlan, normed_layers: Sequence[str], is_calibrated: bool) -> CompressionPlan:
    """The plan with warnings among its notes that fit its errors, in the place of those that it had.

    Args:
        normed_layers: those whose outputs a batch norm takes.
        is_calibrated: errors are those of outputs, not of weights.
    """
    others = [note for note in plan.notes if not note.startswith(WARNING)]
    warnings = _warnings(plan, normed_layers, is_calibrated)
    return replace(plan, notes=(*others, *warnings))


def _warnings(plan: CompressionPlan, normed_layers: Sequence[str], is_calibrated: bool) -> Iterator[str]:
    errors = {layer.fqn: _error(layer, is_calibrated) for layer in plan.layers}
    advice = _advice(plan, is_calibrated)

    faded = [fqn for fqn, error in errors.items() if error > FADED]
    if faded:
        verb = "keeps" if len(faded) == 1 else "keep"
        what = "output" if is_calibrated else "weight"
        yield f"{WARNING}{shortlist(faded, 3)} {verb} under a fifth of the norm of the {what}; {advice}"

    normed = [errors[fqn] for fqn in normed_layers if fqn in errors]
    squares = sum(error**2 for error in normed)
    if not is_calibrated and normed and (max(normed) > NORMED or squares > NORMED_IN_ALL):
        yield (
            f"{WARNING}a batch norm follows {len(normed)} of these layers and scales what is left of their outputs up "
            f"again: weight errors of up to {max(normed):.2f} do not tell how much the network loses; {advice}"
        )


def _error(layer: LayerPlan, is_calibrated: bool) -> float:
    """The relative error that counts, 0 where none is known."""
    if is_calibrated:
        measured = [*layer.output_error.values()][-1:] if layer.output_error else []
    else:
        measured = [] if layer.relative_error is None else [layer.relative_error]
    return next(iter(measured), layer.predicted_error or 0.0)


def _advice(plan: CompressionPlan, is_calibrated: bool) -> str:
    ways = [] if is_calibrated else ["calibrate on images (--calib)"]
    ways.append("compress less")

    left_out = [kept for kept in plan.kept if kept.kind and kept.reason.endswith(LEFT_OUT_MARK)]
    count = sum(kept.params for kept in left_out)
    if count > WORTH_NAMING * plan.params_before:
        share = f"{count:,} of {plan.params_before:,} parameters, which others then need not give"
        ways.append(f"add {including(left_out)} ({share})")
    return "what helps: " + ", or ".join(ways)


def including(layers: Sequence[KeptParameter | Layer]) -> str:
    """The options that add layers to the default."""
    names = [kept.fqn for kept in layers]
    options = " ".join(f"--include +{name}" for name in names[:3])
    return options + (" and so on" if len(names) > 3 else "")


def find_normed_layers(model: nn.Module) -> list[str]:
    """Layers whose outputs a batch norm takes, as far as the order of the modules tells."""
    found = []
    fqn, outputs = "", 0
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and fqn and module.num_features == outputs:
            found.append(fqn)
        if isinstance(module, nn.Linear | Convolution):
            fqn, outputs = name, _outputs(module)
        elif not any(module.children()):
            fqn, outputs = "", 0
    return found


def _outputs(module: nn.Linear | Convolution) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


# ------------------------------------------------------------------------------------------------ what nothing reaches


def out_of_reach(model: nn.Module, layers: Sequence[Layer]) -> str:
    """What holds the parameters that nothing here can compress, by kind, the most first: `LSTM 626,688`."""
    able = {layer.weight_name for layer in layers if not layer.obstacle}
    return _listed(_by_kind(model, able), sum(parameter.numel() for parameter in model.parameters()))


def out_of_reach_note(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """A note where that is much of the network."""
    able = {layer.weight_name for layer in layers if not layer.obstacle}
    total = sum(parameter.numel() for parameter in model.parameters())
    kinds = _by_kind(model, able)

    share = sum(kinds.values()) / max(1, total)
    if share < MUCH:
        return []
    return [f"{100 * share:.0f} % of the parameters cannot be compressed here: {_listed(kinds, total)}"]


def _listed(kinds: Counter[str], total: int) -> str:
    named = [f"{kind} {count:,}" for kind, count in kinds.most_common() if count >= WORTH_NAMING * total]
    return shortlist(named)


def _by_kind(model: nn.Module, able: Collection[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        layer, _, own_name = name.rpartition(".")
        if own_name == "bias" and f"{layer}.weight" in able:
            found["biases"] += parameter.numel()
        elif name not in able:
            found[_kind(model, name)] += parameter.numel()
    return found


def _kind(model: nn.Module, name: str) -> str:
    """What a parameter belongs to, as its user calls it."""
    if isinstance(model, Weights):
        return model.kept_reason(name)

    owner = name.rpartition(".")[0]
    layer, of_parametrization, _ = owner.partition(".parametrizations.")
    module = model.get_submodule(layer if of_parametrization else owner)
    if isinstance(module, Convolution) and module.groups != 1:
        return f"{class_name(module)} with groups"
    is_computed = parametrize.is_parametrized(module) or not isinstance(
        getattr(module, "weight", None), nn.Parameter
    )
    if isinstance(module, Replaceable) and is_computed:
        return f"{class_name(module)} whose weight is computed"

    # The projection of an attention is a Linear of its own.
    above = owner.rpartition(".")[0]
    around = model.get_submodule(above)
    return class_name(around if isinstance(around, nn.MultiheadAttention) else module)
