"""The work folder of a long compression: finished results are kept in it, and a stopped run goes on from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ttcompress.errors import CheckpointError, PlanError, ShapeError, differences, shortlist
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import canonical_json
from ttcompress.files.output import is_temporary, replacing
from ttcompress.files.writing import write_safetensors
from ttcompress.planning.plan_file import read_plan, write_plan
from ttcompress.processes import World
from ttcompress.records.common import Json
from ttcompress.records.plan import CompressionPlan

KEY = "run.json"
PLAN = "plan.json"
RESULT = re.compile(r"[a-z]+-\d{6}\.safetensors")
"""Names of the files with results."""


def work_folder(output: Path) -> Path:
    """Where the run that will write `output` keeps what it has finished."""
    return output.with_name(f"{output.name}.partial")


def is_stopped(output: Path) -> bool:
    """Whether a run that was to write `output` has left something."""
    try:
        return work_folder(output).exists()
    except (OSError, ValueError):
        # Where nobody can look, nobody can write: that is said by the check of the output.
        return False


@dataclass(frozen=True)
class Work:
    """A folder of results, to which all processes of a run add."""

    folder: Path
    world: World

    def files(
        self, what: str, sizes: Sequence[int], compute: Callable[[int], dict[str, Tensor]]
    ) -> list[Path]:
        """Files of compute(0), compute(1) ...: those that are missing are computed, shared out by their sizes."""
        found = [self.folder / f"{what}-{index:06}.safetensors" for index in range(len(sizes))]
        for index in self.world.share(sizes):
            if not found[index].exists():
                write_safetensors(found[index], compute(index))
        self.world.wait()
        return found

    def results(
        self, what: str, sizes: Sequence[int], compute: Callable[[int], dict[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        """What `files` hold."""
        return [load_compressed(file) for file in self.files(what, sizes, compute)]

    def plan(self, make: Callable[[], CompressionPlan]) -> CompressionPlan:
        """The plan of the run, made by all processes together; as the file has it, so that all have the same."""
        file = self.folder / PLAN
        if not file.exists():
            plan = make()
            self.world.wait()
            if self.world.leads:
                write_plan(file, plan)
        self.world.wait()
        return read_plan(file)


@contextmanager
def work_on(output: Path, key: Json, force: bool, world: World) -> Iterator[Work]:
    """The work folder of a run, which vanishes when the block ends well.

    Args:
        key: all that the results depend on; what another run has left is not taken.
        force: do away with what another run has left; never with anything else.

    Raises:
        CheckpointError: another run has left something, or the folder is not one of a run.
    """
    folder = work_folder(output)
    if world.leads:
        _prepare(folder, key, force)
    world.wait()
    try:
        yield Work(folder, world)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command once more goes on from {folder}") from None
    except (PlanError, ShapeError):
        # The same command would fail again, and another one shall not find anything.
        if world.leads:
            _remove(folder)
        raise
    world.wait()
    if world.leads:
        _remove(folder)


def _prepare(folder: Path, key: Json, force: bool) -> None:
    try:
        found = [file.name for file in folder.iterdir()] if folder.exists() else []
        before = _key(folder / KEY) if KEY in found else None
        if before == key:
            return
        _check_replaceable(folder, found, differences(before, key) if before else "", force)
        _remove(folder)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    with replacing(folder / KEY) as temporary:
        temporary.write_text(canonical_json(key))


def _check_replaceable(folder: Path, found: Sequence[str], differ: str, force: bool) -> None:
    """See that a folder holds nothing but what another run has left, and with `force` alone that."""
    others = sorted(name for name in found if not _is_ours(name))
    if others or (found and not differ and not all(map(is_temporary, found))):
        what = f"holds {shortlist(others)}" if others else f"has no {KEY} of another run"
        raise CheckpointError(f"{folder}: is not what a stopped run has left: it {what}; move it away")
    if differ and not force:
        raise CheckpointError(
            f"{folder}: is left from another command ({differ}); "
            "repeat that one to go on with it, or --force to start anew"
        )


def _is_ours(name: str) -> bool:
    return name in (KEY, PLAN) or is_temporary(name) or RESULT.fullmatch(name) is not None


def _remove(folder: Path) -> None:
    """Remove the files of a run, its key last so that a kill leaves what is known as one, and the folder, if empty."""
    if not folder.is_dir():
        return
    own = [file for file in folder.iterdir() if _is_ours(file.name)]
    for file in sorted(own, key=lambda file: file.name == KEY):
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _key(file: Path) -> Json:
    try:
        key = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not isinstance(key, dict):
        raise CheckpointError(f"{file}: cannot be read: not an object")
    return key
