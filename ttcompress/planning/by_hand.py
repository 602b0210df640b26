"""TT-ranks given by hand that lose almost everything: which other format would not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from ttcompress.planning.allocate import within_budget
from ttcompress.planning.candidates import Candidate, Choice, LayerOptions
from ttcompress.planning.plan_file import inner_ranks
from ttcompress.planning.spectra import layer_spectra
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.shapes import FORMATS, feasible_ranks, tensorize_shape

POOR = 0.9
"""Relative error from which on another format is looked for."""
BETTER = 0.5
"""Share of that error that another format has at most to be named."""


def with_better_format(layer: LayerPlan, weight: Tensor) -> LayerPlan:
    """The plan of a decomposed layer, with a note where its TT-ranks lose too much and another format would not.

    Another format may have as many parameters, or else as large a TT-rank.
    """
    error = layer.relative_error or 0.0
    is_by_hand = layer.predicted_error is None
    if not is_by_hand or error <= POOR:
        return layer

    choices = list(_others(layer, weight))
    better = [choice for choice in choices if choice.relative_error <= BETTER * error]
    if not better:
        return layer

    # At no more parameters if that helps, else the least error.
    best = min(better, key=lambda choice: ((choice.params or 0) > layer.params_after, choice.relative_error))
    name = best.candidate.tensorization.format if best.candidate else ""
    note = (
        f"these TT-ranks miss {error:.4f} of the weight; format {name} with TT-ranks {inner_ranks(best.tt_ranks)} "
        f"would miss at most {best.relative_error:.4f} with {best.params:,} parameters"
    )
    return replace(layer, note="; ".join(filter(None, [layer.note, note])))


def _others(layer: LayerPlan, weight: Tensor) -> Iterator[Choice]:
    """The best choices of other formats with as many parameters, and those of as large a TT-rank."""
    shape = layer.spec.view_shape
    made = [tensorize_shape(name, shape) for name in FORMATS]
    distinct = {each.modes: each for each in made if each.modes != layer.tensorization.modes}
    others = list(distinct.values())

    spectra = layer_spectra(weight, others)
    for tensorization, each in zip(others, spectra.tensorizations, strict=True):
        candidate = Candidate(tensorization, each.cuts)
        options = LayerOptions(layer.params_before, (candidate,))
        if options.smallest().cost <= layer.params_after:
            yield from (choice for choice in within_budget([options], layer.params_after) if choice.candidate)

        same_rank = tensorization.expand_ranks(max(layer.tt_ranks))
        choice = candidate.choice(feasible_ranks(tensorization.sizes, same_rank))
        if options.pays(choice):
            yield choice
