"""How a network reads text, and what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Task(StrEnum):
    """What a network that reads text is for."""

    CAUSAL = "causal"
    """It foretells the next token of a text."""
    ENCODER = "encoder"
    """It makes a vector of a text, by which texts are compared."""
    CLASSIFIER = "classifier"
    """It puts texts into classes."""


class Pooling(StrEnum):
    """How an encoder's vector of a text is made of the vectors of its tokens."""

    MEAN = "mean"
    FIRST = "first"
    LAST = "last"
    MAX = "max"


@dataclass(frozen=True)
class Reader:
    """The tokenizer of a network, and how its output is used.

    Attributes:
        task: what the network is for.
        tokenize: texts as token numbers, with the special tokens that belong around each, neither cut nor padded.
        longest: tokens of the longest sequence that the network takes.
        usual: tokens to which its makers cut a text.
        pooling: of encoders, how their vector is made.
        inputs: the names of the inputs that it takes, such as `input_ids` and `attention_mask`.
    """

    task: Task
    tokenize: Callable[[Sequence[str]], list[list[int]]]
    longest: int
    usual: int
    pooling: Pooling = Pooling.MEAN
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
