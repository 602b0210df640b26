"""Moments of one weight once they are known, and the metrics that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ttcompress.calibrate.shifts import Shift
from ttcompress.calibrate.uses import Use
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import ModeMetric, Moments, mode_metrics

ALONE = 0.1
"""Share of the input metric that is of positions one by one, where an image has many.

What matters are sums over the positions of an image; but of these there are only as many as images."""


CONSTANT = 1e-6
"""Share of their squares below which inputs do not vary."""


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one weight: inputs (in, window) row-major, the same held out, and gradients at its outputs.

    `summed` has E[G^T G], G = sum_p g_p x_p^T the gradient of the weight over all positions p of an image, None where
    there is but one. `unseen` and `unfelt` are the shares of the input and the output metric that are spread evenly, `use`
    the one module at which the weight is seen, where there is one, `shift` what can take up its mean error. The product
    of the traces of input and output metric is what an image costs in all directions together.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    unseen: float = 0.0
    unfelt: float = 0.0
    use: Use | None = None
    shift: Shift | None = None
    summed: Moments | None = None

    @property
    def input_metric(self) -> Moments:
        """What an error at each input costs, apart from a mean error that something else takes up."""
        alone = varying(self.inputs, self.shift)
        if self.summed is None:
            return alone.blended(self.unseen)
        together = self.summed.scaled((1 - ALONE) * alone.trace / self.summed.trace)
        return Moments.total([alone.scaled(ALONE), together])

    @property
    def held_out_metric(self) -> Moments:
        """The same on the held-out images, whose positions count one by one.

        They are no fair sample of the rows of a table, most of which none of them looks up.
        """
        share = self.unseen if self.held_out.is_diagonal else 0.0
        return varying(self.held_out, self.shift).blended(share)

    @property
    def output_metric(self) -> Moments:
        """What an error at each output costs, as the gradients have it."""
        return self.outputs.blended(self.unfelt)

    @property
    def num_bytes(self) -> int:
        """Memory that the moments take where they are not laid aside."""
        return sum(each.num_bytes for each in self._moments)

    def lay_aside(self, spool: Spool) -> None:
        """Put the moments where they take less memory."""
        for each in self._moments:
            each.lay_aside(spool.lay)

    @property
    def _moments(self) -> list[Moments]:
        found = (self.inputs, self.held_out, self.outputs, self.summed)
        return [each for each in found if each is not None]

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode, in which squared norms are changes of the network's outputs."""
        return mode_metrics(tensorization, self.input_metric, self.output_metric, diagonal)

    def metrics_of_steps(self, tensorization: Tensorization) -> list[ModeMetric]:
        """The same where nothing takes up a mean error, which a step makes like any other."""
        return mode_metrics(tensorization, self.inputs.blended(self.unseen), self.output_metric)


def varying(moments: Moments, shift: Shift | None) -> Moments:
    """What an error is multiplied by: inputs around their mean, where something takes up a mean error."""
    return moments if shift is None else around_mean(moments)


def around_mean(moments: Moments) -> Moments:
    """Covariances, where there is more to them than round-off: of inputs that are always the same the mean is all."""
    around = moments.centred()
    return around if around.trace > CONSTANT * moments.trace else moments


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the weights."""
