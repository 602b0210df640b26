"""Plans from and to files, edited or not, and taken over for a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ttcompress.errors import PlanError
from ttcompress.files.header import blaming
from ttcompress.files.output import replacing
from ttcompress.networks.surgery import check_plan
from ttcompress.planning.selection import find_layers
from ttcompress.recipe import FORM, TARGETS, Recipe
from ttcompress.records.plan import PLAN_SCHEMA, CompressionPlan, LayerPlan
from ttcompress.records.reading import parse_json, read_text
from ttcompress.tt.shapes import feasible_ranks


def clip_note(asked: Sequence[int], feasible: Sequence[int]) -> str:
    """What a plan says of TT-ranks that were too many, or nothing."""
    if feasible == asked:
        return ""
    return f"TT-ranks {inner_ranks(asked)} clipped to the feasible {inner_ranks(feasible)}"


def inner_ranks(tt_ranks: Sequence[int]) -> str:
    """TT-ranks without the ends, as users write them."""
    return ",".join(map(str, tt_ranks[1:-1])) or "(none)"


def adopt_plan(model: nn.Module, recipe: Recipe, plan: CompressionPlan) -> CompressionPlan:
    """A plan from a file, which may have been edited: TT-ranks clipped to feasible ones, errors forgotten.

    Raises:
        PlanError: another target beside it, another network, a layer that cannot be replaced, or one that would grow.
    """
    if any(getattr(recipe, name) is not None for group in TARGETS for name in group) or recipe.layers:
        raise PlanError("--plan states everything: leave out ranks, --eps, budgets and [[layers]]")
    if unused := recipe.given(*FORM, "dtype"):
        raise PlanError(f"--plan states everything: leave out {', '.join(unused)}")

    names = [layer.fqn for layer in plan.layers]
    own_types = {layer.fqn: layer.weight_dtype for layer in find_layers(model, names)}
    check_plan(model, plan)
    adopted = [_adopted(layer, own_types[layer.fqn]) for layer in plan.layers]
    return replace(plan.with_layers(adopted), multiply_adds=None, latency=None)


def _adopted(layer: LayerPlan, weight_dtype: str) -> LayerPlan:
    clipped = feasible_ranks(layer.tensorization.sizes, layer.tt_ranks)
    note = clip_note(layer.tt_ranks, clipped) or layer.note

    # Errors and what running costs are those of the ranks before the file was edited, or of another network.
    layer = replace(layer, tt_ranks=clipped, note=note, weight_dtype=weight_dtype)
    layer = replace(layer, predicted_error=None, relative_error=None, output_error=None)

    if layer.params_after >= layer.params_before:
        after, before = layer.params_after, layer.params_before
        raise PlanError(f"{layer.fqn}: {after:,} parameters in TT form, {before:,} dense")
    return layer


def is_made_by(done: CompressionPlan, plan: CompressionPlan) -> bool:
    """Whether a plan from a file, with its TT-ranks clipped, is what was done."""
    asked = {}
    for layer in plan.layers:
        clipped = feasible_ranks(layer.tensorization.sizes, layer.tt_ranks)
        asked[layer.fqn] = layer.tensorization, clipped, layer.core_dtype

    made = {layer.fqn: (layer.tensorization, layer.tt_ranks, layer.core_dtype) for layer in done.layers}
    return made == asked


def write_plan(path: Path, plan: CompressionPlan) -> None:
    """Write an editable plan; the caller has seen to it that `path` may be written."""
    text = json.dumps({"schema": PLAN_SCHEMA, **plan.to_json()}, indent=2)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def read_plan(path: Path) -> CompressionPlan:
    """Read a plan, edited or not: counts are recomputed, TT-ranks clipped to feasible ones, with a note.

    Raises:
        PlanError: missing file, no JSON, another schema, or a field that is missing, wrong or does not fit its layer.
    """
    text = read_text(path, PlanError)
    try:
        data = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not a readable plan: {error}") from error

    if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
        raise PlanError(f"{path}: not a plan of schema {PLAN_SCHEMA!r}; `ttcompress plan -o` writes one")
    with blaming(path):
        return CompressionPlan.from_json(data)
