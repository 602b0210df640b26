"""The choice of how a layer runs a call: by its TT-cores or by the dense weight, whichever costs less."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from ttcompress.records.layers import Execution, LayerSpec, executions
from ttcompress.tt import cost
from ttcompress.tt.shapes import Tensorization, is_contracted

MOST_CHOICES = 256
"""So many are remembered; calls of ever new sizes begin anew."""


class ExecutionChoice:
    """Chooses the execution of each call by a cost model of multiply-adds and memory traffic."""

    def __init__(self, spec: LayerSpec, tensorization: Tensorization, tt_ranks: Sequence[int]) -> None:
        self._view_shape, self._transposed, self._groups = spec.view_shape, spec.transposed, spec.groups
        self._tensorization = tensorization
        self._tt_ranks = tuple(tt_ranks)
        _, self.by_cores, self.dense = executions(spec, tensorization)
        self._plans = self._contraction_plans()
        self._made: dict[Hashable, Execution] = {}

    def _contraction_plans(self) -> list[cost.ContractionPlan]:
        """How inputs meet the cores, without and with gradients, for layers that contract them."""
        if not is_contracted(self._view_shape, self._tensorization):
            return []

        core_shapes = self._tensorization.core_shapes(self._tt_ranks)
        contracted = cost.contracted_shapes(core_shapes)
        return [cost.contraction_plan(contracted, training) for training in (False, True)]

    def plan(self, trains: bool) -> cost.ContractionPlan | None:
        """How inputs meet the cores, for layers that contract them; `trains` where gradients go to the cores."""
        if not self._plans:
            return None
        # By name: torch.compile before torch 2.14 leaves the graph at a list that a truth value is the index of.
        inference, training = self._plans
        return training if trains else inference

    def cheaper(self, calls: cost.Calls, cached: bool, trains: bool, device: str) -> Execution:
        """The execution that costs less for calls of this size on a type of device.

        `cached` where what is made of the cores is at hand.
        """
        # Sizes are symbols there, and graphs are chosen anew by guards.
        if torch.compiler.is_compiling():
            return self._compared(calls, cached, trains, device)

        key = calls, cached, trains, device
        if key not in self._made:
            if len(self._made) >= MOST_CHOICES:
                self._made.clear()
            self._made[key] = self._compared(*key)
        return self._made[key]

    def _compared(self, calls: cost.Calls, cached: bool, trains: bool, device: str) -> Execution:
        unit = cost.time_on(device)
        layer = cost.LayerCosts(self._view_shape, calls, unit, self._transposed, self._groups)
        form = self._tensorization, self._tt_ranks

        by_cores = layer.by_cores(*form, cached, self.plan(trains))
        dense = layer.dense() if cached else layer.rebuilt(*form)
        is_dense_cheaper = bool(unit.total(dense) < unit.total(by_cores))
        return self.dense if is_dense_cheaper else self.by_cores
