"""Natural gradients of TT-cores: steps whose length is measured by what they do to the network's outputs.

A plain gradient depends on the scales of the cores, which the weight they stand for does not: one core can be
doubled and its neighbour halved. The natural gradient (Amari 1998) divides by the metric of the outputs
instead. For one core of a layer that metric is a Kronecker product, of the moments of the layer's inputs and
outputs at its mode (as in Martens and Grosse 2015) and of the Gram matrices of all that stands to its left
and right; each factor is inverted by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ttcompress.calibrate.layer_statistics import Statistics
from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.networks.answers import Answer
from ttcompress.networks.running import NetworkInput, batch_size, centred
from ttcompress.tt.quantize import is_grouped
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import DAMPING, ModeMetric

RENEWED_EVERY = 10
"""Steps for which the Gram matrices of the cores are taken to stay as they are."""
PROBE = 1e-3
"""Length of the step that measures the curvature, as a share of the norm of all cores."""


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Per image, with logits taken relative to their mean."""
    return centred(output - target).square().sum() / (2 * len(output))


Answered = Sequence[tuple[NetworkInput, Tensor]]
"""A batch in pieces, each with what the outputs are to be."""


def gradients_of_error(model: nn.Module, answer: Answer, pieces: Answered) -> tuple[float, list[Tensor]]:
    """Half the squared error of a batch, whose gradients are added to those of the parameters; and its outputs."""
    whole = sum(batch_size(inputs) for inputs, _ in pieces)
    error = 0.0
    outputs = []
    for inputs, target in pieces:
        output = answer(model, inputs)
        outputs.append(output.detach())
        loss = half_squared_error(output, target) * (batch_size(inputs) / whole)
        loss.backward()  # type: ignore[no-untyped-call]
        error += float(loss.detach())
    return error, outputs


