"""Rows of tables that the calibration data never looks up: nothing says what they are for, yet they are to stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ttcompress.calibrate.layer_statistics import LayerStatistics, Statistics
from ttcompress.networks.weights import weight_of
from ttcompress.records.plan import CompressionPlan, LayerPlan

UNSEEN_LIMIT = 1.25
"""Error of all rows never seen together that is allowed, as a multiple of what TT-SVD of the weight leaves of them."""


def never_seen(statistics: LayerStatistics) -> Tensor | None:
    """The rows, as a mask over the inputs of the weight; None where it is no table, or all rows are seen."""
    if not statistics.unseen or not statistics.inputs.is_diagonal:
        return None
    mask = statistics.inputs.own == 0
    return mask if bool(mask.any()) else None


def error_of(weight: Tensor, fitted: Tensor, rows: Tensor) -> float:
    """Relative error of these rows of a table, as it is decomposed: (out, in)."""
    own = weight[:, rows.to(weight.device)]
    missed = own - fitted[:, rows.to(fitted.device)].to(own)
    norm = float(own.double().norm())
    return float(missed.double().norm()) / norm if norm else 0.0


@dataclass(frozen=True)
class Unseen:
    """The rows of a table that are never seen, and the relative error that they may have."""

    layer: LayerPlan
    rows: Tensor
    bound: float

    def error(self, dense: nn.Module, model: nn.Module) -> float:
        """What they have in a compressed network."""
        return error_of(weight_of(dense, self.layer), weight_of(model, self.layer), self.rows)

    def note(self, error: float) -> str:
        """As the report has it."""
        rows = f"{int(self.rows.sum()):,} of {len(self.rows):,} rows"
        return f"{rows} are not in the calibration data; their relative error is {error:.3f}, at most {self.bound:.3f}"


def unseen_rows(
    dense: nn.Module, plain: nn.Module, plan: CompressionPlan, statistics: Statistics
) -> dict[str, Unseen]:
    """By fqn of a table, its rows that are never seen, with a bound from a network compressed without images."""
    found = {}
    for layer in plan.layers:
        rows = never_seen(statistics[layer.fqn])
        if rows is not None:
            without = error_of(weight_of(dense, layer), weight_of(plain, layer), rows)
            found[layer.fqn] = Unseen(layer, rows, UNSEEN_LIMIT * without)
    return found
