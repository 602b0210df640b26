"""What a network calls its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from ttcompress.errors import DataError, shortlist

POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
MOST_NAMES = 20


def by_input_names(model: nn.Module, arrays: Mapping[str, Tensor], where: str) -> Tensor | dict[str, Tensor]:
    """Arrays as the network takes them: by name, or one alone, whatever it is called, of a network of one input.

    Raises:
        DataError: a name that is no input, or an input that is missing.
    """
    parameters = dict(signature(model.forward).parameters)
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
    named = {name for name, each in parameters.items() if each.kind in (*POSITIONAL, Parameter.KEYWORD_ONLY)}
    needed = [name for name in named if parameters[name].default is Parameter.empty]

    if len(arrays) == 1:
        ((name, only),) = arrays.items()
        may_stand_first = any(
            each.kind in (*POSITIONAL, Parameter.VAR_POSITIONAL) for each in parameters.values()
        )
        if name not in named and len(needed) <= 1 and may_stand_first and not takes_any:
            return only

    unknown = [] if takes_any else [name for name in arrays if name not in named]
    if unknown:
        raise DataError(
            f"{where}: {shortlist(unknown)} {'is' if len(unknown) == 1 else 'are'} no input of the network, "
            f"which takes {_listed(parameters)}; images are in an array 'images'"
        )
    missing = [name for name in parameters if name in needed and name not in arrays]
    if missing:
        raise DataError(f"{where}: lacks {shortlist(missing)}; the network takes {_listed(parameters)}")
    return dict(arrays)


def _listed(parameters: Mapping[str, Any]) -> str:
    return shortlist(parameters, MOST_NAMES) or "no input"
