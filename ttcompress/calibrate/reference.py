"""What a compressed network is fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.layer_statistics import Statistics


@dataclass(frozen=True)
class Reference:
    """The dense network, frozen, the moments of its layers, and images to run it on.

    It stays as it is, whatever is fitted to it.
    """

    dense: nn.Module
    statistics: Statistics
    calibration: Calibration
