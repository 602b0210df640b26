"""The drop-in fully-connected layer."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional

from ttcompress.errors import ShapeError
from ttcompress.layers.base import TTMap
from ttcompress.records.layers import Execution, LinearSpec
from ttcompress.tt.contract import contract_groups, dense_weight, merge_groups, pad_features
from ttcompress.tt.cost import Calls, ContractionPlan


class TTLinear(TTMap):
    """A fully-connected layer with its weight in TT form (Novikov et al. 2015, section 4).

    y(i) = sum_j G_1[i_1, j_1] ... G_d[i_d, j_d] x(j) + b(i); input (..., in_features), output (..., out_features).

    Raises:
        ShapeError: when called with another last axis than in_features, or with whole numbers.

    >>> import torch
    >>> from ttcompress import TTLinear
    >>> dense = torch.nn.Linear(128, 32)
    >>> layer = TTLinear.from_dense(dense)
    >>> x = torch.randn(5, 128)
    >>> torch.allclose(layer(x), dense(x), atol=1e-5)
    True
    """

    spec: LinearSpec
    kind = LinearSpec.kind

    in_features: int
    out_features: int

    def _calls(self, x: Tensor) -> Calls:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(f"the layer takes (..., {self.in_features}), not {tuple(x.shape)}")
        rows = x.numel() // max(1, x.shape[-1])
        return Calls(rows, rows)

    def _operands(
        self, execution: Execution, x: Tensor, plan: ContractionPlan | None, keeps: bool, cores: list[Tensor]
    ) -> Any:
        if plan is None or execution is Execution.DENSE:
            return dense_weight(cores, self.spec.weight_shape)
        return plan, merge_groups(cores, plan)

    def _run(self, execution: Execution, x: Tensor, operands: Any) -> Tensor:
        if execution is Execution.DENSE:
            return functional.linear(x, operands, self._bias_as(x))
        return self._contract(x, *operands)

    def _contract(self, x: Tensor, plan: ContractionPlan, groups: list[Tensor]) -> Tensor:
        """The input with groups of cores, one after the other (Novikov et al. 2015, section 4)."""
        rows = x.reshape(-1, self.in_features)
        padded = pad_features(rows, prod(self.tensorization.in_modes))

        y = contract_groups(groups, padded, plan)[:, : self.out_features]
        y = y.reshape(*x.shape[:-1], self.out_features)
        bias = self._bias_as(x)
        return y if bias is None else y + bias.to(y.dtype)
