"""How far a compressed network is from the dense one on the held-out calibration images."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.observe import Call, hooked
from ttcompress.calibrate.uses import around_weight, modules_run
from ttcompress.networks.running import call, centred, device_of, finite, placed, tensors_of
from ttcompress.records.plan import CompressionPlan


@torch.no_grad()
def network_error(dense: nn.Module, compressed: nn.Module, calibration: Calibration) -> float:
    """Relative error of the network's outputs on the held-out images, logits taken relative to their mean.

    With a hundred images it tells networks apart where the divergence of their class probabilities, which
    hangs on the few images that change their class, does not.
    """
    missed = power = 0.0
    for piece in _pieces(calibration, gradients=False):
        inputs = placed(piece, device_of(dense))
        ours, theirs = (finite(calibration.answer(each, inputs)).double() for each in (compressed, dense))
        missed += float(centred(ours - theirs).square().sum())
        power += float(centred(theirs).square().sum())
    return _relative(missed, power)


@torch.no_grad()
def output_errors(
    dense: nn.Module, compressed: nn.Module, plan: CompressionPlan, calibration: Calibration
) -> dict[str, float]:
    """Relative error of each layer's output on the held-out images, what earlier layers lost included.

    That of a weight which its own module does not run is the error of the module that does.
    """
    around = {layer.fqn: around_weight(layer.fqn, layer.spec) for layer in plan.layers}
    watched = {name for outer in around.values() for name in outer}
    ran = modules_run(dense, watched, next(_pieces(calibration, gradients=False)))
    # A module that never runs has its weight read by one around it.
    runs = {fqn: next(name for name in outer if name in ran) for fqn, outer in around.items()}
    names = set(runs.values())

    missed, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    # A layer may run several times for a batch; its calls are in the same order in both networks.
    theirs: dict[str, list[Tensor]] = {name: [] for name in names}

    def remember(name: str, module: nn.Module, call: Call, output: Any) -> None:
        for tensor in _outputs(output):
            theirs[name].append(tensor.detach())
            power[name] += float(tensor.double().square().sum())

    def compare(name: str, module: nn.Module, call: Call, output: Any) -> None:
        for tensor in _outputs(output):
            difference = tensor - theirs[name].pop(0)
            missed[name] += float(difference.double().square().sum())

    with hooked(dense, names, remember, after=True), hooked(compressed, names, compare, after=True):
        # The outputs of all layers are held, as they are for gradients.
        for piece in _pieces(calibration, gradients=True):
            inputs = placed(piece, device_of(dense))
            call(dense, inputs)
            call(compressed, inputs)
    return {fqn: _relative(missed[name], power[name]) for fqn, name in runs.items()}


def _pieces(calibration: Calibration, gradients: bool) -> Iterator[Any]:
    for batch in calibration.held_out():
        yield from calibration.pieces(batch, gradients)


def _outputs(output: Any) -> list[Tensor]:
    """What a module puts out in numbers: recurrent ones and attention return several tensors, or none for some."""
    return [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]


def _relative(squared_miss: float, squared_norm: float) -> float:
    """The relative error; of outputs that are all 0, whether anything was missed."""
    return sqrt(squared_miss / squared_norm) if squared_norm else float(squared_miss > 0)
