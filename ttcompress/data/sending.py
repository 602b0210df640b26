"""Tensors on their way from the CPU to the device of a training."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device.

    A GPU is not waited for: an ordinary copy would first let it finish all that it was given, and it would have nothing
    to do while the next step is prepared.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
