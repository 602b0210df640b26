"""Real data and checkpoints, from the folder that TTCOMPRESS_DATA names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Processes that share the machine (`pytest -n`) share its cores out, for themselves and the commands that they start:
# threads that wait for each other on cores that others hold take many times as long. To be done before torch is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)

import torch


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
    """A folder with cifar10-train.npz and cifar10-test.npz, unpacked once per session."""
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, data_root / "data" / "unpack.py", folder], check=True, stdout=subprocess.DEVNULL)
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
