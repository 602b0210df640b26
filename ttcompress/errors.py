"""The one exception family: every error a user can cause, as one clear line."""

from __future__ import annotations

from collections.abc import Iterable


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


def shortlist(items: Iterable[object], most: int = 6) -> str:
    """Join `items` for a one-line message, cutting the list after `most` with a count of the rest."""
    words = [str(item) for item in items]
    tail = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + tail
