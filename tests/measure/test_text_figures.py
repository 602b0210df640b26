"""Perplexity and likeness of vectors, against NumPy."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ttcompress.data.tokens import TokenSamples
from ttcompress.errors import DataError
from ttcompress.measure.embeddings import cosines, embedded, nearest, pair_cosines, same_neighbour
from ttcompress.measure.perplexity import surprise
from ttcompress.networks.answers import embeddings, next_tokens
from ttcompress.networks.reader import Pooling


class Bigrams(nn.Module):
    """A causal language model that knows the last token only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(size, size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table(input_ids), last_hidden_state=self.table(input_ids))


@pytest.fixture
def bigrams() -> Bigrams:
    torch.manual_seed(0)
    return Bigrams(7)


ROWS = ((0, 1, 2, 3), (4, 5, 6, 0), (3, 1))


def test_perplexity_is_that_of_the_probabilities(bigrams: Bigrams) -> None:
    samples = TokenSamples("x", ROWS)
    found = surprise(bigrams, samples.batches(range(3), 2))
    table = bigrams.table.weight.detach().double().numpy()
    logs = table - np.log(np.exp(table).sum(1, keepdims=True))
    sums = [-sum(logs[a, b] for a, b in pairwise(row)) for row in ROWS]
    assert found.num_tokens == 7
    assert found.perplexity == pytest.approx(np.exp(sum(sums) / 7))
    low, high = found.interval
    assert low < found.perplexity < high


def test_a_network_that_is_broken_has_no_perplexity(bigrams: Bigrams) -> None:
    bigrams.table.weight.data[3] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        surprise(bigrams, TokenSamples("x", ROWS).batches(range(3), 2))


def test_half_the_squared_distance_is_the_divergence(bigrams: Bigrams) -> None:
    """To the second order, for a small change of the network."""
    other = Bigrams(7).double()
    other.table.weight.data = bigrams.double().table.weight + 1e-3 * torch.randn(7, 7, dtype=torch.float64)
    inputs = {"input_ids": torch.arange(7)[None], "attention_mask": torch.ones(1, 7)}
    ours, theirs = (next_tokens(each, inputs) for each in (other, bigrams))
    p, q = (each.square() / 4 for each in (theirs, ours))
    divergence = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close((ours - theirs).square().sum(-1) / 2, divergence, rtol=1e-2, atol=0)


@pytest.mark.parametrize("pooling", list(Pooling))
def test_vectors_are_pooled_and_of_length_one(pooling: Pooling, bigrams: Bigrams) -> None:
    inputs = {"input_ids": torch.tensor(ROWS[:2]), "attention_mask": torch.ones(2, 4)}
    states = bigrams.table.weight.detach().numpy()[np.array(ROWS[:2])]
    wanted = {"mean": states.mean(1), "first": states[:, 0], "last": states[:, -1], "max": states.max(1)}[
        pooling
    ]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(embeddings(pooling, bigrams, inputs).detach().numpy(), wanted, rtol=1e-5)


def test_vectors_come_in_the_order_of_the_texts(bigrams: Bigrams) -> None:
    samples = TokenSamples("x", ROWS)
    found = embedded(bigrams, samples.indexed_batches([2, 0, 1], 1), 3, Pooling.FIRST)
    firsts = torch.tensor([row[0] for row in ROWS])
    wanted = torch.nn.functional.normalize(bigrams.table.weight.detach()[firsts], dim=1)
    torch.testing.assert_close(found, wanted)


def test_neighbours_and_pairs() -> None:
    vectors = torch.nn.functional.normalize(
        torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    of_all = (vectors @ vectors.T).numpy()
    np.fill_diagonal(of_all, -2)
    assert nearest(vectors).tolist() == of_all.argmax(1).tolist()
    assert same_neighbour(vectors, vectors) == 100
    np.testing.assert_allclose(cosines(vectors, -vectors), -np.ones(9))
    found = pair_cosines(vectors[:8])
    np.testing.assert_allclose(found, [of_all[k, k + 1] for k in range(0, 8, 2)], rtol=1e-5)
