"""What held-out calibration images say about a compressed network."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from ttcompress.calibrate.statistics import hooked
from ttcompress.data.calibration_images import Calibration
from ttcompress.networks.running import centred, device_of, forward
from ttcompress.records.plan import CompressionPlan


@torch.no_grad()
def network_error(dense: nn.Module, compressed: nn.Module, calibration: Calibration) -> float:
    """Relative error of the network's outputs on the held-out images, logits taken relative to their mean.

    With a hundred images it tells networks apart where the divergence of their class probabilities, which hangs on
    the few images that change their class, does not.
    """
    missed = power = 0.0
    for batch in calibration.held_out():
        images = batch.to(device_of(dense))
        ours, theirs = forward(compressed, images).double(), forward(dense, images).double()
        missed += float(centred(ours - theirs).square().sum())
        power += float(centred(theirs).square().sum())
    return sqrt(missed / power) if power else float(missed > 0)


@torch.no_grad()
def output_errors(
    dense: nn.Module, compressed: nn.Module, plan: CompressionPlan, calibration: Calibration
) -> dict[str, float]:
    """Relative error of each layer's output within its network, those of earlier layers included, held-out images."""
    names = [layer.fqn for layer in plan.layers]
    missed, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    theirs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        theirs[name].append(output.detach())
        power[name] += float(output.double().square().sum())

    def compare(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        missed[name] += float((output - theirs[name].pop(0)).double().square().sum())

    with hooked(dense, names, keep, after=True), hooked(compressed, names, compare, after=True):
        for batch in calibration.held_out():
            images = batch.to(device_of(dense))
            dense(images)
            compressed(images)
    return {name: sqrt(missed[name] / power[name]) if power[name] else float(missed[name] > 0) for name in names}


def recalibrate_batch_norm(model: nn.Module, calibration: Calibration) -> bool:
    """Set the running statistics of all batch norms to those of the calibration images; False where there are none."""
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
            if len(batch) > 1:
                model(batch.to(device_of(model)))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
    return True
