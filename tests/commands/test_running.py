"""Budgets of multiply-adds and ways to run, from the commands to the layers of a loaded file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress import cli
from ttcompress.commands.finetune import finetune_file
from ttcompress.errors import PlanError
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.measure import timing
from ttcompress.measure.multiply_adds import multiply_adds
from ttcompress.networks.zoo import CifarResNet
from ttcompress.planning.budgets import WINDOW
from ttcompress.recipe import Recipe
from ttcompress.records.layers import executions

pytestmark = pytest.mark.usefixtures("one_thread")
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (lambda: CifarResNet(3), (3, 32, 32)),
    "linear": (
        lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.Linear(256, 10)),
        (256,),
    ),
    "tokens": (lambda: Tokens(), (17, 64)),
}


class Tokens(nn.Module):
    """Attention without learned maps, whose products count and stay, and two maps of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.softmax(x @ x.mT, dim=-1) @ x
        return x + self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()


@pytest.mark.parametrize("ratio", [1.2, 2.0, 3.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_budget_of_multiply_adds_is_kept_by_what_torch_counts(name: str, ratio: float) -> None:
    model, shape = built(name), NETWORKS[name][1]
    x = torch.zeros(1, *shape)
    compressed, report = ttcompress.compress(model, macs_ratio=ratio, input_size=shape, include=["*"])
    assert report.plan.multiply_adds == (multiply_adds(model, x), multiply_adds(compressed, x))
    before, after = report.plan.multiply_adds
    assert ratio <= before / after
    assert before / after <= WINDOW * ratio or report.plan.notes
    assert all(layer.params_after < layer.params_before for layer in report.plan.layers)


def test_calibration_and_multiply_adds_go_together() -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    options: dict[str, Any] = {"macs_ratio": 1.5, "input_size": (3, 32, 32), "effort": "fast"}
    compressed, report = ttcompress.compress(built("resnet20"), calib=images, calib_images=64, **options)
    assert report.plan.multiply_adds is not None
    assert multiply_adds(compressed, images[:1]) == report.plan.multiply_adds[1]
    assert all(layer.output_error for layer in report.plan.layers)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    torch.save(built("resnet20").state_dict(), "net.pt")
    return "net.pt"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    cli.main(list(arguments))
    out, err = capsys.readouterr()
    # Networks with random weights cannot lose as little as that; the command says so.
    assert all(line.startswith("ttcompress: warning: ") for line in err.splitlines())
    return str(out)


WAYS = (
    "import sys, ttcompress; model = ttcompress.load(sys.argv[1]);"
    "print({name: each.execution for name, each in model.named_modules() if hasattr(each, 'execution')})"
)


def ways_of(file: str) -> dict[str, str]:
    """As a fresh process loads them."""
    result = subprocess.run([sys.executable, "-c", WAYS, file], capture_output=True, text=True, check=True)
    return dict(eval(result.stdout))


@pytest.mark.parametrize("way", ["auto", "chain", "contract", "dense"])
def test_a_way_to_run_goes_into_the_file_and_the_loaded_layers(
    checkpoint: str, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    weight_format = "matrix" if way == "contract" else "chain"
    options = ["--conv-ranks", "6", "--format", weight_format, "--exec", way]
    report = json.loads(run(capsys, "compress", checkpoint, *options, "--json"))
    replaced = [layer for layer in report["layers"] if "kept" not in layer]
    assert {layer.get("execution", "auto") for layer in replaced} == {way}
    assert ways_of("net-tt.safetensors") == {layer["fqn"]: way for layer in replaced}
    text = run(capsys, "report", "net-tt.safetensors")
    assert (f"{weight_format} run {way}" in text) == (way != "auto")


def test_a_plan_keeps_ways_to_run(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "plan", checkpoint, "--macs-ratio", "2", "-o", "plan.json")
    planned = json.loads(Path("plan.json").read_text())
    before, after = planned["multiply_adds"]
    assert 2 <= before / after <= 2 * WINDOW
    run(capsys, "compress", checkpoint, "--plan", "plan.json")
    loaded = ttcompress.load("net-tt.safetensors")
    assert multiply_adds(loaded, torch.zeros(1, 3, 32, 32)) == after
    # An edited plan may come to other multiply-adds.
    assert "multiply_adds" not in json.loads(run(capsys, "report", "net-tt.safetensors", "--json"))
    text = run(capsys, "compress", checkpoint, "--macs-ratio", "2", "--force")
    assert f"{before:,} -> {after:,}  2.0x" in text


def test_ways_to_run_by_measurement(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "compress", checkpoint, "--conv-ranks", "6", "--tune", "--json"))
    for name, way in ways_of("net-tt.safetensors").items():
        (entry,) = [layer for layer in report["layers"] if layer["fqn"] == name]
        assert way == entry.get("execution", "auto")
    assert report["recipe"]["tune"] is True


def test_from_scratch_in_few_multiply_adds(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from ttcompress.networks.zoo import Mlp\nbuild = lambda: Mlp(width0=64, width1=96, width2=10)\n"
    )
    recipe = Recipe(
        arch=f"{tmp_path}/net.py:build", from_scratch=True, train="digits", epochs=1, macs_ratio=2.0
    )
    with pytest.raises(PlanError, match="the size of an input is not known"):
        finetune_file(None, tmp_path / "out.safetensors", recipe)
    report = finetune_file(None, tmp_path / "out.safetensors", recipe.override(input_size=(1, 8, 8)))
    assert report.plan.multiply_adds is not None
    assert 2 <= report.plan.multiply_adds[0] / report.plan.multiply_adds[1] <= 2 * WINDOW
    assert {layer.execution for layer in report.plan.layers} == {"contract"}


def test_the_ways_that_there_are() -> None:
    for kind, dense, known in (
        (TTLinear, nn.Linear(16, 16), {"matrix": "contract", "lowrank": "contract"}),
        (
            TTConv2d,
            nn.Conv2d(4, 4, 3),
            {"matrix": "contract", "chain": "chain", "naive": "chain", "lowrank": "chain"},
        ),
    ):
        for weight_format, way in known.items():
            layer = kind.from_dense(dense, weight_format, 2)
            assert layer.executions == executions(layer.spec, layer.tensorization) == ("auto", way, "dense")
