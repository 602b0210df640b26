"""Outputs that can be written and that cannot, and writing that never loses the file that was there."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ttcompress.errors import CheckpointError
from ttcompress.files.output import check_output, replacing
from ttcompress.files.writing import write_safetensors

TENSORS = {"weight": torch.ones(2, 3)}


def test_replacing_leaves_the_old_file_and_nothing_else_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the new one")
            raise RuntimeError("the machine is on fire")

    with pytest.raises(RuntimeError, match="fire"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_replacing_leaves_nothing_when_interrupted(tmp_path: Path, interrupt: type[BaseException]) -> None:
    def fail() -> None:
        with replacing(tmp_path / "out") as temporary:
            assert temporary.parent == tmp_path
            raise interrupt

    with pytest.raises(interrupt):
        fail()
    assert not list(tmp_path.iterdir())


def test_replacing_turns_a_full_disk_into_one_line(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_replacing_replaces_with_the_permissions_of_a_new_file(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    before = os.umask(umask)
    try:
        with replacing(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def _make_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def _make_file(folder: Path) -> Path:
    (folder / "there").touch()
    return folder / "there"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda folder: folder, "is a folder"),
        (lambda folder: folder / "none" / "out", "not an existing folder"),
        (lambda folder: _make_file(folder) / "out", "not an existing folder"),
        (lambda folder: folder / ("x" * 300), "too long"),
        (_make_fifo, "not an ordinary file"),
    ],
    ids=["folder", "no parent", "parent is a file", "name too long", "fifo"],
)
def test_an_output_that_cannot_be_written(
    tmp_path: Path, make: Callable[[Path], Path], wanted: str, force: bool
) -> None:
    """Also with --force: replacing a device such as the null device by a file would break the machine.

    The FIFO stands for devices, in a folder of this test; a real device is never to be named here.
    """
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())

    def write() -> None:
        check_output(path, force)
        write_safetensors(path, TENSORS)

    with pytest.raises(CheckpointError, match=wanted) as error:
        write()
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_needs_force(tmp_path: Path) -> None:
    path = _make_file(tmp_path)
    with pytest.raises(CheckpointError, match="--force"):
        check_output(path, force=False)
    check_output(path, force=True)
    check_output(tmp_path / "new", force=False)
