"""Requests to stop, by SIGINT or SIGTERM, noted until there is a moment to save."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note SIGINT and SIGTERM instead of ending, and yield what says whether one came.

    A second one ends the process as it always did.
    """
    received: list[int] = []
    former_handlers: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, former_handlers[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former_handlers[number] = signal.signal(number, note)
    except ValueError:
        # Not the main thread: the program that runs us decides.
        yield lambda: False
        return

    try:
        yield lambda: bool(received)
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)
