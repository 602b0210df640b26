"""How far a compressed network is from the dense one on the held-out calibration images."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from ttcompress.calibrate.observe import hooked
from ttcompress.data.calibration_images import Calibration
from ttcompress.networks.running import call, centred, device_of, forward, placed
from ttcompress.records.plan import CompressionPlan


@torch.no_grad()
def network_error(dense: nn.Module, compressed: nn.Module, calibration: Calibration) -> float:
    """Relative error of the network's outputs on the held-out images, logits taken relative to their mean.

    With a hundred images it tells networks apart where the divergence of their class probabilities, which
    hangs on the few images that change their class, does not.
    """
    missed = power = 0.0
    for batch in calibration.held_out():
        inputs = placed(batch, device_of(dense))
        ours, theirs = forward(compressed, inputs).double(), forward(dense, inputs).double()
        missed += float(centred(ours - theirs).square().sum())
        power += float(centred(theirs).square().sum())
    return _relative(missed, power)


@torch.no_grad()
def output_errors(
    dense: nn.Module, compressed: nn.Module, plan: CompressionPlan, calibration: Calibration
) -> dict[str, float]:
    """Relative error of each layer's output on the held-out images, what earlier layers lost included."""
    names = [layer.fqn for layer in plan.layers]
    missed, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    # A layer may run several times for a batch; its calls are in the same order in both networks.
    theirs: dict[str, list[Tensor]] = {name: [] for name in names}

    def remember(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        theirs[name].append(output.detach())
        power[name] += float(output.double().square().sum())

    def compare(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        difference = output - theirs[name].pop(0)
        missed[name] += float(difference.double().square().sum())

    with hooked(dense, names, remember, after=True), hooked(compressed, names, compare, after=True):
        for batch in calibration.held_out():
            inputs = placed(batch, device_of(dense))
            call(dense, inputs)
            call(compressed, inputs)
    return {name: _relative(missed[name], power[name]) for name in names}


def _relative(squared_miss: float, squared_norm: float) -> float:
    """The relative error; of outputs that are all 0, whether anything was missed."""
    return sqrt(squared_miss / squared_norm) if squared_norm else float(squared_miss > 0)
