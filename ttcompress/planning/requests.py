"""What a recipe asks of each layer: tensorizations to consider, and TT-ranks where they are given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ttcompress.errors import PlanError, ShapeError, shortlist
from ttcompress.planning.plan_file import clip_note, inner_ranks
from ttcompress.planning.selection import ADDING, Layer, matches, require_match, why_each
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.records.layers import EmbeddingSpec
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.decompose import smallest_eps
from ttcompress.tt.shapes import FORMATS, Tensorization, feasible_ranks, tensorize_shape

OF_WINDOWS = ("chain", "naive")
"""Formats that are another one without a window."""


@dataclass(frozen=True)
class LayerRequest:
    """One layer to compress: tensorizations to consider, and TT-ranks where they are given by hand."""

    layer: Layer
    tensorizations: tuple[Tensorization, ...]
    ranks: int | tuple[int, ...] | None

    def planned(self, tensorization: Tensorization, tt_ranks: Sequence[int], **known: Any) -> LayerPlan:
        """The plan of the layer with this choice."""
        layer = self.layer
        return LayerPlan(layer.fqn, layer.spec, tensorization, tuple(tt_ranks), layer.weight_dtype, **known)


def layer_requests(layers: Sequence[Layer], recipe: Recipe, out_of_reach: str = "") -> list[LayerRequest]:
    """A request for every layer that does not stay dense; `out_of_reach` says what holds the other parameters.

    Raises:
        PlanError: a rule that asks for nothing, no layer at all, or modes for more than one.
        ShapeError: modes that do not fit a layer.
    """
    for rule in recipe.layers:
        _check_rule(rule, layers)
    _check_tables(layers, recipe)

    chosen = [layer for layer in layers if not layer.kept]
    if not chosen:
        why = why_each(layers) or "the network has no weight of two dimensions"
        held = f"; what cannot be compressed: {out_of_reach}" if out_of_reach else ""
        raise PlanError(f"no layer is left to compress ({why}{held}); choose some with --include")
    if recipe.in_modes and len(chosen) != 1:
        raise PlanError(
            f"--in-modes and --out-modes fit one layer, {len(chosen)} are selected: "
            "narrow --include, or give modes in the [[layers]] of a recipe"
        )
    return [_request(layer, recipe) for layer in chosen]


def _check_rule(rule: LayerRule, layers: Sequence[Layer]) -> None:
    require_match(rule.match, [layer.fqn for layer in layers])
    matched = [layer for layer in layers if matches(rule.match, layer.fqn)]
    if all(layer.kept for layer in matched):
        reasons = shortlist(dict.fromkeys(f"{layer.fqn}: {layer.kept}" for layer in matched))
        raise PlanError(f"[[layers]] {rule.match!r} matches only layers that stay dense ({reasons})")


def _check_tables(layers: Sequence[Layer], recipe: Recipe) -> None:
    """See that nobody asks for tables in a form of convolutions."""
    asked = [(pattern.removeprefix(ADDING), recipe.format) for pattern in recipe.include]
    asked += [(rule.match, rule.format) for rule in recipe.layers]
    for pattern, name in asked:
        named = [each for each in layers if any(matches(pattern, fqn) for fqn in each.names)]
        if name in OF_WINDOWS and named and all(map(is_table, named)):
            tables = shortlist(layer.fqn for layer in named)
            raise PlanError(
                f"format {name} is one of convolutions, {tables} a table that is looked up: it takes lowrank or matrix"
            )


def _request(layer: Layer, recipe: Recipe) -> LayerRequest:
    """The last rule that matches wins over the options for all layers."""
    general = LayerRule("*", recipe.format, recipe.in_modes, recipe.out_modes)
    matching = [rule for rule in recipe.layers if matches(rule.match, layer.fqn)]
    rule = matching[-1] if matching else general

    general_ranks = recipe.ranks if is_matrix(layer) else recipe.conv_ranks
    ranks = rule.ranks if rule.ranks is not None else general_ranks

    made = _tensorizations(layer, rule, _formats(layer, rule, recipe, ranks is not None))
    # Two formats may view a weight alike, as `chain` and `lowrank` a 1x1 convolution.
    distinct = {each.modes: each for each in made}
    return LayerRequest(layer, tuple(distinct.values()), ranks)


def _formats(layer: Layer, rule: LayerRule, recipe: Recipe, has_ranks: bool) -> tuple[str, ...]:
    stated = recipe.format if rule.format is None else rule.format
    if stated not in (None, "auto"):
        return (str(stated),)
    if rule.in_modes:
        return ("matrix",)
    if isinstance(layer.spec, EmbeddingSpec) and not has_ranks:
        # Rows from the cores of `matrix` take hundreds of times as long (docs/speed.md).
        return ("lowrank",)
    if has_ranks:
        # TT-ranks by hand belong to one format: each has another number of cuts.
        return ("matrix",) if is_matrix(layer) else ("chain",)
    return FORMATS


def _tensorizations(layer: Layer, rule: LayerRule, formats: Sequence[str]) -> list[Tensorization]:
    shape = layer.spec.view_shape
    out_modes, in_modes = rule.out_modes or None, rule.in_modes or None
    try:
        return [tensorize_shape(name, shape, out_modes, in_modes, layer.spec.groups) for name in formats]
    except ShapeError as error:
        raise ShapeError(f"{layer.fqn} {tuple(shape)}: {error}") from error


def planned_by_hand(request: LayerRequest, as_given: bool = False) -> LayerPlan | str:
    """The plan of a layer whose TT-ranks are given, or why it stays dense.

    One number is a cap; a list, where there is no weight to decompose (`as_given`), may be more than is
    feasible.
    """
    (tensorization,) = request.tensorizations
    ranks = request.ranks
    try:
        asked = tensorization.expand_ranks(ranks or 1)
    except ShapeError as error:
        raise ShapeError(f"{request.layer.fqn}: {error}") from error

    is_cap = isinstance(ranks, int)
    taken = asked if as_given and not is_cap else feasible_ranks(tensorization.sizes, asked)
    plan = request.planned(tensorization, taken, note=clip_note(asked, taken))
    if plan.params_after < plan.params_before:
        return plan
    return f"{tensorization.format} form with TT-ranks {inner_ranks(taken)} would not be smaller"


def is_table(layer: Layer) -> bool:
    """Whether rows of a weight are looked up."""
    return isinstance(layer.module, nn.Embedding | nn.EmbeddingBag)


def is_matrix(layer: Layer) -> bool:
    """Whether a weight has no window."""
    return len(layer.spec.view_shape) == 2


def rank_option(layer: Layer) -> str:
    """The option that gives TT-ranks to a layer of this kind."""
    return "--ranks" if is_matrix(layer) else "--conv-ranks"


def check_eps(eps: float, requests: Sequence[LayerRequest]) -> None:
    """See that every weight is precise enough for a relative accuracy.

    Raises:
        PlanError: one is not, with the least that is possible.
    """
    for request in requests:
        least = smallest_eps(request.layer.weight.dtype)
        if eps < least:
            raise PlanError(
                f"--eps must be at least {least:g} for the {request.layer.weight_dtype} weights, not {eps:g}"
            )
