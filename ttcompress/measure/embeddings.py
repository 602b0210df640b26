"""How alike the vectors are that two encoders make of the same texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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


def cosines(dense: Tensor, compressed: Tensor) -> NDArray[np.float64]:
    """Of the angles between the vectors of the same texts (texts)."""
    found: NDArray[np.float64] = (dense.double() * compressed.double()).sum(1).numpy()
    # Rounding may have a vector a little longer than 1.
    return found.clip(-1, 1)


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
    return cosines(vectors[0::2], vectors[1::2])
