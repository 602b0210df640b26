"""Running a network on a batch, and what it takes: inputs, device, type, and outputs that can be measured.

A network may take one tensor, several in order (a tuple or a list) or several by name (a mapping); what is no
tensor among them is handed on as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import DataError, ShapeError, TTCompressError, is_out_of_memory
from ttcompress.layers.base import TTLayer
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.rebuilt import TTWeight

NetworkInput = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch of what a network takes."""
PLAIN_ERRORS = (RuntimeError, ValueError, AssertionError, IndexError, TypeError)
"""Those whose messages stand alone; of others the name says what the message does not."""


def input_dtype(model: nn.Module) -> torch.dtype:
    """The widest type among the parameters, TT-cores aside: those run in the type of their input."""
    tt_parts = [module for module in model.modules() if isinstance(module, TTLayer | TTWeight)]
    cores = {id(core) for part in tt_parts for core in part.cores}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in cores]

    types = [parameter.dtype for parameter in dense if parameter.is_floating_point()]
    return max(types, key=lambda dtype: dtype.itemsize, default=torch.get_default_dtype())


# -------------------------------------------------------------------------------------------------------------- inputs


def map_tensors(change: Callable[[Tensor], Tensor], inputs: NetworkInput) -> Any:
    """The same inputs with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: map_tensors(change, each) for name, each in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(map_tensors(change, each) for each in inputs)
    return inputs


def tensors_of(inputs: NetworkInput) -> list[Tensor]:
    """All tensors of a batch, in order."""
    found: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(remember, inputs)
    return found


def batch_size(inputs: NetworkInput) -> int:
    """How many inputs a batch holds: the length of its first tensor.

    Raises:
        DataError: it holds no tensor, or one without a first dimension.
    """
    first = next(iter(tensors_of(inputs)), None)
    if first is None or first.dim() == 0:
        raise DataError(
            f"a batch of inputs is tensors whose first dimension counts them, not {type(inputs).__name__}"
        )
    return len(first)


def placed(inputs: NetworkInput, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The inputs on a device and, but for whole numbers such as tokens, in this type."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return map_tensors(place, inputs)


def described(inputs: NetworkInput) -> str:
    """The shape of one input, for messages."""
    if isinstance(inputs, Tensor):
        return f"images of shape {tuple(inputs.shape[1:])}"
    names = inputs if isinstance(inputs, Mapping) else range(len(inputs))
    parts = [f"{name} {_shapes(inputs[name])}" for name in names]  # type: ignore[index]
    return f"inputs of shapes {', '.join(parts)}"


def _shapes(part: NetworkInput) -> str:
    tensors = tensors_of(part)
    return " ".join(str(tuple(tensor.shape[1:])) for tensor in tensors) or type(part).__name__


# ------------------------------------------------------------------------------------------------------------- running


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Errors of code that is not ours, as one line that says what failed.

    Raises:
        DataError: with the original error as its cause. What was refused by us before stays as it is.
    """
    try:
        yield
    except ShapeError as error:
        raise DataError(f"{what}: {error}") from error
    except TTCompressError:
        raise
    except SystemExit as error:
        raise DataError(f"{what}: it exits") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise DataError("out of memory; a smaller --batch-size takes less") from error
        raise DataError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what an error says, after its name where that line alone would not do."""
    line = next(iter(str(error).strip().splitlines()), "")
    if line and isinstance(error, PLAIN_ERRORS):
        return line
    name = type(error).__name__
    return f"{name}: {line}" if line else name


def run(model: nn.Module, inputs: NetworkInput) -> Any:
    """What the network returns for a batch; its errors are its own."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def call(model: nn.Module, inputs: NetworkInput) -> Any:
    """What the network returns for a batch, whatever that is.

    Raises:
        DataError: inputs that it does not take, or any other error of its own.
    """
    with blaming(f"the network does not take {described(inputs)}"):
        return run(model, inputs)


def forward(model: nn.Module, inputs: NetworkInput) -> Tensor:
    """What the network returns for a batch, where that can be measured.

    Raises:
        DataError: inputs that it does not take, an output that is no tensor, or one that is not finite.
    """
    return finite(one_tensor(model, inputs))


