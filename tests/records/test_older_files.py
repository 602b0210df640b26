"""Files of an earlier version (older/README.md): they load, report and expand to what they did then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress import cli
from ttcompress.commands.expand import expand_file
from ttcompress.networks.architectures import build
from ttcompress.planning.plan_file import read_plan, write_plan
from ttcompress.records.report import Architecture

OLDER = Path(__file__).with_name("older")
EXPECTED: dict[str, Any] = json.loads((OLDER / "expected.json").read_text())
DIGITS = Architecture("zoo", "mlp", {"width0": 64, "width1": 32, "width2": 32, "width3": 10})


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 18), nn.ReLU(), nn.Linear(18, 4))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))


FACTORIES: dict[str, tuple[Callable[[], nn.Module] | None, tuple[int, ...]]] = {
    "linear": (linear, (24,)),
    "conv": (conv, (4, 4, 4)),
    "int8": (linear, (24,)),
    "trained": (None, (1, 8, 8)),
}
files = pytest.mark.parametrize("name", FACTORIES)


def expanded(name: str, folder: Path) -> dict[str, Tensor]:
    expand_file(OLDER / f"{name}.safetensors", folder / "dense.pt")
    state: dict[str, Tensor] = torch.load(folder / "dense.pt", weights_only=True)
    return state


@files
def test_the_report_prints_as_it_did(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["report", str(OLDER / f"{name}.safetensors")])
    assert capsys.readouterr().out == (OLDER / f"{name}.txt").read_text()


@files
def test_the_dense_weights_are_what_they_were(name: str, tmp_path: Path) -> None:
    state = expanded(name, tmp_path)
    assert set(state) == set(EXPECTED[name]["expanded"])
    for key, known in EXPECTED[name]["expanded"].items():
        value = state[key]
        assert (list(value.shape), str(value.dtype)) == (known["shape"], f"torch.{known['dtype']}")
        assert value.flatten()[:4].tolist() == pytest.approx(known["start"], rel=1e-5, abs=1e-7)
        assert float(value.double().sum()) == pytest.approx(known["sum"], rel=1e-5, abs=1e-5)
        assert float(value.double().square().sum()) == pytest.approx(known["sum_of_squares"], rel=1e-5)


@files
def test_the_network_loads_and_computes_what_its_dense_weights_do(name: str, tmp_path: Path) -> None:
    factory, shape = FACTORIES[name]
    module = ttcompress.load(OLDER / f"{name}.safetensors", factory=factory)
    assert sum(each.numel() for each in module.parameters()) == EXPECTED[name]["params_after"]

    dense = factory() if factory else build(DIGITS, device="cpu")
    dense.load_state_dict(expanded(name, tmp_path))
    inputs = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), dense.eval()(inputs), rtol=1e-4, atol=1e-5)


def test_a_plan_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    plan, known = read_plan(OLDER / "plan.json"), EXPECTED["plan"]
    assert (plan.params_before, plan.params_after) == (known["params_before"], known["params_after"])
    assert {layer.fqn: list(layer.tt_ranks) for layer in plan.layers} == known["layers"]
    write_plan(tmp_path / "plan.json", plan)
    assert (tmp_path / "plan.json").read_bytes() == (OLDER / "plan.json").read_bytes()
