"""ttcompress: post-training Tensor-Train compression of PyTorch networks.

Names are resolved on first use, so that importing the package costs nothing (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ttcompress.version import __version__ as __version__

if TYPE_CHECKING:
    from ttcompress import tt as tt
    from ttcompress.commands.finetune_in_memory import finetune as finetune
    from ttcompress.commands.in_memory import compress as compress
    from ttcompress.commands.in_memory import evaluate as evaluate
    from ttcompress.commands.in_memory import plan as plan
    from ttcompress.commands.in_memory import save as save
    from ttcompress.commands.in_memory import sweep as sweep
    from ttcompress.commands.plain import to_plain as to_plain
    from ttcompress.errors import TTCompressError as TTCompressError
    from ttcompress.layers.conv import TTConv1d as TTConv1d
    from ttcompress.layers.conv import TTConv2d as TTConv2d
    from ttcompress.layers.conv import TTConv3d as TTConv3d
    from ttcompress.layers.conv import TTConvTranspose1d as TTConvTranspose1d
    from ttcompress.layers.conv import TTConvTranspose2d as TTConvTranspose2d
    from ttcompress.layers.conv import TTConvTranspose3d as TTConvTranspose3d
    from ttcompress.layers.embedding import TTEmbedding as TTEmbedding
    from ttcompress.layers.linear import TTLinear as TTLinear
    from ttcompress.networks.opening import load as load
    from ttcompress.recipe import LayerRule as LayerRule
    from ttcompress.records.plan import CompressionPlan as CompressionPlan
    from ttcompress.records.report import Report as Report
    from ttcompress.report.text import read_report as read_report
    from ttcompress.tt.decompose import tt_svd as tt_svd
    from ttcompress.tt.shapes import tensorize_shape as tensorize_shape

_HOMES = {
    "CompressionPlan": "records.plan",
    "LayerRule": "recipe",
    "Report": "records.report",
    "TTCompressError": "errors",
    "TTConv1d": "layers.conv",
    "TTConv2d": "layers.conv",
    "TTConv3d": "layers.conv",
    "TTConvTranspose1d": "layers.conv",
    "TTConvTranspose2d": "layers.conv",
    "TTConvTranspose3d": "layers.conv",
    "TTEmbedding": "layers.embedding",
    "TTLinear": "layers.linear",
    "compress": "commands.in_memory",
    "evaluate": "commands.in_memory",
    "finetune": "commands.finetune_in_memory",
    "load": "networks.opening",
    "plan": "commands.in_memory",
    "read_report": "report.text",
    "save": "commands.in_memory",
    "sweep": "commands.in_memory",
    "tensorize_shape": "tt.shapes",
    "to_plain": "commands.plain",
    "tt_svd": "tt.decompose",
}
__all__ = [*sorted(_HOMES), "tt"]


def __getattr__(name: str) -> Any:
    if name == "tt":
        return import_module("ttcompress.tt")
    if name not in _HOMES:
        raise AttributeError(f"module 'ttcompress' has no attribute {name!r}")
    return getattr(import_module(f"ttcompress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
