"""Texts as token numbers: one text a sample, or all of them packed into samples of one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ttcompress.data.by_length import MASK, batches_of_one_length
from ttcompress.errors import DataError

Tokenize = Callable[[Sequence[str]], list[list[int]]]
TOKENS = "input_ids"
LEAST = 2
"""Tokens of a packed sample, of which at least one is to be foretold."""


@dataclass(frozen=True)
class TokenSamples:
    """Samples of tokens in a fixed order, each without padding.

    `labels` are the classes of the samples, where they have any.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(row) for row in self.rows]

    def chosen(self, indices: Sequence[int]) -> TokenSamples:
        """The samples at these places, in this order."""
        labels = self.labels and tuple(self.labels[index] for index in indices)
        return TokenSamples(self.name, tuple(self.rows[index] for index in indices), labels)

    def indexed_batches(
        self, indices: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of these samples, all of a batch equally long, with their indices.

        Yields (indices (N,), {input_ids (N, L), attention_mask (N, L), all ones}), int64 on the CPU.
        """
        for chosen in batches_of_one_length(indices, self.lengths, batch_size):
            tokens = torch.tensor([self.rows[index] for index in chosen])
            yield chosen, {TOKENS: tokens, MASK: torch.ones_like(tokens)}

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[dict[str, Tensor]]:
        """The same without the indices."""
        return (inputs for _, inputs in self.indexed_batches(indices, batch_size))


def one_by_one(
    name: str, texts: Sequence[str], tokenize: Tokenize, most: int, labels: Sequence[int] | None = None
) -> TokenSamples:
    """One sample a text; of longer ones the first `most` tokens, the last of which is the one that ends the text.

    Raises:
        DataError: a text without any token.
    """
    rows = [_cut(row, most) for row in tokenize(texts)]
    if not all(rows):
        raise DataError(f"{name}: text {[bool(row) for row in rows].index(False) + 1} has no tokens")
    return TokenSamples(name, tuple(rows), None if labels is None else tuple(labels))


def _cut(row: Sequence[int], most: int) -> tuple[int, ...]:
    # What a tokenizer puts at the end of every text stays there.
    return tuple(row) if len(row) <= most else (*row[: most - 1], row[-1])


def packed(name: str, documents: Sequence[str], tokenize: Tokenize, length: int) -> TokenSamples:
    """All documents one after the other, cut into samples of `length` tokens; the last one may be shorter.

    Raises:
        DataError: too little text for one sample.
    """
    tokens = list(chain.from_iterable(tokenize(documents)))
    rows = [tuple(tokens[start : start + length]) for start in range(0, len(tokens), length)]
    if len(rows[-1:]) and len(rows[-1]) < LEAST:
        rows.pop()
    if not rows:
        raise DataError(f"{name}: too little text: {len(tokens)} tokens, at least {LEAST} are needed")
    return TokenSamples(name, tuple(rows))
