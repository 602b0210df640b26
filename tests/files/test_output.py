"""Outputs that can be written and that cannot, and writing that never loses the file that was there."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ttcompress.errors import CheckpointError
from ttcompress.files.output import alone, check_output, replacing, writing_alone
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


# --------------------------------------------------------------------------------------------------- several runs

WRITE = """
import sys, time
from pathlib import Path
from ttcompress.files.output import replacing, writing_alone
path = Path(sys.argv[1])
with writing_alone(path), replacing(path) as temporary:
    temporary.write_bytes(bytes(10**6))
    print("half", flush=True)
    time.sleep(100)
"""


def _writing(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of writing."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_second_run_of_an_output_says_so_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    process = _writing(path)
    before = sorted(tmp_path.iterdir())
    with (
        pytest.raises(CheckpointError, match=rf"another command is writing it \(process {process.pid}\)"),
        writing_alone(path),
    ):
        raise AssertionError("both write")
    assert sorted(tmp_path.iterdir()) == before
    with writing_alone(tmp_path / "other.safetensors"):
        pass
    _end(process)
    with writing_alone(path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.safetensors", "out.safetensors.training", "x" * 255, "mo\u0111el.pt"])
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path, name: str) -> None:
    others = [tmp_path / ".ttcompress-0123456789abcdef", tmp_path / f".{name[:200]}.tmp"]
    for other in others:
        other.write_text("of another run")
    _end(_writing(tmp_path / name))
    alive = _writing(tmp_path / "alive")
    during = {file for file in tmp_path.iterdir() if file.stat().st_size == 10**6}
    assert len(during) == 2
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("new")
    assert {file for file in tmp_path.iterdir() if file.stat().st_size == 10**6} < during
    assert (tmp_path / name).read_text() == "new"
    _end(alive)
    with replacing(tmp_path / "alive") as temporary:
        temporary.write_text("new")
    with writing_alone(tmp_path / "alive"), writing_alone(tmp_path / name):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / name, tmp_path / "alive"])


def test_a_run_may_write_its_output_in_several_steps(tmp_path: Path) -> None:
    path = tmp_path / "out"

    @alone
    def write(text: str, output: Path, *, again: bool = False) -> str:
        with replacing(output) as temporary:
            temporary.write_text(text)
        return write(f"{text} again", output) if again else text

    with writing_alone(path):
        assert write("text", path, again=True) == "text again"
        process = subprocess.run(
            [sys.executable, "-c", WRITE, str(path)], capture_output=True, text=True, check=False
        )
        assert "another command is writing it" in process.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["none/out", "file/out", "", "."])
def test_no_lock_where_no_output_can_be(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with writing_alone(tmp_path / place):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_link_that_leads_nowhere_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "none")
    with pytest.raises(CheckpointError, match="--force"):
        check_output(tmp_path / "out", force=False)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_output(tmp_path / name, force=True)


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from ttcompress.errors import CheckpointError
from ttcompress.files.writing import write_dense
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    write_dense(Path(sys.argv[1]), {"weight": torch.ones(1000, 1000)})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.safetensors"])
def test_files_that_grow_too_large_are_one_line(tmp_path: Path, name: str) -> None:
    """Whoever notices: Python or torch's own writer."""
    line = [sys.executable, "-c", LIMITED, str(tmp_path / name)]
    text = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert text.startswith(f"{tmp_path / name}: cannot be written: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["same", "link", "hard link", "other folder"])
def test_the_source_is_never_replaced(tmp_path: Path, how: str) -> None:
    source, output = tmp_path / "net.pt", tmp_path / "out.pt"
    source.write_text("mine")
    (tmp_path / "folder").mkdir()
    if how == "link":
        output.symlink_to(source)
    elif how == "hard link":
        output.hardlink_to(source)
    else:
        output = source if how == "same" else tmp_path / "folder" / ".." / "net.pt"
    with pytest.raises(CheckpointError, match="is the file that is to be read"):
        check_output(output, force=True, source=source)
    check_output(tmp_path / "other.pt", force=True, source=source)
    check_output(output, force=True, source=tmp_path / "missing.pt")
