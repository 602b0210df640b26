"""What of a network's output counts: of whatever it returns, one tensor that is fitted to and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ttcompress.errors import DataError
from ttcompress.networks.reader import Pooling, Reader, Task
from ttcompress.networks.running import NetworkInput, call, one_tensor

Answer = Callable[[nn.Module, NetworkInput], Tensor]
"""Of a network and a batch, what is to stay as it is: logits (inputs, classes), or numbers of any other shape.

Where it has two dimensions, all of a row may be moved by the same number (`centred`). It may not be finite."""

plain_answer: Answer = one_tensor
"""The output itself, of networks that return one tensor."""


def answer_of(reader: Reader | None) -> Answer:
    """What of the output of a network that reads text counts, by what the network is for."""
    if reader is None:
        return plain_answer
    if reader.task is Task.ENCODER:
        return partial(_as_rows, partial(embeddings, reader.pooling))
    return next_tokens if reader.task is Task.CAUSAL else logits


def logits(model: nn.Module, inputs: NetworkInput) -> Tensor:
    """The logits among what a network returns: `logits` by name, or a single tensor.

    Raises:
        DataError: there are none.
    """
    return _named(call(model, inputs), "logits")


def hidden_states(model: nn.Module, inputs: NetworkInput) -> Tensor:
    """The vector of each token (texts, tokens, size), from the last layer."""
    return _named(call(model, inputs), "last_hidden_state")


def embeddings(pooling: Pooling, model: nn.Module, inputs: NetworkInput) -> Tensor:
    """The vector of each text (texts, size), of length 1; the texts of a batch have no padding.

    Texts are compared by the cosine of the angle between their vectors, so that lengths are of no use.
    """
    states = hidden_states(model, inputs)
    return functional.normalize(POOLED[pooling](states), dim=-1)


POOLED: Mapping[Pooling, Callable[[Tensor], Tensor]] = {
    Pooling.MEAN: lambda states: states.mean(1),
    Pooling.FIRST: lambda states: states[:, 0],
    Pooling.LAST: lambda states: states[:, -1],
    Pooling.MAX: lambda states: states.amax(1),
}


def next_tokens(model: nn.Module, inputs: NetworkInput) -> Tensor:
    """Twice the roots of the probabilities of the next token (texts, tokens, vocabulary).

    Half the squared distance of two such vectors is, to the second order, the divergence of Kullback and Leibler
    between the distributions, which is what perplexity counts (Hellinger's distance); their Gauss-Newton matrix is
    that of Fisher (Amari 1998).
    """
    return 2 * (logits(model, inputs).log_softmax(-1) / 2).exp()


def _as_rows(answer: Answer, model: nn.Module, inputs: NetworkInput) -> Tensor:
    """Vectors that are no logits, (inputs, 1, size): to move all of a vector by the same number is an error of theirs."""
    return answer(model, inputs).unsqueeze(1)


def _named(output: Any, name: str) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, name, None)
    if not isinstance(found, Tensor):
        kind = type(output).__name__
        raise DataError(f"the network returns {kind} without {name}, which is what counts of it")
    return found
