"""VGG-16, 553 MB, through the command line in a process of its own: time is printed, memory is bounded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

import ttcompress
from ttcompress.commands import compress as pipeline
from ttcompress.files.header import read_header
from ttcompress.recipe import Recipe

COMPRESS = """
import json, sys, time
import torch, torchvision

def peak():
    # Not getrusage: its ru_maxrss begins with that of the process which started this one, and would hide everything.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))

before, start = peak(), time.perf_counter()
from ttcompress.cli import main
try:
    main(["compress", "vgg16.pth", "--ranks", "4", "--json"])
finally:
    print(json.dumps({"bytes": peak() - before, "seconds": time.perf_counter() - start}), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """vgg16.pth with random weights, removed at the end."""
    folder = tmp_path_factory.mktemp("vgg16")
    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16().state_dict(), folder / "vgg16.pth")
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_vgg16_by_ranks_alone(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", COMPRESS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report, used = json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])
    size = (folder / "vgg16.pth").stat().st_size
    print(
        f"VGG-16 by --ranks 4: {used['seconds']:.1f} s, {used['bytes'] / size:.2f} times the checkpoint's size"
    )
    # Holding less than the two replaced weights, 477 MB, would mean that the measurement is broken.
    assert 0.5 * size <= used["bytes"] <= 3 * size

    assert report["architecture"]["name"] == "vgg16"
    replaced = {layer["fqn"]: layer for layer in report["layers"] if "kept" not in layer}
    assert set(replaced) == {"classifier.0", "classifier.3"}
    # fc6 may not be larger than the paper's modes give at rank 4 (2,016), nor fc7 (1,152).
    assert replaced["classifier.0"]["params_after"] <= 2016
    assert replaced["classifier.3"]["params_after"] <= 1152
    saved = sum(layer["params_before"] - layer["params_after"] for layer in replaced.values())
    assert report["params_before"] == 138_357_544
    assert report["params_after"] == 138_357_544 - saved

    promised = pipeline.plan_file(None, Recipe(arch="vgg16", ranks=4))
    infos, _ = read_header(folder / "vgg16-tt.safetensors")
    assert sum(info.params for info in infos.values()) == promised.plan.params_after == report["params_after"]
    assert sum(info.num_bytes for info in infos.values()) == promised.bytes_after == report["bytes_after"]

    model = ttcompress.load(folder / "vgg16-tt.safetensors")
    source = torch.load(folder / "vgg16.pth", weights_only=True, mmap=True)
    state = model.state_dict()
    assert all(torch.equal(state[name], source[name]) for name in state.keys() & source.keys())
    assert len(state.keys() & source.keys()) == len(source) - 2
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).isfinite().all()
