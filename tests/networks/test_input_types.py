"""The type of input that a network takes, whatever its layers are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.networks.running import input_dtype


class Scores(nn.Module):
    """A last layer whose name ends in that of a list of TT-cores."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(32, 64, bias=False)
        self.scores = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scores(self.hidden(x))
        return y


class Cores(nn.Module):
    """Ordinary layers that have the very names of TT-cores, one of a list that no TT layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Module()
        self.x.cores = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 10)])
        self.scale = nn.Module()
        self.scale.cores = nn.ParameterList([torch.ones(10)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.x.cores  # type: ignore[misc]
        y: Tensor = second(first(x)) * self.scale.cores[0]  # type: ignore[index]
        return y


NETWORKS = {"scores": Scores, "x.cores.1": Cores}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layers_are_known_by_what_they_are(name: str, dtype: torch.dtype) -> None:
    assert input_dtype(NETWORKS[name]().to(dtype)) == dtype


@pytest.mark.parametrize(
    ("name", "include"),
    [("scores", "*"), ("scores", "hidden"), ("x.cores.1", "*"), ("x.cores.1", "x.cores.1")],
)
def test_accuracy_of_a_float64_network_whatever_its_layers_are_called(
    name: str, include: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    images, labels = torch.randn(8, 32, dtype=torch.float64), torch.arange(8)
    model, report = ttcompress.compress(network, ratio=1.2, include=[include], data=[(images, labels)])
    assert report.plan.layers
    assert report.accuracy is not None
    ttcompress.save(model, report, tmp_path / "net-tt.safetensors")
    loaded = ttcompress.load(tmp_path / "net-tt.safetensors", factory=lambda: NETWORKS[name]().double())
    assert torch.equal(loaded(images), model(images))


def test_cores_run_in_the_type_of_their_input() -> None:
    """Wider or narrower cores say nothing about the type that the rest of the network computes in."""
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    network[0] = ttcompress.TTLinear.from_dense(network[0], max_rank=2)
    network[0].cores.double()
    assert input_dtype(network) == torch.float32
    # Of a network that is nothing but cores, nothing is known.
    alone = ttcompress.TTLinear.from_dense(nn.Linear(16, 4, bias=False), max_rank=2).double()
    assert input_dtype(alone) == torch.get_default_dtype()
