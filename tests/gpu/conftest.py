"""Where the tests of this folder run: on a GPU, or elsewhere as far as they can, to be tested themselves."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from pretended_gpu import GPU, pretended_gpu

from ttcompress.measure import timing

ON = "TTCOMPRESS_GPU_TESTS_ON"
"""Says where else they run: `cpu`, or `pretended`, a GPU that is none (tests/pretended_gpu.py)."""


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The GPU."""
    where = os.environ.get(ON, "cuda")
    if where == "pretended":
        with pytest.MonkeyPatch.context() as patch, pretended_gpu(patch):
            yield GPU
    elif where == "cpu":
        yield torch.device("cpu")
    elif torch.cuda.is_available():
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        pytest.skip(f"needs a GPU, which torch does not see here ({ON}=cpu tries these tests on the CPU)")


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The GPU, for what no other device has."""
    if device.type != "cuda" or os.environ.get(ON):
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
