"""Requests to stop, by SIGINT or SIGTERM, noted until there is a moment to save."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one ends the process as it always did."""
    asked: list[int] = []
    former: dict[signal.Signals, Any] = {}

    def remember(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, former[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, remember)
    except ValueError:
        # Not the main thread: the program that runs us decides.
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
