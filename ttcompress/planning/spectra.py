"""Singular spectra of a layer's weight in every tensorization that is considered for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import hypot

import torch
from torch import Tensor

from ttcompress.tt.decompose import frobenius_norm, pooled_spectra, squared_spectra
from ttcompress.tt.shapes import Tensorization, tensorize_shape
from ttcompress.tt.whiten import ModeMetric, whitened

TRUSTED = 0.5
"""Share of a weight's norm in the metric of all its inputs and outputs that every tensorization has at least.

The metric of a tensorization is a product of the metrics of its modes (Martens and Grosse 2015 make it of
two), which knows nothing of correlations between modes. Where its norm is below this share it promises what
sweeps would not reach (measured in docs/calibration.md)."""


BOUNDED_ABOVE = 2048
"""Unfoldings with a longer short side may have bounds instead of singular values."""


Metric = Callable[[Tensorization], Sequence[ModeMetric]]
"""By tensorization of one weight: the metric of each mode in which its errors count."""


@dataclass(frozen=True, eq=False)
class TensorizationSpectra:
    """A weight in one tensorization: the spectra of its d - 1 unfoldings, and its norm.

    `cuts` holds the squared singular values of each unfolding over the squared norm, descending, float64.
    """

    cuts: tuple[Tensor, ...]
    norm: float
    is_bound: bool = False
    """Whether the singular values of large unfoldings are bounds, by which errors look smaller than they are."""


@dataclass(frozen=True, eq=False)
class LayerSpectra:
    """A weight in all its tensorizations, in the order in which they are considered."""

    tensorizations: tuple[TensorizationSpectra, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """As a file holds it: spectra under `TENSORIZATION.CUT`, counted from 0, and norms under `norm`."""
        norms = [each.norm for each in self.tensorizations]
        tensors = {"norm": torch.tensor(norms, dtype=torch.float64)}

        for number, each in enumerate(self.tensorizations):
            tensors |= {f"{number}.{cut}": spectrum for cut, spectrum in enumerate(each.cuts)}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerSpectra:
        """What `to_tensors` made tensors of."""
        norms = tensors["norm"].tolist()
        found = [TensorizationSpectra(_cuts(tensors, number), norm) for number, norm in enumerate(norms)]
        return cls(tuple(found))


def _cuts(tensors: Mapping[str, Tensor], number: int) -> tuple[Tensor, ...]:
    count = sum(name.startswith(f"{number}.") for name in tensors)
    return tuple(tensors[f"{number}.{cut}"] for cut in range(count))


def layer_spectra(
    weight: Tensor,
    tensorizations: Sequence[Tensorization],
    metric: Metric | None = None,
    bounded: Collection[int] = (),
) -> LayerSpectra:
    """The spectra of a weight in these tensorizations, as it is or in the metric of each.

    Of those whose places are `bounded`, unfoldings that take long have bounds instead.

    Raises:
        ShapeError: NaN or Inf in the weight.
    """
    if metric is None:
        norm = frobenius_norm(weight)
        plain = []
        for place, each in enumerate(tensorizations):
            most = BOUNDED_ABOVE if place in bounded else None
            own = tuple(squared_spectra(weight, each, most))
            plain.append(TensorizationSpectra(own, norm, place in bounded))
        return LayerSpectra(tuple(plain))

    groups = tensorizations[0].groups if tensorizations else 1
    blocks = list(weight) if groups > 1 else [weight]

    # A matrix has one mode for all inputs and one for all outputs, so that no correlation is lost.
    whole = tensorize_shape("lowrank", tuple(blocks[0].shape))
    least = TRUSTED * hypot(*map(frobenius_norm, _whitened(blocks, whole, metric)))
    found = []
    for place, each in enumerate(tensorizations):
        tensors = _whitened(blocks, each, metric)
        norms = [frobenius_norm(tensor) for tensor in tensors]
        most = BOUNDED_ABOVE if place in bounded else None
        cuts = pooled_spectra([squared_spectra(tensor, bounded_above=most) for tensor in tensors], norms)
        found.append(TensorizationSpectra(tuple(cuts), max(least, hypot(*norms)), place in bounded))
    return LayerSpectra(tuple(found))


def _whitened(blocks: Sequence[Tensor], tensorization: Tensorization, metric: Metric) -> list[Tensor]:
    """Each group's weight in the metric, which is one for all of them."""
    metrics = metric(tensorization)
    return [whitened(block, tensorization, metrics) for block in blocks]


def worth_bounding(tensorization: Tensorization) -> bool:
    """Whether the spectra of a tensorization take so long that bounds are looked at first."""
    return len(tensorization.modes) > 2 and max(tensorization.max_ranks()) > BOUNDED_ABOVE
