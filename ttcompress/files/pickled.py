"""Pickles looked through before anything reads them: tuples that stand for far more than the file holds."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from ttcompress.errors import CheckpointError

MOST_ENTRIES = 10_000_000
"""Entries of one tuple, those of the tuples in it counted as often as they are in it."""
LEGACY_PICKLES = 4
"""Before the tensors of a file of the old layout: magic number, protocol, machine, content."""
PUTS, GETS = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")


def check_tuples(path: Path) -> None:
    """See that no tuple of a file of torch.save holds others so often that to hash it would take for ever.

    Raises:
        CheckpointError: one does.
    """
    try:
        largest = _largest_tuple(path)
    except Exception:
        # Damaged: that is said more precisely by who reads it.
        return
    if largest > MOST_ENTRIES:
        raise CheckpointError(f"{path}: damaged: holds a tuple of {largest:,} entries")


def _largest_tuple(path: Path) -> int:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.partition("/")[2] == "data.pkl")
            with archive.open(name) as file:
                return _largest_in(file)
    with path.open("rb") as file:
        return max(_largest_in(file) for _ in range(LEGACY_PICKLES))


def _largest_in(file: IO[bytes]) -> int:
    """Entries of the largest tuple that a pickle makes, found by following its stack; nothing is made."""
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    largest = 0
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name == "MARK":
            stack.append(None)
        elif name in GETS:
            stack.append(memo.get(int(str(argument)), 0))
        elif name in PUTS:
            memo[int(str(argument))] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        else:
            taken = _taken(stack, operation)
            # What else there is cannot be hashed, or holds no other.
            entries = 1 + sum(taken) if name.startswith("TUPLE") else 0
            largest = max(largest, entries)
            stack.extend([entries] * len(operation.stack_after))
    return largest


def _taken(stack: list[int | None], operation: pickletools.OpcodeInfo) -> list[int]:
    """What an operation takes off the stack: all above the last mark, or a fixed number."""
    before = operation.stack_before
    taken = []
    if pickletools.markobject in before:
        while (entry := stack.pop()) is not None:
            taken.append(entry)
        before = before[: before.index(pickletools.markobject)]
    taken += [stack.pop() or 0 for _ in before]
    return taken
