"""How alike the vectors are that two encoders make of the same texts, and how well they say what is alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import atanh, sqrt, tanh

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ttcompress.measure.perplexity import Z
from ttcompress.networks.answers import embeddings
from ttcompress.networks.reader import Pooling
from ttcompress.networks.running import finite, placed
from ttcompress.records.common import Progress

ROWS_AT_A_TIME = 1024
"""Texts whose cosines to all others are held at a time."""


@torch.inference_mode()
def embedded(
    model: nn.Module,
    batches: Iterable[tuple[Sequence[int], Mapping[str, Tensor]]],
    count: int,
    pooling: Pooling,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """The vectors (texts, size) of an encoder, of length 1, float32 on the CPU, in eval mode.

    Args:
        batches: indices of texts, and these texts as inputs of the network, in any order.
        count: how many texts there are.

    Raises:
        DataError: a network that returns no hidden states, or NaN.
    """
    was_training = model.training
    model.eval()
    found: Tensor | None = None
    done = 0
    try:
        for indices, inputs in batches:
            vectors = finite(embeddings(pooling, model, placed(inputs, device))).float().cpu()
            if found is None:
                found = vectors.new_zeros(count, vectors.shape[1])
            found[list(indices)] = vectors
            done += len(indices)
            if progress:
                progress("evaluating", done, count)
    finally:
        model.train(was_training)
    return torch.zeros(count, 0) if found is None else found


def mean_cosine(dense: Tensor, compressed: Tensor) -> float:
    """Of the angles between the vectors of the same texts."""
    # Rounding may have a vector a little longer than 1.
    return min(1.0, float((dense.double() * compressed.double()).sum(1).mean()))


def nearest(vectors: Tensor) -> Tensor:
    """For each text the index of the other one that is most like it, the first of several."""
    found = []
    for start in range(0, len(vectors), ROWS_AT_A_TIME):
        part = vectors[start : start + ROWS_AT_A_TIME] @ vectors.T
        rows = torch.arange(len(part))
        part[rows, rows + start] = -torch.inf
        found.append(part.argmax(1))
    return torch.cat(found)


def same_neighbour(dense: Tensor, compressed: Tensor) -> float:
    """Percent of texts whose nearest other text is the same for both."""
    return 100 * float((nearest(dense) == nearest(compressed)).double().mean())


def pair_cosines(vectors: Tensor) -> NDArray[np.float64]:
    """Cosines of neighbours: of the first and the second text, of the third and the fourth, and so on."""
    first, second = vectors.double()[0::2], vectors.double()[1::2]
    cosines: NDArray[np.float64] = (first * second).sum(1).numpy()
    return cosines


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 where all of one are equal."""
    x, y = (_ranks(np.asarray(each, dtype=np.float64)) for each in (first, second))
    x, y = x - x.mean(), y - y.mean()
    scale = sqrt(float((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts - 1) / 2
    ranks: NDArray[np.float64] = middle[place]
    return ranks


def correlation_interval(r: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a rank correlation of n pairs (Fisher's z; the variance of Bonett and Wright 2000)."""
    if n < 4 or abs(r) >= 1:
        return (r, r) if abs(r) >= 1 else (-1.0, 1.0)
    half = Z * sqrt((1 + r * r / 2) / (n - 3))
    return tanh(atanh(r) - half), tanh(atanh(r) + half)
