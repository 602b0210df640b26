"""Output files: whether one can be written, and writing it whole before it takes the place of another."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import METADATA_KEY, read_header
from ttcompress.files.shards import INDEX_SUFFIX, Index
from ttcompress.torchrun import leads

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")

TEMPORARY = ".ttcompress-"
"""What the names of temporary files begin with."""
DISK_FULL = ("No space left", "file write failed", "PytorchStreamWriter", "inline_container")
"""What torch's own writer says when the file system refuses."""


def check_output(path: Path, force: bool, index: Index | None = None, source: Path | None = None) -> None:
    """See, before any work, that a file can be written, or a folder of shards like those of an index.

    Raises:
        CheckpointError: it exists and `force` is not set, is the `source` that is to be read, is no ordinary file (no
            folder, that of the index itself, or one with what this command does not write), or its parent does not
            exist.
    """
    try:
        if source is not None and path.is_file() and source.exists() and path.samefile(source):
            problem = "is the file that is to be read; choose another name"
        else:
            problem = _output_problem(path, force) if index is None else _folder_problem(path, force, index)
    except (OSError, ValueError) as error:
        problem = f"cannot be written: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _output_problem(path: Path, force: bool) -> str:
    if path.is_dir():
        return "is a folder; name a file"
    if path.exists() and not path.is_file():
        # Renaming over a device such as /dev/null would take it from the whole machine.
        return "is not an ordinary file"
    return _place_problem(path, force, os.path.lexists(path))


def _folder_problem(path: Path, force: bool, index: Index) -> str:
    if path.exists() and not path.is_dir():
        return "is not a folder, as shards need one"
    if not path.exists():
        return _place_problem(path, force, False)
    if path.samefile(index.path.parent):
        return "holds the shards that are to be read; choose another --output"

    problem = _place_problem(path, force, any(path.iterdir()))
    others = _others_in(path, index) if not problem else []
    if others:
        return f"holds what this command does not write: {shortlist(others)}; move it, or choose another --output"
    return problem


def check_folder_output(
    path: Path, names: Collection[str], force: bool, source: Path | None, compressed: bool
) -> None:
    """See, before any work, that a folder with these files and folders in it can be written.

    Args:
        source: the folder that is to be read, where it may not be replaced.
        compressed: whether the weights that go there are compressed; a folder of others is not replaced.

    Raises:
        CheckpointError: it exists and `force` is not set, is the `source` or holds it, holds what this command does not
            write, or its parent does not exist.
    """
    try:
        problem = _model_folder_problem(path, names, force, source, compressed)
    except (OSError, ValueError) as error:
        problem = f"cannot be written: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _model_folder_problem(
    path: Path, names: Collection[str], force: bool, source: Path | None, compressed: bool
) -> str:
    if path.exists() and not path.is_dir():
        return "is not a folder, as this network needs one; end the name in .safetensors for one file"
    if not path.exists():
        return _place_problem(path, force, os.path.lexists(path))

    if source is not None and path.resolve() in (source.resolve(), *source.resolve().parents):
        return "holds the network that is to be read; choose another --output"
    problem = _place_problem(path, force, any(path.iterdir()))
    if problem:
        return problem
    others = [each.name for each in path.iterdir() if each.name not in names]
    others += [each.name for each in path.glob("*.safetensors") if _is_ours(each) != compressed]
    if others:
        return f"holds what this command does not write: {shortlist(sorted(set(others)))}; move it, or choose another --output"
    return ""


def _others_in(folder: Path, index: Index) -> list[str]:
    """Parts of checkpoints in a folder that are not from a run like that which is to write the shards of an index."""
    names = {index.path.name, *(file.name for file in index.files)}
    parts = [each for each in folder.iterdir() if each.name.endswith((".safetensors", INDEX_SUFFIX))]
    others = [each.name for each in parts if each.name not in names]

    # Compressed shards are made of dense ones, and dense ones of compressed ones.
    makes_compressed = not _is_ours(index.files[0])
    shards = [each for each in parts if each.name in names and each.suffix == ".safetensors"]
    return sorted(others + [each.name for each in shards if _is_ours(each) != makes_compressed])


def _is_ours(shard: Path) -> bool:
    return METADATA_KEY in read_header(shard)[1]


