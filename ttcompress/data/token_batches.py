"""Training batches of tokens: shuffled, those of similar length together, padded to the longest of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ttcompress.data.by_length import MASK
from ttcompress.data.sending import sent
from ttcompress.data.tokens import TOKENS, TokenSamples

POOL = 32
"""So many batches are sorted by length together, so that little of a batch is padding."""


@dataclass(frozen=True)
class TokenStream:
    """Samples of text as epochs of `steps` batches; what a batch holds depends on the seed, the epoch and its number."""

    samples: TokenSamples
    batch_size: int
    seed: int
    device: torch.device

    @property
    def steps(self) -> int:
        """Batches an epoch; the last samples of its order that fill no batch wait for another epoch."""
        return max(1, len(self.samples) // self.batch_size)

    @property
    def sample(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The first batch of all."""
        return next(self.epoch(0))

    def mean_count(self, images: dict[str, Tensor]) -> float:
        """Of this very batch."""
        return float(len(images[TOKENS]))

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Yield ({input_ids (N, L), attention_mask (N, L)}, labels (N,) or None) on the device, from `start` on."""
        labels = self.samples.labels
        for indices in self._batches(number)[start:]:
            inputs = {name: sent(each, self.device) for name, each in self._padded(indices).items()}
            own = None if labels is None else torch.tensor([labels[index] for index in indices])
            yield inputs, None if own is None else sent(own, self.device)

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
        order = generator.permutation(len(self.samples)).tolist()
        lengths = self.samples.lengths

        batches: list[list[int]] = []
        pool_size = POOL * self.batch_size
        for first in range(0, len(order), pool_size):
            pool = sorted(order[first : first + pool_size], key=lambda index: lengths[index])
            batches += [pool[at : at + self.batch_size] for at in range(0, len(pool), self.batch_size)]

        # What does not fill a batch is left out, but where there is no other.
        full = [batch for batch in batches if len(batch) == self.batch_size] or batches
        return [full[place] for place in generator.permutation(len(full))][: self.steps]

    def _padded(self, indices: list[int]) -> dict[str, Tensor]:
        rows = [self.samples.rows[index] for index in indices]
        longest = max(map(len, rows))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        return {TOKENS: tokens, MASK: mask}
