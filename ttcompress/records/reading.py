"""Small files of text from outside, and the JSON in them: headers, metadata, plans, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttcompress.errors import TTCompressError

MOST_BYTES = 100_000_000
"""No text of ours comes near it; a file that does is another one."""


def read_text(path: Path, error_type: type[TTCompressError]) -> str:
    """The text of a small file in UTF-8.

    Raises:
        TTCompressError: of that type; the file is missing, unreadable, too large or no text.
    """
    check_regular(path, error_type)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror or error}") from error

    if len(content) > MOST_BYTES:
        raise error_type(f"{path}: has over {MOST_BYTES:,} bytes")
    try:
        return content.decode()
    except ValueError as error:
        raise error_type(f"{path}: is no text in UTF-8: {error}") from error


def check_regular(path: Path, error_type: type[TTCompressError]) -> None:
    """See that a path is a file that ends: reading from a pipe may wait forever.

    Raises:
        TTCompressError: of that type.
    """
    try:
        is_file, is_folder, is_there = path.is_file(), path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise error_type(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not is_file:
        what = "Is a directory" if is_folder else "Not an ordinary file" if is_there else "No such file"
        raise error_type(f"{path}: cannot be read: {what}")


def parse_json(text: str | bytes) -> Any:
    """JSON in which every key of an object comes once: of two, readers would take either.

    Raises:
        ValueError: no JSON, or a key that comes twice.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {json.dumps(key)[:60]} comes twice")
        found[key] = value
    return found
