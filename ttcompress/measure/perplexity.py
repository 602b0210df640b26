"""How well a causal language model foretells a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp, inf

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.data.tokens import TOKENS
from ttcompress.measure.intervals import Interval, interval_around
from ttcompress.networks.answers import logits
from ttcompress.networks.running import finite, placed
from ttcompress.records.common import Progress


@dataclass(frozen=True)
class Surprise:
    """By sample of a text, the summed negative logarithm of the probabilities of its tokens, and how many they are.

    The first token of a sample follows nothing, and does not count.
    """

    sums: Tensor
    counts: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that were foretold."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Of a token, in nats."""
        return float(self.sums.sum()) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """The number of tokens among which one would have to guess to do as badly."""
        return _exp(self.mean)

    @property
    def interval(self) -> Interval:
        """95 % confidence interval of the perplexity, the samples taken as drawn from many."""
        low, high = interval_around(self.mean, self._influences) or (-inf, inf)
        return _exp(low), _exp(high)

    @property
    def _influences(self) -> Tensor:
        """How far each sample moves the mean, a ratio of sums."""
        return (self.sums - self.mean * self.counts) / self.counts.mean()

    def rise_interval(self, dense: Surprise) -> Interval | None:
        """95 % confidence interval of how far this perplexity is above that of another network on the same samples."""
        ours, theirs = (each.perplexity * each._influences for each in (self, dense))
        return interval_around(self.perplexity - dense.perplexity, ours - theirs)


def _exp(value: float) -> float:
    # Networks that are broken altogether are beyond all numbers.
    return exp(min(value, 700.0))


@torch.inference_mode()
def surprise(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Surprise:
    """Run a causal language model over samples of a text, in eval mode; its own mode is put back after.

    Every sample begins without what stands before it, so that with samples of L tokens one is foretold from L / 2 others
    on average (a stride of L).

    Raises:
        DataError: a network that returns no logits, or NaN.
    """
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    try:
        for inputs in batches:
            tokens = inputs[TOKENS].to(device)
            found = finite(logits(model, placed(inputs, device)))
            sums.append(token_losses(found, tokens).double().sum(1).cpu())
            counts.append(torch.full((len(tokens),), tokens.shape[1] - 1, dtype=torch.float64))
            if progress:
                progress("evaluating", sum(map(len, sums)), 0)
    finally:
        model.train(was_training)
    return Surprise(torch.cat(sums), torch.cat(counts))


def token_losses(found: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-probabilities (N, L - 1) of the tokens (N, L) from the second on, from logits (N, L, vocabulary)."""
    before = found[:, :-1].float().transpose(1, 2)
    return functional.cross_entropy(before, tokens[:, 1:], reduction="none")
