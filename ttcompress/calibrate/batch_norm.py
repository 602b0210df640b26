"""Statistics of batch norm, computed again on the calibration images."""

from __future__ import annotations

import torch
from torch import nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.networks.running import batch_size, call, device_of, placed


def recalibrate_batch_norm(model: nn.Module, calibration: Calibration) -> bool:
    """Set the running statistics of all batch norms to those of the images; False where there are none."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return False

    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # A cumulative average instead of a moving one.
        norm.train()

    with torch.no_grad():
        for batch in calibration.fitting(0):
            for piece in calibration.pieces(batch, gradients=False):
                # In training mode batch norm refuses a single vector, which has no variance.
                if batch_size(piece) > 1:
                    call(model, placed(piece, device_of(model)))

    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
    return True
