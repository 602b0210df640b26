"""Texts made up for networks that read them, and the one tensor of what such a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import DataError
from ttcompress.networks.reader import Reader
from ttcompress.networks.running import Example, NetworkInput, call, tensors_of

USUAL_TOKENS = 128
"""Of a text that is made up where nobody says how many."""
ROWS = 8
"""Texts that are made up; they come again and again."""
OUTPUTS = ("logits", "last_hidden_state")
"""What counts of an output that has several parts, the first that it has."""


def text_example(model: nn.Module, reader: Reader, tokens: int | None = None) -> Example:
    """Texts of so many tokens, drawn from the table of the network but for its padding, nothing of them masked.

    Raises:
        DataError: more tokens than the network takes.
    """
    count = tokens or min(USUAL_TOKENS, reader.usual)
    if count > reader.longest:
        raise DataError(
            f"--input-size {count} is more tokens than the {reader.longest} that the network takes"
        )
    config: Any = model.config
    text = config.get_text_config()
    numbers = torch.randint(0, text.vocab_size, (ROWS, count), generator=torch.Generator().manual_seed(0))
    # Networks like RoBERTa count positions without it.
    padding = getattr(text, "pad_token_id", None)
    if padding is not None:
        numbers[numbers == padding] = (padding + 1) % text.vocab_size
    made = {"input_ids": numbers, "attention_mask": torch.ones_like(numbers)}
    return Example(inputs={name: made[name] for name in reader.inputs})


def half_masked(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the second half of every other text behind the mask, as where a batch is padded."""
    made = {name: each.clone() for name, each in inputs.items()}
    if "attention_mask" in made:
        mask = made["attention_mask"]
        mask[1::2, mask.shape[1] // 2 :] = 0
    return made


@torch.no_grad()
def output_name(model: nn.Module, inputs: NetworkInput) -> str | None:
    """The part of an output that counts; None where the output is one tensor.

    Raises:
        DataError: there is no tensor in it.
    """
    output = call(model, inputs)
    if isinstance(output, Tensor):
        return None
    if isinstance(output, Mapping):
        names = [name for name, part in output.items() if isinstance(part, Tensor)]
        known = [name for name in OUTPUTS if name in names]
        if names:
            return str((known or names)[0])
    if not tensors_of(output):
        raise DataError(f"the network returns {type(output).__name__}, in which there is no tensor")
    return ""


class Answering(nn.Module):
    """A network by the names of its inputs, of whose output one tensor is returned, as files of runtimes have it."""

    def __init__(self, network: nn.Module, output: str | None) -> None:
        """Wrap a network; `output` as `output_name` has it."""
        super().__init__()
        self.network = network
        self._output = output

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What counts of the output."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        found = self.network(**{name: each for name, each in given.items() if each is not None})
        return answer_of(found, self._output)


class AnsweringOne(nn.Module):
    """The same of a network of one input without a name, such as images."""

    def __init__(self, network: nn.Module, output: str | None) -> None:
        """Wrap a network; `output` as `output_name` has it."""
        super().__init__()
        self.network = network
        self._output = output

    def forward(self, x: Tensor) -> Tensor:
        """What counts of the output."""
        return answer_of(self.network(x), self._output)


def answer_of(output: Any, name: str | None) -> Tensor:
    """The tensor of an output that counts, by the name that `output_name` gave it."""
    if name is None:
        answer: Tensor = output
        return answer
    return output[name] if name else tensors_of(output)[0]
