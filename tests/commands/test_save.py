"""Files of modules that were loaded, trained or changed in memory: their reports are of what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ttcompress
from ttcompress.commands.save import CHANGED
from ttcompress.errors import CheckpointError, PlanError
from ttcompress.networks.zoo import CifarResNet

pytestmark = pytest.mark.usefixtures("one_thread")


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def step(module: nn.Module) -> None:
    """One step of somebody's own training."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    module.eval()


NETWORKS: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (mlp, {"ratio": 1.5, "include": ["*"]}),
    (mlp, {"ranks": 3, "dtype": "int8"}),
    (mlp, {"ranks": 3, "dtype": "float16", "data": [(torch.randn(8, 64), torch.arange(8))]}),
    (lambda: CifarResNet(3), {"conv_ranks": 4}),
]
every_network = pytest.mark.parametrize(
    ("build", "options"), NETWORKS, ids=["mlp", "int8", "float16", "resnet20"]
)


@every_network
def test_loaded_and_saved_again_is_the_same_file(
    build: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    small, report = ttcompress.compress(build(), **options)
    ttcompress.save(small, report, tmp_path / "a.safetensors")
    again = ttcompress.load(tmp_path / "a.safetensors", factory=build)
    ttcompress.save(again, ttcompress.read_report(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(("build", "options"), NETWORKS[:3], ids=["mlp", "int8", "float16"])
@pytest.mark.parametrize("way", ["step", "data", "norm"])
def test_what_was_measured_before_a_training_is_not_said_of_it(
    build: Callable[[], nn.Module], options: dict[str, Any], way: str, tmp_path: Path
) -> None:
    small, report = ttcompress.compress(build(), **options)
    ttcompress.save(small, report, tmp_path / "a.safetensors")
    net = ttcompress.load(tmp_path / "a.safetensors", factory=build).float()
    with torch.no_grad():
        if way == "data":
            next(iter(net.parameters())).data.add_(0.1)
        elif way == "norm":
            net.get_buffer("1.running_mean").add_(1)
    if way == "step":
        step(net)
    ttcompress.save(net, report, tmp_path / "b.safetensors")
    after = ttcompress.read_report(tmp_path / "b.safetensors")
    assert after.accuracy is None
    assert all(layer.relative_error is None for layer in after.layers)
    assert after.plan.notes.count(CHANGED) == 1
    assert after.params_after == report.params_after
    again = ttcompress.load(tmp_path / "b.safetensors", factory=build)
    x = torch.randn(4, 64)
    stored_exactly = options.get("dtype") != "int8"
    difference = (again(x) - net(x)).abs().max() / net(x).abs().max()
    assert difference <= (0 if stored_exactly else 0.05)
    ttcompress.save(again, after, tmp_path / "c.safetensors")
    assert ttcompress.read_report(tmp_path / "c.safetensors").plan == after.plan


def test_types_and_bytes_are_those_of_the_module(tmp_path: Path) -> None:
    small, report = ttcompress.compress(mlp(), ranks=3)
    ttcompress.save(small.double(), report, tmp_path / "wide.safetensors")
    after = ttcompress.read_report(tmp_path / "wide.safetensors")
    assert {layer.stored_dtype for layer in after.layers} == {"float64"}
    tensors = ttcompress.load(tmp_path / "wide.safetensors", factory=mlp).state_dict()
    assert after.bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_a_report_of_another_module_is_refused(tmp_path: Path) -> None:
    small, report = ttcompress.compress(mlp(), ranks=3)
    others = [
        mlp(),
        ttcompress.compress(mlp(), ranks=2)[0],
        ttcompress.compress(mlp(), ranks=3, include=["3"])[0],
    ]
    for other in others:
        with pytest.raises(PlanError, match="the report is of another module: 0 "):
            ttcompress.save(other, report, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    ttcompress.save(small, report, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="exists"):
        ttcompress.save(small, report, tmp_path / "a.safetensors")


def test_a_parameter_that_came_later_is_listed(tmp_path: Path) -> None:
    small, report = ttcompress.compress(mlp(), ranks=3)
    grown = copy.deepcopy(small)
    grown.add_module("extra", nn.Linear(10, 10))
    ttcompress.save(grown, report, tmp_path / "a.safetensors")
    after = ttcompress.read_report(tmp_path / "a.safetensors")
    assert after.params_after == report.params_after + 110
    assert sum(kept.reason == "added after it was compressed" for kept in after.kept) == 2


@pytest.mark.parametrize(
    "inside", [lambda small: small, lambda small: nn.Sequential(small, nn.Linear(10, 10))]
)
def test_a_second_round_is_refused(inside: Callable[[nn.Module], nn.Module]) -> None:
    small, _ = ttcompress.compress(mlp(), ranks=3)
    for function in (ttcompress.compress, ttcompress.plan):
        with pytest.raises(PlanError, match=r"in TT form already; compress the dense network"):
            function(inside(small), ratio=1.1)
    layer = ttcompress.TTLinear.from_dense(nn.Linear(64, 64), max_rank=2)
    with pytest.raises(PlanError, match="the module: in TT form already"):
        ttcompress.compress(layer, ranks=1)
