"""Networks of other convolutions than images have: compressed, saved, loaded, expanded and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress import cli
from ttcompress.commands import export
from ttcompress.commands.expand import expand_file
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.layers.base import TTLayer

pytestmark = pytest.mark.usefixtures("one_thread")
GENERATOR = """
from torch import nn

def build():
    def block(inputs, outputs, *geometry):
        convolution = nn.ConvTranspose2d(inputs, outputs, 4, *geometry, bias=False)
        return convolution, nn.BatchNorm2d(outputs), nn.ReLU()

    # DCGAN (Radford et al. 2016), a quarter as wide.
    return nn.Sequential(
        *block(100, 128, 1, 0), *block(128, 64, 2, 1), *block(64, 32, 2, 1), *block(32, 16, 2, 1),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )
"""
SPEECH = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv1d(40, 96, 11, stride=2, padding=5), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Conv1d(96, 96, 7, padding="same", padding_mode="reflect"), nn.ReLU(),
        nn.Conv1d(96, 128, 5, dilation=2, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Conv1d(128, 128, 1), nn.ReLU(), nn.ConvTranspose1d(128, 64, 3, stride=2, output_padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 12),
    )
"""
VIDEO = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(),
            nn.Conv3d(outputs, outputs, (3, 1, 1), 1, (1, 0, 0), bias=False), nn.BatchNorm3d(outputs),
        )
        self.shortcut = nn.Conv3d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return nn.functional.relu(self.convolutions(x) + self.shortcut(x))

