"""The command line as a function: what a command prints and how it ends, without a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttcompress import cli


@dataclass(frozen=True)
class Done:
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_command(*arguments: object, cwd: Path) -> Done:
    """Run a command in this process, in that folder: importing torch anew would take longer than most commands do."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0

    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code

    assert isinstance(code, int)
    return Done(code, out.getvalue(), err.getvalue())


def succeeded(*arguments: object, cwd: Path) -> str:
    """What a command prints that has to succeed, and has to say nothing on stderr."""
    done = run_command(*arguments, cwd=cwd)
    assert (done.code, done.err) == (0, "")
    return done.out
