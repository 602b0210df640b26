"""The one exception family: every error a user can cause, as one clear line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class TTCompressError(Exception):
    """Base of every error that a user's input can cause; the command line exits with 2 on it."""


class ShapeError(TTCompressError):
    """Modes, TT-ranks or dimensions that do not fit together."""


class PlanError(TTCompressError):
    """A plan that cannot be made or applied: contradictory options, no match, a budget out of reach."""


class CheckpointError(TTCompressError):
    """A checkpoint or compressed file that is missing, damaged, unsafe or of another kind."""


class ArchitectureError(TTCompressError):
    """An architecture reference that names nothing, or a checkpoint that fits none (or several)."""


class DataError(TTCompressError):
    """A data reference that names nothing readable, or data that does not fit the network."""


class ExportError(TTCompressError):
    """A network that cannot be exported, or that computes something else where it is exported to."""


class TrainingError(TTCompressError):
    """A training that diverged; what was good before is kept."""


class TrainingStoppedError(TTCompressError):
    """A training that was asked to stop and saved its state; the command line exits with 130 on it."""


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the CPU or on a GPU, whose errors are RuntimeErrors."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """What changed between two sets of options, for a one-line message; empty where nothing did."""
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed)


def shortlist(items: Iterable[object], most: int = 6) -> str:
    """Join `items` for a one-line message, cutting the list after `most` with a count of the rest."""
    words = [str(item) for item in items]
    tail = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + tail
