"""Requests to stop, by SIGINT, SIGTERM or SIGHUP, noted until there is a moment to save."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, an end of the job, and a terminal that was closed; not every system has all."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note signals that ask to stop instead of ending, and yield what says whether one came.

    A second one ends the process as it always did. A closed terminal is no request where it was to be ignored, as
    nohup makes it.
    """
    received: list[int] = []
    former_handlers: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, former_handlers[signal.Signals(number)])

    try:
        for number in _requests():
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


def _requests() -> list[signal.Signals]:
    known = [signal.Signals[name] for name in STOPS if name in signal.Signals.__members__]
    return [
        number for number in known if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN
    ]