def _place_problem(path: Path, force: bool, is_taken: bool) -> str:
    if "\0" in str(path):
        return "cannot be written: no file has such a name"
    if not path.parent.is_dir():
        return f"{path.parent} is not an existing folder"
    if is_taken and not force:
        return "exists; choose another name, or --force to replace it"
    return "" if os.access(path.parent, os.W_OK | os.X_OK) else f"no permission to write in {path.parent}"


# ------------------------------------------------------------------------------------------------ one run at a time


def alone(write: Callable[Concatenate[S, Path, P], R]) -> Callable[Concatenate[S, Path, P], R]:
    """Make a function whose second argument is its output refuse one that another process is writing."""

    @functools.wraps(write)
    def guarded(source: S, output: Path, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with writing_alone(output):
            return write(source, output, *args, **kwargs)

    return guarded


@contextmanager
def writing_alone(output: Path) -> Iterator[None]:
    """Hold an output against other processes by a lock beside it, which holds no longer than this process lives.

    Raises:
        CheckpointError: another process holds it, named by its number.
    """
    file = output.parent.absolute() / f"{_temporary_prefix(output)}lock"
    # The first of the processes that torchrun started writes for all.
    held = None if file in _held_here or not leads() else _locked(file, output)
    if held is None:
        yield
        return

    _held_here.add(file)
    try:
        _remove_abandoned(output)
        yield
    finally:
        _held_here.discard(file)
        file.unlink(missing_ok=True)
        held.close()


_held_here: set[Path] = set()
"""Locks of this process, which may write an output in several steps."""


def _locked(file: Path, output: Path) -> IO[str] | None:
    """A lock file, open and locked; None where none can be made, as then no output can."""
    try:
        held = file.open("a+")
    except (OSError, ValueError):
        return None
    try:
        # Unlike flock's, these locks do not pass to processes that are forked.
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.seek(0)
        number = held.read().strip() or "unknown"
        held.close()
        raise CheckpointError(
            f"{output}: another command is writing it (process {number}); wait for it, or choose another --output"
        ) from error
    if not (file.exists() and os.path.samestat(os.fstat(held.fileno()), file.stat())):
        # Its holder took it away in the meantime.
        held.close()
        return _locked(file, output)
    held.truncate(0)
    held.write(f"{os.getpid()}\n")
    held.flush()
    return held


# ------------------------------------------------------------------------------------------------------ whole or not


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and else vanishes.

    Those that killed runs left of the same path vanish too. Permissions are those of a new file, or `mode`.

    Raises:
        CheckpointError: the file system refuses (full, read-only).
    """
    temporary = path.with_name(f"{_temporary_prefix(path)}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as held:
            with suppress(OSError):
                # Who holds the lock is alive; some file systems have none.
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if mode is not None:
                temporary.chmod(mode)
            _remove_abandoned(path)
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in DISK_FULL):
            raise
        raise CheckpointError(f"{path}: cannot be written: {str(error).splitlines()[0][:100]}") from error
    finally:
        _remove(temporary)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well, and else vanishes.

    A folder that was there is moved away first, and comes back where that fails. To be used by one process alone
    (`writing_alone`), for those that killed runs left of the same path vanish too.

    Raises:
        CheckpointError: the file system refuses.
    """
    prefix = _temporary_prefix(path)
    temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}")
    former = path.with_name(f"{prefix}{secrets.token_hex(8)}")
    try:
        for left in path.absolute().parent.iterdir():
            if left.name.startswith(prefix) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _take_place(temporary, path, former)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(temporary: Path, path: Path, former: Path) -> None:
    if not path.exists():
        temporary.replace(path)
        return
    path.replace(former)
    try:
        temporary.replace(path)
    except BaseException:
        former.replace(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary one of this tool."""
    return name.startswith(TEMPORARY)


def _temporary_prefix(path: Path) -> str:
    """What temporary files for this path begin with, short however long its name is."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return f"{TEMPORARY}{digest[:12]}-"


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of runs that were killed while they wrote this path."""
    prefix = _temporary_prefix(path)
    for file in path.parent.iterdir():
        if not file.name.startswith(prefix) or file.name.endswith("lock"):
            continue
        try:
            with file.open("rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
        except OSError:
            # Of a run that is alive, or gone meanwhile.
            continue


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        # There never was one, for its folder or its name do not allow it.
        return