def build():
    return nn.Sequential(
        nn.Conv3d(3, 16, (3, 7, 7), (1, 2, 2), (1, 3, 3)), nn.ReLU(), Block(16, 32, 1), Block(32, 48, 2),
        nn.ConvTranspose3d(48, 24, 2, stride=2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(24, 10),
    )
"""


GROUPED = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1, groups=4, bias=False), nn.BatchNorm2d(64),
        nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1, groups=2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1, groups=64),
        nn.ConvTranspose2d(64, 32, 4, 2, 1, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
"""


class Case(NamedTuple):
    """A network, the shape of one input, the compression asked for, and the kinds of its layers."""

    source: str
    shape: tuple[int, ...]
    ratio: float
    kinds: set[str]


CASES = {
    "grouped": Case(GROUPED, (3, 12, 12), 2, {"conv2d", "conv_transpose2d"}),
    "generator": Case(GENERATOR, (100, 1, 1), 2.5, {"conv_transpose2d"}),
    "speech": Case(SPEECH, (40, 60), 2, {"conv1d", "conv_transpose1d"}),
    "video": Case(VIDEO, (3, 6, 16, 16), 3, {"conv3d", "conv_transpose3d"}),
}
every_network = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build(case: Case) -> nn.Module:
    """The network with random weights."""
    names: dict[str, Any] = {}
    exec(case.source, names)
    torch.manual_seed(0)
    model: nn.Module = names["build"]()
    return model.eval()


def checkpoint(folder: Path, case: Case) -> tuple[str, Tensor]:
    """A dense.pt of random weights: the reference of its architecture, which net.py has, and inputs."""
    (folder / "net.py").write_text(case.source)
    write_dense(folder / "dense.pt", build(case).state_dict())
    return f"{folder / 'net.py'}:build", torch.randn(2, *case.shape)


def load(file: Path, case: Case) -> nn.Module:
    return ttcompress.load(file, factory=lambda: build(case))


def tt_layers(model: nn.Module) -> list[TTLayer]:
    return [module for module in model.modules() if isinstance(module, TTLayer)]


LOAD = """
import sys, torch, ttcompress
names = {}
exec(open(sys.argv[2]).read(), names)
model = ttcompress.load(sys.argv[1], factory=names["build"])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])), sys.argv[4])
"""


def in_a_fresh_process(file: Path, x: Tensor) -> Tensor:
    folder = file.parent
    torch.save(x, folder / "in.pt")
    names = [str(folder / name) for name in ("net.py", "in.pt", "out.pt")]
    command = [sys.executable, "-c", LOAD, str(file), *names]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    y: Tensor = torch.load(folder / "out.pt")
    return y


@every_network
@torch.no_grad()
def test_it_is_compressed_and_loads_in_a_fresh_process_bit_for_bit(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, x = checkpoint(tmp_path, case)
    file = tmp_path / "small.safetensors"
    line = f"compress {tmp_path / 'dense.pt'} -o {file} --arch {reference} --ratio {case.ratio:g}"
    cli.main(line.split())
    printed = capsys.readouterr().out

    report = read_metadata(file)
    replaced = [layer for layer in report["layers"] if "kept" not in layer]
    kinds = {layer["kind"] for layer in replaced} - {"linear"}
    assert kinds
    assert kinds <= case.kinds
    assert all(kind in printed for kind in kinds - {"conv2d"})
    assert case.ratio <= report["compression"] <= 1.02 * case.ratio

    small = load(file, case)
    assert torch.equal(small(x), in_a_fresh_process(file, x))
    # What the file stands for, expanded, is the same network.
    expand_file(file, tmp_path / "expanded.pt")
    model = build(case)
    model.load_state_dict(torch.load(tmp_path / "expanded.pt"))
    wanted = model(x)
    assert not torch.equal(wanted, small(x))
    torch.testing.assert_close(small(x), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@every_network
@pytest.mark.parametrize("options", ["--format lowrank", "--format naive", "--format matrix", "--dtype int8"])
@torch.no_grad()
def test_ranks_by_hand_belong_to_all_kinds(case: Case, options: str, tmp_path: Path) -> None:
    reference, x = checkpoint(tmp_path, case)
    file = tmp_path / "small.safetensors"
    line = (
        f"compress {tmp_path / 'dense.pt'} -o {file} --arch {reference} --conv-ranks 4 --include * {options}"
    )
    cli.main(line.split())
    replaced = [layer for layer in read_metadata(file)["layers"] if "kept" not in layer]
    assert {layer["kind"] for layer in replaced} == case.kinds

    small = load(file, case)
    wanted = small(x)
    for module in tt_layers(small):
        module.execution = module.executions[1]
    torch.testing.assert_close(small(x), wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


@every_network
@torch.no_grad()
def test_it_is_exported(case: Case, tmp_path: Path) -> None:
    reference, _ = checkpoint(tmp_path, case)
    small, report = ttcompress.compress(build(case), ratio=case.ratio)
    ttcompress.save(small, report, tmp_path / "small.safetensors")
    done = export.export_file(
        tmp_path / "small.safetensors", tmp_path / "out.onnx", arch=reference, input_size=case.shape
    )
    assert done.difference is not None
    assert done.difference < 1e-5
    transposed = any("transpose" in kind for kind in case.kinds)
    assert ("ConvTranspose" in done.operators) == transposed


@every_network
def test_a_plan_is_a_file_that_is_taken_back(case: Case, tmp_path: Path) -> None:
    reference, x = checkpoint(tmp_path, case)
    dense, plan = str(tmp_path / "dense.pt"), tmp_path / "plan.json"
    cli.main(["plan", dense, "--arch", reference, "--ratio", f"{case.ratio:g}", "-o", str(plan)])
    for layer in json.loads(plan.read_text())["layers"]:
        if "kept" not in layer:
            # The kind says whether it is transposed; nothing else is stated that is as usual.
            assert "transposed" not in layer["spec"]
            assert ("output_padding" in layer["spec"]) == (layer["kind"] == "conv_transpose1d")
    cli.main(["compress", dense, "--arch", reference, "--plan", str(plan), "-o", str(tmp_path / "small.st")])
    assert load(tmp_path / "small.st", case)(x).isfinite().all()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_calibrated_network(name: str) -> None:
    """Output error instead of weight error, on inputs of any kind."""
    case = CASES[name]
    model, inputs = build(case), torch.randn(48, *case.shape)
    small, report = ttcompress.compress(model, ratio=case.ratio, calib=inputs, effort="fast")
    plain, _ = ttcompress.compress(model, ratio=case.ratio)
    assert report.compression >= case.ratio
    x = torch.randn(16, *case.shape)
    missed = [float((each(x) - model(x)).norm()) for each in (small, plain)]
    assert missed[0] < missed[1]


@pytest.mark.parametrize("name", ["generator", "video"])
def test_multiply_adds_can_be_the_budget(name: str) -> None:
    case = CASES[name]
    _, report = ttcompress.compress(build(case), macs_ratio=2, input_size=case.shape)
    before, after = report.plan.multiply_adds or (0, 0)
    assert 2 <= before / after <= 2.1


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "output padding": (
        "conv1d",
        {"output_padding": [1]},
        "output_padding belongs to transposed convolutions",
    ),
    "padding mode": ("conv_transpose1d", {"padding_mode": "reflect"}, "must be numbers of zeros"),
    "padding": ("conv_transpose1d", {"padding": "same"}, "must be numbers of zeros"),
    "dimensions": ("conv2d", {}, "kernel_size must be a list of length 2"),
    "kind": ("conv4d", {}, "kind must be"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_in_a_plan_is_refused(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, fields, message = WRONG[wrong]
    reference, _ = checkpoint(tmp_path, CASES["speech"])
    dense, plan = str(tmp_path / "dense.pt"), tmp_path / "plan.json"
    cli.main(["plan", dense, "--arch", reference, "--ratio", "2", "-o", str(plan)])
    stated = json.loads(plan.read_text())
    layer = next(each for each in stated["layers"] if each.get("format") and each["kind"] == "conv1d")
    layer["kind"] = kind
    layer["spec"] |= fields
    plan.write_text(json.dumps(stated))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["compress", dense, "--arch", reference, "--plan", str(plan), "-o", str(tmp_path / "out.st")]
        )
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out.st").exists()
