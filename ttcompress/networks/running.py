"""Running a network on a batch, and what it takes: device, type, and outputs that can be measured."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttcompress.errors import DataError, ShapeError
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear


def input_dtype(model: nn.Module) -> torch.dtype:
    """The widest type among the parameters, TT-cores aside: those run in the type of their input."""
    tt_layers = [module for module in model.modules() if isinstance(module, TTLinear | TTConv2d)]
    cores = {id(core) for layer in tt_layers for core in layer.cores}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in cores]

    types = [parameter.dtype for parameter in dense if parameter.is_floating_point()]
    return max(types, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype())


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """What the network returns for a batch.

    Raises:
        DataError: images that it does not take, an output that is no tensor, or one that is not finite.
    """
    try:
        output = model(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError, ShapeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"the network does not take images of shape {tuple(images.shape[1:])}: {reason}") from error
    if not isinstance(output, Tensor):
        raise DataError(f"accuracy, calibration and export need a tensor; the network returns {type(output).__name__}")
    if not output.is_meta and not bool(output.isfinite().all()):
        raise DataError("the network returns NaN or Inf on this data")
    return output


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    return next(model.parameters()).device


def centred(outputs: Tensor) -> Tensor:
    """Logits have no meaning but for their differences."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.dim() == 2 and outputs.shape[1] > 1 else outputs