def one_tensor(model: nn.Module, inputs: NetworkInput) -> Tensor:
    """What the network returns for a batch, where that is one tensor, finite or not.

    Raises:
        DataError: inputs that it does not take, or an output that is no tensor.
    """
    output = call(model, inputs)
    if not isinstance(output, Tensor):
        raise DataError(f"the network returns {type(output).__name__}, not one tensor")
    return output


def finite(output: Tensor) -> Tensor:
    """The output, which can be measured.

    Raises:
        DataError: NaN or Inf in it.
    """
    if not output.is_meta and not bool(output.isfinite().all()):
        raise DataError("the network returns NaN or Inf on this data")
    return output


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def centred(outputs: Tensor) -> Tensor:
    """Logits have no meaning but for their differences."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.dim() == 2 and outputs.shape[1] > 1 else outputs


# ------------------------------------------------------------------------------------------------- inputs to try it on


@dataclass(frozen=True)
class Example:
    """What a network is counted and timed on: inputs at hand, or numbers made up in the shape of one input."""

    shape: tuple[int, ...] = ()
    inputs: NetworkInput | None = None

    def suited(self, model: nn.Module) -> Example:
        """The same, with tokens in the place of made-up numbers where the network looks its inputs up in a table.

        Raises:
            DataError: inputs that it does not take.
        """
        has_tables = any(
            isinstance(module, nn.Embedding | nn.EmbeddingBag | TTEmbedding) for module in model.modules()
        )
        if self.inputs is not None or not has_tables:
            return self

        numbers = self.zeros(model)
        refusal = _refusal(model, numbers)
        if refusal is None:
            return self
        if _refusal(model, numbers.long()) is None:
            return Example(inputs=numbers.long())
        advice = "an example of its inputs says more than their size, such as calibration data (--calib)"
        raise DataError(f"{refusal}; {advice}") from refusal.__cause__

    def zeros(self, model: nn.Module) -> Any:
        """One input: the first at hand, or zeros, on the device of the network."""
        if self.inputs is not None:
            return self.batch(model, 1)
        return self._made_up(torch.zeros, 1, device=device_of(model), dtype=input_dtype(model))

    def batch(self, model: nn.Module, size: int) -> Any:
        """So many inputs: those at hand again and again, or random ones, on the device of the network."""
        device, dtype = device_of(model), input_dtype(model)
        if self.inputs is None:
            drawn = self._made_up(torch.randn, size, generator=torch.Generator().manual_seed(0))
            return drawn.to(device, dtype)

        count = batch_size(self.inputs)
        indices = torch.arange(size) % count

        # What has another length, as a mask that all inputs share, is no row an input.
        def rows(tensor: Tensor) -> Tensor:
            return tensor[indices.to(tensor.device)] if tensor.dim() and len(tensor) == count else tensor

        return placed(map_tensors(rows, self.inputs), device, dtype)

    def _made_up(self, make: Callable[..., Tensor], size: int, **how: Any) -> Tensor:
        is_held = str(how.get("device")) != "meta"
        return made_up(make, (size, *self.shape), is_held, **how)


def made_up(make: Callable[..., Tensor], shape: Sequence[int], is_held: bool = True, **how: Any) -> Tensor:
    """Numbers made up in a shape, after a look at whether the memory of this machine holds so many.

    Raises:
        DataError: it does not.
    """
    too_large = f"inputs of shape {tuple(shape)} are more than this machine has memory for"
    if is_held and prod(shape) * torch.float32.itemsize > _physical_memory():
        raise DataError(too_large)
    with blaming(too_large):
        return make(*shape, **how)


@torch.no_grad()
def _refusal(model: nn.Module, inputs: NetworkInput) -> DataError | None:
    try:
        call(model, inputs)
    except DataError as error:
        return error
    return None


def _physical_memory() -> float:
    """Bytes; without end where the system does not say."""
    if not hasattr(os, "sysconf"):
        return inf
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
