"""How much of the project's own code a call runs, in lines: the same on every machine, as seconds are not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ttcompress

OWN = str(Path(ttcompress.__file__).parent)


@contextmanager
def lines_at_most(most: int) -> Iterator[None]:
    """The body ends in an AssertionError where it runs more lines of the project than this."""
    lines = 0

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(OWN) else None

    def on_line(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        if lines > most:
            code = frame.f_code
            raise AssertionError(
                f"more than {most} lines run, now {code.co_filename}:{frame.f_lineno} ({code.co_name})"
            )
        return on_line

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)
