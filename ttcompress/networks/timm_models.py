"""Networks of timm: built by name and by what a config.json says of them, never fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ttcompress.errors import ArchitectureError
from ttcompress.files.header import canonical_json
from ttcompress.files.model_folder import COMPRESSED, CONFIG, check_config
from ttcompress.files.writing import write_safetensors
from ttcompress.networks.factories import one_line
from ttcompress.records.report import Architecture, Preprocessing

CLASSES = 1000
"""Of networks of which timm knows no weights."""
REFUSED = ("pretrained", "checkpoint", "cache", "scriptable", "exportable", "features_only")
"""How arguments begin that make timm load, fetch or compile something."""


def check_installed() -> Any:
    """The library.

    Raises:
        ArchitectureError: it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ArchitectureError('the network needs timm: pip install "ttcompress[timm]"') from error
    return timm


def names() -> list[str]:
    """The networks that the installed timm has."""
    return list(check_installed().list_models())


def has(name: str) -> bool:
    """Whether timm has a network, named with or without the weights after a dot."""
    return bool(check_installed().is_model(name.partition(".")[0]))


def default_classes(name: str) -> int:
    """The classes that a network has where nobody says how many."""
    return int(_known(name).get("num_classes") or CLASSES)


def _known(name: str) -> dict[str, Any]:
    """What timm knows of the weights of a network."""
    found = check_installed().models.get_pretrained_cfg(name, allow_unregistered=True)
    return dict(found.to_dict()) if found is not None else {}


def architecture(name: str, config: Mapping[str, Any]) -> Architecture:
    """The network that a config.json names.

    Raises:
        ArchitectureError: timm has none of this name, or it is made with what would load something else.
    """
    if not has(name):
        raise ArchitectureError(
            f"timm {check_installed().__version__} has no network {name!r}; a newer one may have"
        )
    classes = config.get("num_classes", (config.get("pretrained_cfg") or {}).get("num_classes"))
    arguments = {"num_classes": classes} if isinstance(classes, int) and classes >= 0 else {}
    made = Architecture("timm", name, arguments, config=config, library=check_installed().__version__)
    constructor(made)
    return made


def constructor(architecture: Architecture) -> Callable[..., nn.Module]:
    """What builds a network, but for its `arguments`.

    Raises:
        ArchitectureError: timm does not have it, or it is made with what would load something else.
    """
    check_config(architecture.name, architecture.config)
    given = architecture.config.get("model_args") or {}
    if not isinstance(given, Mapping):
        raise ArchitectureError(f"{architecture.name}: model_args must be an object")
    more = {key: value for key, value in given.items() if key not in architecture.arguments}
    pool = architecture.config.get("global_pool")
    if isinstance(pool, str):
        more.setdefault("global_pool", pool)
    if refused := [key for key in more if key.startswith(REFUSED)]:
        raise ArchitectureError(f"{architecture.name}: model_args.{refused[0]} is not for a file to say")
    make: Callable[..., nn.Module] = partial(
        check_installed().create_model, architecture.name, pretrained=False, **more
    )
    return make


def preprocessing(architecture: Architecture) -> Preprocessing:
    """Normalisation and size of images, as config.json says, else as timm knows of the network.

    Raises:
        ArchitectureError: it says something else than numbers.
    """
    stated = architecture.config.get("pretrained_cfg")
    known = {**_known(architecture.name), **(stated if isinstance(stated, Mapping) else {})}
    try:
        resolved = check_installed().data.resolve_data_config(pretrained_cfg=known)
        channels, height, width = map(int, resolved["input_size"])
        resize = int(min(height, width) / float(resolved["crop_pct"]))
        mean, std = (tuple(map(float, resolved[key])) for key in ("mean", "std"))
        return Preprocessing(mean, std, (channels, height, width), resize)
    except Exception as error:
        raise ArchitectureError(
            f"pretrained_cfg of {architecture.name} does not say how images are prepared: {one_line(error)}"
        ) from error


def save(model: nn.Module, architecture: Architecture, folder: Path) -> None:
    """Write a dense network into a folder that timm loads as `local-dir:FOLDER`."""
    config = {
        **architecture.config,
        "architecture": architecture.name.partition(".")[0],
        **architecture.arguments,
    }
    config.setdefault("pretrained_cfg", _known(architecture.name))
    (folder / CONFIG).write_text(canonical_json(config))
    write_safetensors(folder / COMPRESSED, model.state_dict())
