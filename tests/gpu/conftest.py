"""Where the tests of this folder run: on a GPU, or elsewhere as far as they can, to be tested themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from ttcompress.measure import timing

ON = "TTCOMPRESS_GPU_TESTS_ON"
"""Names another device than `cuda`, of which `cpu` is the only one that makes sense."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU."""
    wanted = torch.device(os.environ.get(ON, "cuda"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"needs a GPU, which torch does not see here ({ON}=cpu tries these tests on the CPU)")
    return torch.device("cuda", torch.cuda.current_device()) if wanted.type == "cuda" else wanted


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The GPU, for what no other device has."""
    if device.type != "cuda":
        pytest.skip("only a GPU has this")
    return device


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is timed shortly: figures are for `scripts.gpu`."""
    monkeypatch.setattr(timing, "SECONDS", 0.1)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32, but where a test says otherwise; then as it was."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before
