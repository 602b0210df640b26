"""ttcompress: post-training Tensor-Train compression of PyTorch networks.

Names are resolved on first use, so that importing the package costs nothing (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttcompress.errors import TTCompressError as TTCompressError
    from ttcompress.layers import TTConv2d as TTConv2d
    from ttcompress.layers import TTLinear as TTLinear
    from ttcompress.network import load as load
    from ttcompress.pipeline import compress as compress
    from ttcompress.pipeline import save as save
    from ttcompress.report import read_report as read_report
    from ttcompress.tt.decompose import tt_svd as tt_svd
    from ttcompress.tt.shapes import tensorize_shape as tensorize_shape

__version__ = "0.1.0"

_HOMES = {
    "TTCompressError": "errors",
    "TTConv2d": "layers",
    "TTLinear": "layers",
    "compress": "pipeline",
    "load": "network",
    "read_report": "report",
    "save": "pipeline",
    "tensorize_shape": "tt.shapes",
    "tt_svd": "tt.decompose",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ttcompress' has no attribute {name!r}")
    return getattr(import_module(f"ttcompress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
