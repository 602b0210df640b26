"""Output files: whether one can be written, and writing it whole before it takes the place of another."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ttcompress.errors import CheckpointError
from ttcompress.files.shards import Index

TEMPORARY = ".ttcompress-"
"""What the names of temporary files begin with."""


def check_output(path: Path, force: bool, index: Index | None = None) -> None:
    """See, before any work, that a file can be written, or a folder of shards like those of an index.

    Raises:
        CheckpointError: it exists and `force` is not set, is no ordinary file (no folder, or that of the
            index itself), or its parent does not exist.
    """
    try:
        problem = _output_problem(path, force) if index is None else _folder_problem(path, force, index)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _output_problem(path: Path, force: bool) -> str:
    if path.is_dir():
        return "is a folder; name a file"
    if path.exists() and not path.is_file():
        # Renaming over a device such as /dev/null would take it from the whole machine.
        return "is not an ordinary file"
    return _place_problem(path, force, path.exists())


def _folder_problem(path: Path, force: bool, index: Index) -> str:
    if path.exists() and not path.is_dir():
        return "is not a folder, as shards need one"
    if not path.exists():
        return _place_problem(path, force, False)
    if path.samefile(index.path.parent):
        return "holds the shards that are to be read; choose another --output"
    return _place_problem(path, force, any(path.iterdir()))


def _place_problem(path: Path, force: bool, is_taken: bool) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is not an existing folder"
    if is_taken and not force:
        return "exists; choose another name, or --force to replace it"
    return "" if os.access(path.parent, os.W_OK) else f"no permission to write in {path.parent}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and else vanishes.

    Raises:
        CheckpointError: the file system refuses (full, read-only).
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
