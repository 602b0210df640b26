"""What all tests share: their order, the command line, and real data from the folder that TTCOMPRESS_DATA names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from command_line import Done

# Processes that share the machine (`pytest -n`) share its cores out, for themselves and the commands that they start:
# threads that wait for each other on cores that others hold take many times as long. To be done before torch is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)

import numpy as np
import torch
from hypothesis import settings
from PIL import Image

from ttcompress import terminal

GPU_TESTS = Path(__file__).parent / "gpu"

# Which stages have a line in a log hangs on how fast the machine is: here none has, but where that is tested.
terminal.LOGGED_SECONDS = inf

# Everybody's own runs look for new examples; those that decide over a change are the same each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Say which files are collected, and in which order workers take them."""
    # Machines with a GPU may lack what other tests import, and have no time for it.
    if config.option.markexpr == "gpu" and config.args_source is config.ArgsSource.TESTPATHS:
        config.args = [str(GPU_TESTS)]
    # The option is that of pytest-xdist, which need not be there.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that workers which take a file at a time do not end with one last long file."""
    with_slow_tests = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in with_slow_tests)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run the command line in this process, in an empty working folder."""
    from command_line import run_command

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TTCOMPRESS_DEBUG", raising=False)
    return lambda *arguments: run_command(*arguments, cwd=tmp_path)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder that holds `data/` and `checkpoints/`."""
    folder = os.environ.get("TTCOMPRESS_DATA")
    if folder:
        return Path(folder)
    if os.environ.get("TTCOMPRESS_REQUIRE_DATA") == "1":
        pytest.fail("TTCOMPRESS_REQUIRE_DATA=1, but TTCOMPRESS_DATA does not name a folder")
    pytest.skip("needs real data: set TTCOMPRESS_DATA to the folder that holds data/ and checkpoints/")


@pytest.fixture(scope="session")
def cifar10_root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cifar10-train.npz and cifar10-test.npz, unpacked once for all workers."""
    from filelock import FileLock

    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    folder, unpacking = common / "cifar10", common / "cifar10-unpacking"
    with FileLock(common / "cifar10.lock"):
        if not folder.exists():
            unpack = [sys.executable, data_root / "data" / "unpack.py", unpacking]
            subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
            unpacking.rename(folder)
    return folder


@pytest.fixture(scope="session")
def small_cifar10_root(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the first 128 images to train on and the first 500 of the test, for the form of results alone."""
    folder, source = tmp_path_factory.mktemp("small-cifar10"), data_root / "data" / "cifar10"
    for split, count in (("train", 128), ("test", 500)):
        strip = np.asarray(Image.open(source / f"{split}-000.webp").convert("RGB"))
        labels = np.load(source / f"{split}-labels.npy").astype(np.int64)
        np.savez(
            folder / f"cifar10-{split}.npz",
            images=strip.reshape(-1, 32, 32, 3)[:count],
            labels=labels[:count],
        )
    return folder


@pytest.fixture(scope="session")
def mnist_root(data_root: Path) -> Path:
    """A root for torchvision.datasets.MNIST."""
    return data_root / "data"


@pytest.fixture(scope="session")
def checkpoints(data_root: Path) -> Path:
    """The folder of the published CIFAR-10 ResNets."""
    return data_root / "checkpoints"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors and layers as small as those of most tests are many times faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
