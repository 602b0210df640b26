"""What a training teaches: which numbers of a network's output are learned, and from what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from ttcompress.data.by_length import MASK
from ttcompress.data.tokens import TOKENS
from ttcompress.networks.running import run
from ttcompress.train.loss import training_loss
from ttcompress.train.options import TrainingOptions


class Lesson(ABC):
    """How the output of a network is learned from labels, from a teacher's output, or from both."""

    @abstractmethod
    def answers(self, network: Any, inputs: Any) -> Tensor:
        """What is learned of the output for a batch, float32 with a row (classes or size) a thing that is learned."""

    def labels(self, inputs: Any, labels: Tensor | None) -> Tensor | None:
        """The right class of every row, where there is one."""
        return labels

    @abstractmethod
    def loss(
        self, answers: Tensor, labels: Tensor | None, taught: Tensor | None, options: TrainingOptions
    ) -> Tensor:
        """The mean over the rows; `taught` are the answers of the teacher."""

    @abstractmethod
    def num_right(self, answers: Tensor, labels: Tensor | None, taught: Tensor | None) -> Tensor:
        """How many rows are right, all of them if none is wrong."""


class Classes(Lesson):
    """Logits, a row an input."""

    def answers(self, network: Any, inputs: Any) -> Tensor:
        """The logits of the main head: by their name, or first where auxiliary heads give theirs too."""
        output = run(network, inputs)
        main = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if not isinstance(main, Tensor):
            parts = list(output.values()) if isinstance(output, Mapping) else output
            main = parts[0] if isinstance(parts, tuple | list) else parts
        return main.float()

    def loss(
        self, answers: Tensor, labels: Tensor | None, taught: Tensor | None, options: TrainingOptions
    ) -> Tensor:
        """See `training_loss`."""
        return training_loss(answers, labels, taught, options)

    def num_right(self, answers: Tensor, labels: Tensor | None, taught: Tensor | None) -> Tensor:
        """Rows with their label, or where there are no labels the class that the teacher gives them."""
        classes = answers.argmax(1)
        targets = labels
        if targets is None:
            targets = classes if taught is None else taught.argmax(1)
        return (classes == targets).sum()


class NextTokens(Classes):
    """Logits of a causal language model, a row a token that has a next one."""

    def answers(self, network: Any, inputs: Any) -> Tensor:
        """At all tokens but the last of each sample."""
        return run(network, inputs).logits[:, :-1].flatten(0, 1).float()  # type: ignore[no-any-return]

    def labels(self, inputs: Any, labels: Tensor | None) -> Tensor | None:
        """The token that comes next."""
        return inputs[TOKENS][:, 1:].flatten()  # type: ignore[no-any-return]


class Vectors(Lesson):
    """The vectors that an encoder makes of tokens, a row a token; padding has none."""

    def answers(self, network: Any, inputs: Any) -> Tensor:
        """From the last layer."""
        states: Tensor = run(network, inputs).last_hidden_state
        return states[inputs[MASK].bool()].float()

    def loss(
        self, answers: Tensor, labels: Tensor | None, taught: Tensor | None, options: TrainingOptions
    ) -> Tensor:
        """The squared distance from the teacher's vectors over their squared length."""
        theirs = _required(taught)
        return (answers - theirs).square().sum() / theirs.square().sum()

    def num_right(self, answers: Tensor, labels: Tensor | None, taught: Tensor | None) -> Tensor:
        """The sum of the cosines to the teacher's vectors."""
        return functional.cosine_similarity(answers, _required(taught)).clamp(min=0).sum()


def _required(taught: Tensor | None) -> Tensor:
    """The answers of a teacher.

    Raises:
        ValueError: there is none.
    """
    if taught is None:
        raise ValueError("vectors are learned from a teacher")
    return taught
