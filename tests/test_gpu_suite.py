"""The tests that need a GPU: skipped, saying so, where there is none, and good as far as the CPU goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: pytest -m gpu")


def suite(*arguments: str, **variables: str) -> str:
    """What the suite prints at its end; it must not fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist"]
    without = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env={**without, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@NO_GPU
def test_elsewhere_it_says_what_it_needs() -> None:
    """And nothing else is collected, which machines with a GPU may not be able to import."""
    found = suite()
    summary = found.splitlines()[-1]
    assert "needs a GPU, which torch does not see here" in found
    assert "passed" not in summary
    assert "deselected" not in summary


@pytest.mark.slow
@NO_GPU
def test_it_passes_on_the_cpu_but_for_what_only_a_gpu_has() -> None:
    found = suite(TTCOMPRESS_GPU_TESTS_ON="cpu")
    assert "only a GPU has this" in found
    assert " passed" in found.splitlines()[-1]
