"""Joint refinement: all parameters of the compressed network fitted to what the dense one says, without labels.

TT-cores go by natural gradient: each core's gradient is divided by the moments of its layer's inputs and outputs and by
the Gram matrices of the cores to its left and right (the metric of whiten.py seen from one core), so that one step
length suits all cores of all layers, whatever their ranks and scales. Everything else goes by Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from math import cos, pi

import torch
from torch import Tensor, nn

from ttcompress.calibrate.statistics import Statistics
from ttcompress.data.augment import CROP, flipped, shifted
from ttcompress.data.calibration_images import Calibration
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.running import centred, device_of
from ttcompress.records.common import Progress
from ttcompress.tt.whiten import DAMPING, ModeMetric

STEP = 0.4
"""Length of a step, as a share of the one that would minimise the error along the first gradients."""
MOMENTUM = 0.9
KEPT_RATE = 5e-4
"""Adam's learning rate for parameters that are not TT-cores."""
WARM_UP = 0.1
DIVERGED, BACK_OFF, ATTEMPTS = 4.0, 0.2, 3
"""Steps are shortened by BACK_OFF when the error has grown to DIVERGED times the first one, or has not come down."""
RENEWED_EVERY = 10


def refine(
    dense: nn.Module,
    compressed: nn.Module,
    statistics: Statistics,
    calibration: Calibration,
    steps: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Train `compressed`, in place and in eval mode, on mixtures of calibration images, half of the squared error.

    Images are flipped, moved and mixed pairwise: the dense network has an answer to anything (function matching, Beyer
    et al. 2022). Where the error does not come down it begins again with shorter steps, and in the end changes nothing.
    """
    compressed.requires_grad_()
    layers = {name: module for name, module in compressed.named_modules() if isinstance(module, TTLinear | TTConv2d)}
    natural = NaturalGradient(layers, statistics)
    batches = _augmented(calibration, seed, device_of(dense))
    rate = STEP * natural.best_step(compressed, *_answered(dense, next(batches)))
    start = copy.deepcopy(compressed.state_dict())
    for attempt in range(ATTEMPTS):
        share = BACK_OFF**attempt
        batches = _augmented(calibration, seed, device_of(dense))
        answered = (_answered(dense, images) for images in batches)
        if _descend(compressed, natural, answered, rate * share, KEPT_RATE * share, steps, progress):
            return
        compressed.load_state_dict(start)


def _descend(
    model: nn.Module,
    natural: NaturalGradient,
    answered: Iterator[tuple[Tensor, Tensor]],
    rate: float,
    kept_rate: float,
    steps: int,
    progress: Progress | None,
) -> bool:
    """Whether `steps` steps brought the error down, and none of them to DIVERGED times the first."""
    own = {id(core) for core in natural.cores}
    kept = [parameter for parameter in model.parameters() if id(parameter) not in own]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(natural.cores, lr=rate, momentum=MOMENTUM)]
    optimizers += [torch.optim.Adam(kept, lr=kept_rate)] if kept else []
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _rate(step, steps)) for each in optimizers]
    errors = list[float]()
    for step, (images, target) in enumerate(islice(answered, steps)):
        loss = _half_squared_error(model(images), target)
        errors.append(float(loss.detach()))
        if not errors[-1] <= DIVERGED * errors[0]:
            return False
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        natural.apply()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if progress:
            progress("refining", step + 1, steps)
    few = _warm_up(steps)
    return sum(errors[-few:]) < sum(errors[:few])


def _warm_up(steps: int) -> int:
    return max(1, round(WARM_UP * steps))


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warm = _warm_up(steps)
    return (step + 1) / warm if step < warm else (1 + cos(pi * (step - warm) / max(1, steps - warm))) / 2


def _half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Per image, with logits taken relative to their mean."""
    return centred(output - target).square().sum() / (2 * len(output))


@torch.no_grad()
def _answered(dense: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    return images, dense(images)


def _augmented(calibration: Calibration, seed: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for number in count(1):
        for batch in calibration.fitting(number):
            if len(batch) > 1:
                yield augment(batch, generator).to(device)


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Mixtures a u_i + (1 - a) u_j, a uniform, of the inputs u; images (N, C, H, W) are flipped and moved first."""
    if not batch.is_floating_point():
        return batch
    size = len(batch)
    if batch.dim() == 4:
        batch = flipped(batch, torch.rand(size, generator=generator) < 0.5)
        batch = moved(batch, generator)
    share = torch.rand(size, generator=generator).reshape(-1, *[1] * (batch.dim() - 1)).to(batch)
    return share * batch + (1 - share) * batch[torch.randperm(size, generator=generator)]


def moved(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to a CROP-th of its size in both directions, zeros moving in."""
    reach = [size // CROP for size in batch.shape[2:]]
    down, right = (r - torch.randint(0, 2 * r + 1, (len(batch), 1), generator=generator)[:, 0] for r in reach)
    return shifted(batch, down, right)


class NaturalGradient:
    """Gradients of TT-cores in the metric of their layers' inputs and outputs."""

    def __init__(self, layers: Mapping[str, TTLinear | TTConv2d], statistics: Statistics) -> None:
        self._layers = list(layers.values())
        self._metrics = [statistics[name].metrics(layer.tensorization) for name, layer in layers.items()]
        squared = [[metric.squared() for metric in metrics] for metrics in self._metrics]
        self._inverses = [[metric.inverse() for metric in metrics] for metrics in squared]
        self._frames: list[list[tuple[Tensor, Tensor]]] = []
        self._age = 0

    @property
    def cores(self) -> list[nn.Parameter]:
        """All cores of all layers."""
        return [core for layer in self._layers for core in layer.cores]

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the gradient of every core by the natural one."""
        if self._age % RENEWED_EVERY == 0:
            self._frames = [
                _inverse_frames(list(layer.cores), metrics)
                for layer, metrics in zip(self._layers, self._metrics, strict=True)
            ]
        self._age += 1
        for layer, inverses, frames in zip(self._layers, self._inverses, self._frames, strict=True):
            for core, inverse, (left, right) in zip(layer.cores, inverses, frames, strict=True):
                if core.grad is not None:
                    core.grad = torch.einsum("ab,bmnwc,cd->amnwd", left, inverse.apply(core.grad), right)

    def best_step(self, model: nn.Module, images: Tensor, target: Tensor) -> float:
        """The step along the natural gradient that would minimise the squared error, were the network linear."""
        output = model(images)
        _half_squared_error(output, target).backward()  # type: ignore[no-untyped-call]
        plain = [core.grad.clone() if core.grad is not None else torch.zeros_like(core) for core in self.cores]
        self.apply()
        direction = [core.grad if core.grad is not None else torch.zeros_like(core) for core in self.cores]
        slope = sum(float((g * d).sum()) for g, d in zip(plain, direction, strict=True))
        length = sum(float(d.square().sum()) for d in direction) ** 0.5
        size = sum(float(core.detach().square().sum()) for core in self.cores) ** 0.5
        small = 1e-3 * size / (length or 1.0)
        with torch.no_grad():
            for core, d in zip(self.cores, direction, strict=True):
                core.sub_(d, alpha=small)
            change = (model(images) - output) / small
            for core, d in zip(self.cores, direction, strict=True):
                core.add_(d, alpha=small)
        curvature = float(centred(change).square().sum()) / len(images)
        return slope / curvature if curvature > 0 else 0.0


def _inverse_frames(cores: Sequence[Tensor], metrics: Sequence[ModeMetric]) -> list[tuple[Tensor, Tensor]]:
    """For each core the inverse Gram matrices of what stands to its left and right, in the metric."""
    weighted = [metric.apply(core).flatten(1, -2) for core, metric in zip(cores, metrics, strict=True)]
    left, right = [weighted[0].new_ones(1, 1)], [weighted[0].new_ones(1, 1)]
    for core in weighted[:-1]:
        left.append(torch.einsum("ab,anc,bnd->cd", left[-1], core, core))
    for core in weighted[:0:-1]:
        right.append(torch.einsum("cd,anc,bnd->ab", right[-1], core, core))
    return [(_damped_inverse(a), _damped_inverse(b)) for a, b in zip(left, reversed(right), strict=True)]


def _damped_inverse(gram: Tensor) -> Tensor:
    damping, identity = DAMPING / 10 * gram.diagonal().mean(), torch.eye(len(gram)).to(gram)
    # Where nothing comes through, as of cores that are zero, no direction is better than another.
    inverse: Tensor = torch.linalg.inv(gram + damping * identity) if bool(gram.any()) else identity
    return inverse