class NaturalGradient:
    """Gradients of TT-cores in the metric of their layers' inputs and outputs.

    Metrics of wide layers are large, so that they are laid aside between steps.
    """

    def __init__(
        self, layers: Mapping[str, TTLayer | TTWeight], statistics: Statistics, spool: Spool | None = None
    ) -> None:
        self._layers = list(layers.values())
        self._metrics: list[list[Callable[[], ModeMetric]]] = []
        self._inverses: list[list[Callable[[], ModeMetric]]] = []
        lay = (spool or Spool()).lay
        for name, layer in layers.items():
            metrics = statistics[name].metrics_of_steps(layer.tensorization)
            # As the cores are multiplied by them.
            dtype = torch.promote_types(layer.cores[0].dtype, torch.float32)
            inverses = (metric.squared().inverse() for metric in metrics)
            self._inverses.append([_laid_aside(each, dtype, lay) for each in inverses])
            self._metrics.append([_laid_aside(each, dtype, lay) for each in metrics])
        self._frames: list[list[list[tuple[Tensor, Tensor]]]] = []
        self._age = 0

    @property
    def cores(self) -> list[nn.Parameter]:
        """All cores of all layers."""
        return [core for layer in self._layers for core in layer.cores]

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the gradient of every core by the natural one."""
        if self._age % RENEWED_EVERY == 0:
            self._renew()
        self._age += 1

        for layer, inverses, frames in zip(self._layers, self._inverses, self._frames, strict=True):
            for core, inverse, around in zip(layer.cores, inverses, frames, strict=True):
                if core.grad is not None:
                    core.grad = _natural(core.grad, inverse(), around)

    def _renew(self) -> None:
        pairs = zip(self._layers, self._metrics, strict=True)
        self._frames = [
            _frames_of_groups(list(layer.cores), [metric() for metric in metrics]) for layer, metrics in pairs
        ]

    def best_step(self, model: nn.Module, answer: Answer, pieces: Answered) -> float:
        """The step along the natural gradient that would minimise the squared error, were the network linear.

        Along a direction d the error is then a parabola: the step is its slope <gradient, d> over its
        curvature ||J d||^2, and J d, the change of the outputs, is measured by a small step.
        """
        _, before = gradients_of_error(model, answer, pieces)
        plain = [_gradient(core) for core in self.cores]
        self.apply()
        direction = [_gradient(core) for core in self.cores]
        slope = _sum([(g * d).sum() for g, d in zip(plain, direction, strict=True)])

        small = PROBE * _length(self.cores) / (_length(direction) or 1.0)
        curvature = 0.0
        with torch.no_grad():
            self._move(direction, -small)
            for (inputs, _), output in zip(pieces, before, strict=True):
                change = (answer(model, inputs) - output) / small
                curvature += float(centred(change).square().sum())
            self._move(direction, small)
        curvature /= sum(batch_size(inputs) for inputs, _ in pieces)
        return slope / curvature if curvature > 0 else 0.0

    def _move(self, direction: Sequence[Tensor], by: float) -> None:
        for core, d in zip(self.cores, direction, strict=True):
            core.add_(d, alpha=by)


def _laid_aside(
    metric: ModeMetric, dtype: torch.dtype, lay: Callable[[Tensor], Callable[[], Tensor]]
) -> Callable[[], ModeMetric]:
    out, inp = lay(metric.out.to(dtype)), lay(metric.inp.to(dtype))
    return lambda: ModeMetric(out(), inp())


def _gradient(core: Tensor) -> Tensor:
    return core.grad if core.grad is not None else torch.zeros_like(core)


def _length(tensors: Sequence[Tensor]) -> float:
    squares = [tensor.detach().square().sum() for tensor in tensors]
    return float(_sum(squares) ** 0.5)


def _sum(numbers: Sequence[Tensor]) -> float:
    """Of all, read at once: a GPU would have to be waited for at each of them."""
    return float(sum(torch.stack([*numbers]).tolist())) if numbers else 0.0


def _natural(gradient: Tensor, inverse: ModeMetric, around: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of a core in the metric at its mode, between what stands around it in each group."""
    blocks = list(gradient) if len(around) > 1 else [gradient]
    found = []
    for block, (left, right) in zip(blocks, around, strict=True):
        at_mode = inverse.apply(block)
        found.append(torch.einsum("ab,bmnwc,cd->amnwd", left, at_mode, right))
    return torch.stack(found) if len(found) > 1 else found[0]


def _frames_of_groups(
    cores: Sequence[Tensor], metrics: Sequence[ModeMetric]
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each core, and in it for each group of channels, the inverse Gram matrices of what stands around it."""
    groups = list(zip(*cores, strict=True)) if is_grouped(cores[0]) else [cores]
    found = [_inverse_frames(group, metrics) for group in groups]
    return [list(of_core) for of_core in zip(*found, strict=True)]


def _inverse_frames(cores: Sequence[Tensor], metrics: Sequence[ModeMetric]) -> list[tuple[Tensor, Tensor]]:
    """For each core the inverse Gram matrices of what stands to its left and right, in the metric."""
    weighted = [metric.apply(core).flatten(1, -2) for core, metric in zip(cores, metrics, strict=True)]

    # From either end: nothing stands before the first core, so that its Gram matrix is the number 1.
    left, right = [weighted[0].new_ones(1, 1)], [weighted[0].new_ones(1, 1)]
    for core in weighted[:-1]:
        left.append(torch.einsum("ab,anc,bnd->cd", left[-1], core, core))
    for core in weighted[:0:-1]:
        right.append(torch.einsum("cd,anc,bnd->ab", right[-1], core, core))

    pairs = zip(left, reversed(right), strict=True)
    return [(_damped_inverse(before), _damped_inverse(after)) for before, after in pairs]


def _damped_inverse(gram: Tensor) -> Tensor:
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Where nothing comes through, as of cores that are zero, no direction is better than another.
    if not bool(gram.any()):
        return identity
    damping = DAMPING / 10 * gram.diagonal().mean()
    inverse: Tensor = torch.linalg.inv(gram + damping * identity)
    return inverse
