"""Networks of the transformers library: built from their configuration, filled with tensors that were read by us.

The library gets a configuration and tensors, never a name or a place, so that it has nothing to fetch or to run.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import ArchitectureError, CheckpointError, TTCompressError, shortlist
from ttcompress.files.model_folder import check_config, cleaned
from ttcompress.networks.factories import one_line
from ttcompress.networks.limits import MOST_PARAMETERS, within_limits
from ttcompress.records.report import Architecture

MISSING = 'needs the transformers library: pip install "ttcompress[transformers]"'


def check_installed() -> Any:
    """The library.

    Raises:
        ArchitectureError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ArchitectureError(f"the network {MISSING}") from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars, logs and warnings, and without a network connection."""
    check_installed()
    from huggingface_hub import constants
    from transformers.utils import logging

    verbosity, has_bars, offline = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        constants.HF_HUB_OFFLINE,
    )
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
        constants.HF_HUB_OFFLINE = offline


def architecture(name: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Architecture:
    """The reference to a class of the installed library.

    Raises:
        ArchitectureError: there is none of this name.
    """
    _class(name)
    return Architecture(
        "transformers", name, config=config, generation=generation, library=check_installed().__version__
    )


def architecture_of(model: nn.Module) -> Architecture | None:
    """The reference to the class of a network in memory; None where it is built in another way."""
    name, known = type(model).__name__, getattr(check_installed(), type(model).__name__, None)
    if known is not type(model):
        return None
    generation = getattr(model, "generation_config", None)
    config: Any = model.config
    stated = cleaned(json.loads(config.to_json_string(use_diff=False)))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Architecture(
        *("transformers", name),
        config={**_without_dtype(stated), "architectures": [name], "dtype": dtype},
        generation={} if generation is None else cleaned(json.loads(generation.to_json_string())),
        library=check_installed().__version__,
    )


def _class(name: str) -> Any:
    """A class of networks of the installed library, and of nothing else.

    Raises:
        ArchitectureError: it has none of this name.
    """
    library = check_installed()
    found: Any = getattr(library, name, None) if name.isidentifier() else None
    is_network = inspect.isclass(found) and issubclass(found, library.PreTrainedModel)
    if not is_network or found.config_class is None or not found.__module__.startswith("transformers."):
        raise ArchitectureError(
            f"transformers {library.__version__} has no network {name!r}; a newer version may have it, or "
            "name a function that builds it with --arch net.py:build"
        )
    return found


def _config(architecture: Architecture) -> Any:
    """The configuration as the library has it.

    Raises:
        ArchitectureError: it needs code of its own, or the library does not take it.
    """
    check_config(architecture.name, architecture.config)
    kind = _class(architecture.name).config_class
    with _blaming(f"the configuration of {architecture.name} is not taken"):
        return kind.from_dict(deepcopy(dict(architecture.config)))


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    try:
        yield
    except TTCompressError:
        raise
    except Exception as error:
        raise ArchitectureError(f"{what}: {one_line(error)}") from error


def build(architecture: Architecture, is_waiting: bool = True) -> nn.Module:
    """The network without weights: parameters on the meta device as torch makes them, buffers with their values.

    Args:
        is_waiting: without it parameters are random numbers.

    Raises:
        ArchitectureError: the library does not build it, or it would be larger than any network is.
    """
    with quiet():
        config = _config(architecture)
        kind = _class(architecture.name)
        with _blaming(f"transformers:{architecture.name} cannot be constructed"):

            def construct() -> nn.Module:
                with _default_dtype(_dtype_of(config)):
                    made: nn.Module = kind(deepcopy(config))
                return made

            model = within_limits(architecture.name, construct, MOST_PARAMETERS)
            if not is_waiting:
                model = construct()
        _set_generation(model, architecture)
    return model.eval()


def _set_generation(model: nn.Module, architecture: Architecture) -> None:
    """How texts are generated, where the folder said so."""
    if not architecture.generation or getattr(model, "generation_config", None) is None:
        return
    from transformers import GenerationConfig

    with _blaming(f"generation_config.json of {architecture.name} is not taken"):
        model.generation_config = GenerationConfig.from_dict(deepcopy(dict(architecture.generation)))


def _dtype_of(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(named: Architecture, tensors: Mapping[str, Tensor]) -> tuple[nn.Module, Architecture, list[str]]:
    """The network with these tensors, as the library itself puts them in: under its names of today, tied as it ties.

    Returns:
        The network in eval mode, its architecture with the type of its weights, and names that were not used.

    Raises:
        ArchitectureError: the library does not build it.
        CheckpointError: tensors that are missing or of another shape.
    """
    dtype = _stored_dtype(tensors, named.config)
    typed = Architecture(
        named.kind,
        named.name,
        config={**_without_dtype(named.config), "dtype": str(dtype).removeprefix("torch.")},
        generation=named.generation,
        library=named.library,
    )
    # Whether the network can be built at all, before memory goes into it.
    build(typed)
    with quiet():
        with _blaming(f"{named.name} does not take the weights"):
            model, info = _class(named.name).from_pretrained(
                None,
                config=_config(typed),
                state_dict=dict(tensors),
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        _set_generation(model, typed)
    _check_loaded(named.name, info)
    return model.eval(), typed, sorted(info["unexpected_keys"])


def _check_loaded(name: str, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    shapes = [
        f"{key} is {tuple(have)}, the network has {tuple(want)}"
        for key, have, want in sorted(info["mismatched_keys"])
    ]
    parts = {"missing": missing, "other shapes": shapes, "errors": list(info["error_msgs"])}
    if any(parts.values()):
        said = "; ".join(f"{word}: {shortlist(items, 4)}" for word, items in parts.items() if items)
        raise CheckpointError(f"the weights do not fit {name}: {said}")


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}


def _stored_dtype(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> torch.dtype:
    """The type of the weights as they are stored; of several, what the configuration says, else the most frequent."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if not counts:
        raise CheckpointError("the file holds no weights in floating point")

    stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or ""), None)
    most = max(counts, key=lambda dtype: counts[dtype])
    return stated if stated in counts else most


def save(model: nn.Module, folder: Path) -> None:
    """Write a dense network as the library does, under the names that its files have.

    Raises:
        CheckpointError: the library refuses, as it does where a configuration contradicts itself.
    """
    with quiet():
        try:
            model.save_pretrained(folder)  # type: ignore[operator]
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(f"transformers does not save the network: {one_line(error)}") from error
