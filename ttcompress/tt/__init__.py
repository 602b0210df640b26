"""The tensor-train mathematics: integers (`shapes`), decomposition, algebra, contraction.

The names that are handed on are resolved on first use: `shapes` is light, and importing it must not import
torch (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttcompress.tt.arithmetic import add as add
    from ttcompress.tt.arithmetic import add_constant as add_constant
    from ttcompress.tt.arithmetic import inner as inner
    from ttcompress.tt.arithmetic import left_orthogonalize as left_orthogonalize
    from ttcompress.tt.arithmetic import matvec as matvec
    from ttcompress.tt.arithmetic import matvec_tt as matvec_tt
    from ttcompress.tt.arithmetic import multiply as multiply
    from ttcompress.tt.arithmetic import norm as norm
    from ttcompress.tt.arithmetic import right_orthogonalize as right_orthogonalize
    from ttcompress.tt.arithmetic import round_tt as round_tt
    from ttcompress.tt.arithmetic import scale as scale
    from ttcompress.tt.arithmetic import to_matrix as to_matrix
    from ttcompress.tt.arithmetic import to_tensor as to_tensor
    from ttcompress.tt.arithmetic import total as total
    from ttcompress.tt.contract import dense_weight as dense_weight
    from ttcompress.tt.decompose import TTSVD as TTSVD
    from ttcompress.tt.decompose import decompose_weight as decompose_weight
    from ttcompress.tt.decompose import tt_svd as tt_svd
    from ttcompress.tt.shapes import Mode as Mode
    from ttcompress.tt.shapes import Tensorization as Tensorization
    from ttcompress.tt.shapes import feasible_ranks as feasible_ranks
    from ttcompress.tt.shapes import tensorize_shape as tensorize_shape

_HOMES = {
    "Mode": "shapes",
    "TTSVD": "decompose",
    "Tensorization": "shapes",
    "add": "arithmetic",
    "add_constant": "arithmetic",
    "decompose_weight": "decompose",
    "dense_weight": "contract",
    "feasible_ranks": "shapes",
    "inner": "arithmetic",
    "left_orthogonalize": "arithmetic",
    "matvec": "arithmetic",
    "matvec_tt": "arithmetic",
    "multiply": "arithmetic",
    "norm": "arithmetic",
    "right_orthogonalize": "arithmetic",
    "round_tt": "arithmetic",
    "scale": "arithmetic",
    "tensorize_shape": "shapes",
    "to_matrix": "arithmetic",
    "to_tensor": "arithmetic",
    "total": "arithmetic",
    "tt_svd": "decompose",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ttcompress.tt' has no attribute {name!r}")
    return getattr(import_module(f"ttcompress.tt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
