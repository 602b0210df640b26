"""What networks return: a tensor, or several in tuples, mappings and records, nested; each has a dotted name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.errors import DataError, shortlist
from ttcompress.networks.running import NetworkInput, batch_size, call

LOGITS = "logits"
MOST_NAMES = 12


def tensors_by_name(output: Any) -> dict[str, Tensor]:
    """All tensors of an output, in order; their names are keys, fields and indices with dots between.

    A tensor by itself has the name "". Objects of other kinds, such as caches of attention, count as no structure.

    >>> list(tensors_by_name({"boxes": torch.ones(2, 4), "heads": (torch.ones(2, 3), None, torch.ones(2))}))
    ['boxes', 'heads.0', 'heads.2']
    """
    return dict(_walk(output, ""))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    for part, inner in _parts(value):
        yield from _walk(inner, f"{name}.{part}" if name else part)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), each) for key, each in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, tuple | list):
        return [(str(index), each) for index, each in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return ()


def numbers_by_name(output: Any) -> dict[str, Tensor]:
    """Those of an output that are floating-point."""
    return {name: each for name, each in tensors_by_name(output).items() if each.is_floating_point()}


def named_parts(output: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """The floating-point tensors under these names: a name may stand for a whole part of the structure.

    Parts of objects that are no structure are found by their attributes.

    Raises:
        DataError: an output that is a tensor by itself, or a name that there is not.
    """
    if isinstance(output, Tensor):
        raise DataError(f"--outputs {','.join(names)}: the network returns one tensor, which has no parts")

    found: dict[str, Tensor] = {}
    for name in names:
        part = numbers_by_name(_part_at(output, name))
        if not part:
            raise DataError(f"--outputs: there is no {name!r} with numbers; {described_output(output)}")
        found |= {f"{name}.{inner}" if inner else name: each for inner, each in part.items()}
    return found


def _part_at(value: Any, name: str) -> Any:
    """The part of this dotted name, None where there is none."""
    if not name:
        return value
    for key, each in _parts(value):
        if name == key:
            return each
        # Keys may have dots in them.
        if name.startswith(f"{key}."):
            return _part_at(each, name[len(key) + 1 :])
    first, _, rest = name.partition(".")
    inner = getattr(value, first, None)
    return inner if callable(inner) else _part_at(inner, rest) if inner is not None else None


def described_output(output: Any) -> str:
    """What a network returns, for messages."""
    kind = type(output).__name__
    parts = [f"{name} {tuple(each.shape)}" for name, each in tensors_by_name(output).items()]
    return (
        f"the network returns a {kind} of {shortlist(parts, MOST_NAMES)}"
        if parts
        else f"the network returns {kind}"
    )


# -------------------------------------------------------------------------------------------------------------- logits


def logits_of(output: Any, names: Sequence[str] = ()) -> Tensor:
    """The logits (inputs, classes) in an output.

    They are the tensor itself, or what is called `logits`, or the only floating-point tensor of two dimensions, of all
    or of those that are named.

    Raises:
        DataError: nothing or several things could be the logits.
    """
    if isinstance(output, Tensor) and not names:
        return _checked_logits(output)

    numbers = named_parts(output, names) if names else numbers_by_name(output)
    if LOGITS in numbers:
        return _checked_logits(numbers[LOGITS])
    able = [each for each in numbers.values() if each.dim() == 2]
    if len(able) != 1:
        many = "none" if not able else "more than one"
        advice = "name it with --outputs" if len(able) > 1 else "measure it otherwise"
        raise DataError(
            f"accuracy needs logits (images, classes), and {many} of its tensors could be these: {advice}; "
            f"{described_output(output)}"
        )
    return able[0]


def _checked_logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise DataError(f"accuracy needs logits (images, classes); the network returns {tuple(logits.shape)}")
    return logits


# ------------------------------------------------------------------------------------------------- several as one tensor


@dataclass(frozen=True)
class ChosenOutputs:
    """An answer: some tensors of an output, as they are if there is one, else as rows (inputs, 1, numbers).

    Several are put side by side, each divided by its root mean square norm on calibration data, so that the squared
    error of each counts as a share of its own power. `norms` are these, by dotted name.
    """

    norms: Mapping[str, float]

    def __call__(self, model: nn.Module, inputs: NetworkInput) -> Tensor:
        """The tensors for a batch.

        Raises:
            DataError: one is missing.
        """
        parts = named_parts(call(model, inputs), list(self.norms))
        if len(self.norms) == 1:
            (only,) = parts.values()
            return only

        count = batch_size(inputs)
        widest = max((each.dtype for each in parts.values()), key=lambda dtype: dtype.itemsize)
        rows = [_rows(each.to(widest), count) / self.norms[name] for name, each in parts.items()]
        return torch.cat(rows, 1).unsqueeze(1)


def _rows(tensor: Tensor, count: int) -> Tensor:
    """The numbers of a tensor as rows (count, ...), whatever its axes are; zeros fill what does not divide."""
    flat = tensor.flatten()
    return functional.pad(flat, (0, -len(flat) % count)).reshape(count, -1)


@torch.no_grad()
def chosen_outputs(
    model: nn.Module, batches: Iterable[NetworkInput], names: Sequence[str] = ()
) -> ChosenOutputs | None:
    """What counts of an output: the parts that are named, else every floating-point tensor; None of a single tensor.

    Args:
        batches: on the device of the network; those on which the power of each tensor is measured.

    Raises:
        DataError: names that there are not, NaN or Inf, nothing that could be compared.
    """
    squares: dict[str, float] = {}
    count = 0
    for inputs in batches:
        output = call(model, inputs)
        if isinstance(output, Tensor) and not names:
            return None
        parts = named_parts(output, names) if names else numbers_by_name(output)
        if not parts:
            raise DataError(
                f"{described_output(output)}: nothing that could be compared with another network's"
            )
        if len(parts) == 1:
            return ChosenOutputs(dict.fromkeys(parts, 1.0))

        for name, each in parts.items():
            square = float(each.double().square().sum())
            if not isfinite(square):
                raise DataError(
                    f"{name}, which the network returns, is NaN or Inf: name what counts with --outputs"
                )
            squares[name] = squares.get(name, 0.0) + square
        count += batch_size(inputs)
    return ChosenOutputs({name: sqrt(total / count) or 1.0 for name, total in squares.items()})
