"""What a compressed network is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.layer_statistics import Statistics


@dataclass(frozen=True)
class Reference:
    """The dense network, frozen, the moments of its layers, and images to run it on.

    It stays as it is, whatever is fitted to it. `in_step` lets a network pass over several batches at once where layer
    after layer is fitted: many times faster, and bit for bit the same, but the memory of so many passes.
    """

    dense: nn.Module
    statistics: Statistics
    calibration: Calibration
    in_step: bool = False
