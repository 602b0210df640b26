"""What all records share: JSON, progress, and the one meaning of compression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

Json = dict[str, Any]
WARNING = "warning: "
"""How a note begins that says that a result is to be doubted; the command line prints it on standard error too."""

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) while a long stage runs."""


def compression(params_before: int, params_after: int) -> float:
    """params_before / params_after, the one meaning of compression here."""
    return params_before / params_after


def format_compression(ratio: float) -> str:
    """`7.4x`: one decimal below 1,000, else rounded, with separators."""
    return f"{ratio:.1f}x" if round(ratio, 1) < 1000 else f"{ratio:,.0f}x"


def listed(record: Any) -> Json:
    """A flat dataclass as JSON has it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}


def printable(text: str) -> str:
    """A text from outside as one line for a terminal: what would order it about is shown as its code.

    >>> print(printable("fc1\\x1b[31m"))
    fc1\\x1b[31m
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
