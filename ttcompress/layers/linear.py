"""The drop-in fully-connected layer."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.execution import TTLayer, Way
from ttcompress.records.layers import LinearSpec
from ttcompress.tt import cost
from ttcompress.tt.contract import dense_weight, merge_groups, pad_features, sweep_groups


class TTLinear(TTLayer):
    """A fully-connected layer with its weight in TT form (Novikov et al. 2015, section 4).

    y(i) = sum_j G_1[i_1, j_1] ... G_d[i_d, j_d] x(j) + b(i); input (..., in_features), output (..., out_features).
    """

    spec: LinearSpec

    in_features: int
    out_features: int

    def _chosen(self, x: Tensor) -> tuple[Way, Any]:
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"the layer takes (..., {self.in_features}), not {tuple(x.shape)}")
        rows = x.numel() // max(1, x.shape[-1])
        if self._runs_dense(rows, rows):
            return TTLinear._dense, self._made("dense", x, lambda cores: dense_weight(cores, self.spec.weight_shape))
        plan = self._plan()
        return TTLinear._swept, (plan, self._made("groups", x, lambda cores: merge_groups(cores, plan)))

    def _dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear(x, weight, self._bias_as(x))

    def _swept(self, x: Tensor, made: tuple[cost.SweepPlan, list[Tensor]]) -> Tensor:
        plan, groups = made
        padded = pad_features(x.reshape(-1, self.in_features), prod(self.tensorization.in_modes))
        y = sweep_groups(groups, padded, plan)[:, : self.out_features]
        y = y.reshape(*x.shape[:-1], self.out_features)
        bias = self._bias_as(x)
        return y if bias is None else y + bias.to(y.dtype)
