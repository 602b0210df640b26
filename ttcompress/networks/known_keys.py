"""The keys of torchvision's networks, so that none has to be built to see that a checkpoint is of another.

Published weights depend on them, so that they stay. Networks that are not in the table are built and looked at.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("torchvision_keys.json")
"""Written by `python -m scripts.torchvision_keys`."""
OPTIONAL = "num_batches_tracked"
"""Keys that end so may be missing."""
NEAR = 0.2
"""Networks whose number of keys differs by no more than this share may be meant."""


class Keys(NamedTuple):
    """The keys of a state dict without the optional ones: how many, a digest, and the names that they begin with."""

    number: int
    digest: int
    children: str


def keys_of(keys: Iterable[str]) -> Keys:
    """What identifies a network by its keys."""
    required = sorted(key for key in keys if not key.endswith(OPTIONAL))
    children = sorted({key.partition(".")[0] for key in required})
    return Keys(len(required), zlib.crc32("\n".join(required).encode()), " ".join(children))


@cache
def _table() -> tuple[str, dict[str, list[Keys]]]:
    """The version that the table is of, and by network the keys of all forms that its checkpoints come in."""
    held = json.loads(FILE.read_text())
    of_version = held.pop("torchvision")
    return of_version, {name: [Keys(*form) for form in forms] for name, forms in held.items()}


def is_complete() -> bool:
    """Whether the table has all networks of the torchvision that is installed."""
    try:
        return version("torchvision").partition("+")[0] == _table()[0]
    except PackageNotFoundError:
        return False


def unknown(names: Iterable[str]) -> list[str]:
    """Those that the table does not have."""
    return [name for name in names if name not in _table()[1]]


def with_keys(keys: Keys) -> list[str]:
    """The networks that have exactly these keys."""
    return [name for name, forms in _table()[1].items() if any(form[:2] == keys[:2] for form in forms)]


def near(keys: Keys, most: int = 3) -> list[str]:
    """A few networks of the same children, with about as many keys."""
    distances = {
        name: min(abs(form.number - keys.number) for form in forms)
        for name, forms in _table()[1].items()
        if any(_share(form.children, keys.children) for form in forms)
    }
    meant = [name for name, distance in distances.items() if distance <= NEAR * keys.number]
    return sorted(meant, key=lambda name: distances[name])[:most]


def _share(children: str, others: str) -> bool:
    """Whether most of the names are common."""
    one, other = set(children.split()), set(others.split())
    return 2 * len(one & other) > len(one | other)
