"""Joint refinement: all parameters of the compressed network fitted to what the dense one says.

No label is read. TT-cores go by natural gradient, so that one step length suits all cores of all layers,
whatever their ranks and scales. Everything else goes by Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.natural_gradient import Answered, NaturalGradient, gradients_of_error
from ttcompress.calibrate.observe import gradients_in_eval
from ttcompress.calibrate.reference import Reference
from ttcompress.data.augment import CROP, flipped, shifted
from ttcompress.networks.answers import Answer
from ttcompress.networks.running import (
    NetworkInput,
    batch_size,
    device_of,
    map_tensors,
    placed,
    tensors_of,
)
from ttcompress.networks.weights import tt_parts
from ttcompress.records.common import Progress
from ttcompress.runtime import give_back
from ttcompress.tt.spool import Spool

STEP = 0.4
"""Length of a step, as a share of the one that would minimise the error along the first gradients."""
MOMENTUM = 0.9
ADAM_RATE = 5e-4
"""Learning rate of parameters that are not TT-cores."""
WARM_UP = 0.1
DIVERGED, BACK_OFF, ATTEMPTS = 4.0, 0.2, 3
"""Steps are shortened by BACK_OFF where the error exceeds DIVERGED times the first, or does not come down."""


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the largest rates: that of TT-cores, and that of all else by Adam."""

    steps: int
    core_rate: float
    adam_rate: float

    @property
    def warm_up(self) -> int:
        """Steps until the largest rates are reached."""
        return max(1, round(WARM_UP * self.steps))

    def share(self, step: int) -> float:
        """Of the largest rates at a step: linear warm-up, then half a cosine down to 0."""
        warm = self.warm_up
        if step < warm:
            return (step + 1) / warm
        return (1 + cos(pi * (step - warm) / max(1, self.steps - warm))) / 2


def refine(
    reference: Reference, compressed: nn.Module, steps: int, seed: int, progress: Progress | None = None
) -> None:
    """Train `compressed`, in place and in eval mode, on mixtures of the images, to half the squared error.

    Images are flipped, moved and mixed pairwise: the dense network has an answer to anything (function
    matching, Beyer et al. 2022). Where the error does not come down it begins again with shorter steps, and
    in the end changes nothing.
    """
    compressed.requires_grad_()
    with gradients_in_eval(compressed):
        _refine(reference, compressed, steps, seed, progress)


def _refine(
    reference: Reference, compressed: nn.Module, steps: int, seed: int, progress: Progress | None
) -> None:
    answer = reference.calibration.answer
    spool = Spool()
    natural = NaturalGradient(tt_parts(compressed), reference.statistics, spool)

    rate = STEP * natural.best_step(compressed, answer, next(_answered(reference, seed)))
    start = {name: spool.lay(tensor.clone()) for name, tensor in compressed.state_dict().items()}
    for attempt in range(ATTEMPTS):
        compressed.zero_grad()
        share = BACK_OFF**attempt
        schedule = Schedule(steps, rate * share, ADAM_RATE * share)
        if _descend(compressed, answer, natural, _answered(reference, seed), schedule, progress):
            return
        compressed.load_state_dict({name: fetch() for name, fetch in start.items()})


def _descend(
    model: nn.Module,
    answer: Answer,
    natural: NaturalGradient,
    answered: Iterator[Answered],
    schedule: Schedule,
    progress: Progress | None,
) -> bool:
    """Whether the steps brought the error down, and none of them to DIVERGED times the first."""
    optimizers = _optimizers(model, natural, schedule)
    decays = [torch.optim.lr_scheduler.LambdaLR(each, schedule.share) for each in optimizers]

    errors = list[float]()
    for step, pieces in enumerate(islice(answered, schedule.steps)):
        error, _ = gradients_of_error(model, answer, pieces)
        errors.append(error)
        # Also where it is NaN, which compares as false.
        if not errors[-1] <= DIVERGED * errors[0]:
            return False

        natural.apply()
        for optimizer, decay in zip(optimizers, decays, strict=True):
            optimizer.step()
            decay.step()
            # Before the next one takes memory for its own.
            optimizer.zero_grad()
        give_back()
        if progress:
            progress("refining", step + 1, schedule.steps)

    # One batch says little: as many of the last steps against as many of the first.
    few = schedule.warm_up
    return sum(errors[-few:]) < sum(errors[:few])


def _optimizers(
    model: nn.Module, natural: NaturalGradient, schedule: Schedule
) -> list[torch.optim.Optimizer]:
    cores = natural.cores
    own = {id(core) for core in cores}
    others = [parameter for parameter in model.parameters() if id(parameter) not in own]

    by_natural_gradient = torch.optim.SGD(cores, lr=schedule.core_rate, momentum=MOMENTUM)
    if not others:
        return [by_natural_gradient]
    return [by_natural_gradient, _adam(others, schedule.adam_rate)]


def _adam(parameters: list[nn.Parameter], rate: float) -> torch.optim.Adam:
    # Fused where it can be: operator by operator Adam takes the memory of the largest parameter twice more.
    return torch.optim.Adam(parameters, lr=rate, fused=all(map(_can_be_fused, parameters)))


def _can_be_fused(parameter: Tensor) -> bool:
    """Fused Adam takes no complex numbers, and on a CPU mistakes the gaps in a view for part of it, without a word."""
    has_no_gaps = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.is_floating_point() and has_no_gaps


def _answered(reference: Reference, seed: int) -> Iterator[Answered]:
    """Batches of augmented inputs, without end, in pieces, and what the dense network says to them."""
    calibration = reference.calibration
    for inputs in _augmented(calibration, seed, device_of(reference.dense)):
        pieces = []
        for piece in calibration.pieces(inputs):
            with torch.no_grad():
                target = calibration.answer(reference.dense, piece)
            pieces.append((piece, target))
        yield pieces


def _augmented(calibration: Calibration, seed: int, device: torch.device) -> Iterator[NetworkInput]:
    generator = torch.Generator().manual_seed(seed)
    for number in count(1):
        for batch in calibration.fitting(number):
            if batch_size(batch) > 1:
                yield placed(augment(batch, generator), device)


def augment(inputs: NetworkInput, generator: torch.Generator) -> Any:
    """Mixtures a u_i + (1 - a) u_j of the inputs u, a uniform.

    Images (N, C, H, W) are flipped and moved first, unless they come with others. Whole numbers, such as
    tokens, stay as they are, and with them what belongs to them.
    """
    if not all(tensor.is_floating_point() for tensor in tensors_of(inputs)):
        return inputs

    size = batch_size(inputs)
    if isinstance(inputs, Tensor) and inputs.dim() == 4:
        inputs = flipped(inputs, torch.rand(size, generator=generator) < 0.5)
        inputs = moved(inputs, generator)

    shares = torch.rand(size, generator=generator)
    order = torch.randperm(size, generator=generator)

    def mixed(tensor: Tensor) -> Tensor:
        a = shares.reshape(-1, *[1] * (tensor.dim() - 1)).to(tensor)
        return a * tensor + (1 - a) * tensor[order]

    return map_tensors(mixed, inputs)


def moved(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to a CROP-th of its size in both directions, zeros moving in."""
    reach = [size // CROP for size in batch.shape[2:]]
    down, right = (r - torch.randint(0, 2 * r + 1, (len(batch), 1), generator=generator)[:, 0] for r in reach)
    return shifted(batch, down, right)
