"""Dense checkpoints as networks: what trainers put before the names, and numbers that no network computes with."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ttcompress.errors import ArchitectureError, CheckpointError
from ttcompress.files.tensors import state_sha256
from ttcompress.networks.opening import open_dense, open_weights
from ttcompress.networks.zoo import CifarResNet, lenet5

WRAPPED = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, x):
        return self.model(x)
def build():
    return Net()
def complex_one():
    net = Net()
    net.phase = nn.Parameter(net.model[0].weight.detach().to(dtype=__import__("torch").complex64))
    return net
"""


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.backbone.", "a.b.c."])
@pytest.mark.parametrize("arch", [None, "lenet5"])
def test_a_prefix_that_all_names_share_is_taken_off(
    tmp_path: Path, prefix: str, arch: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    net = lenet5()
    path = tmp_path / f"{prefix}{arch}.pt"
    torch.save({"state_dict": {prefix + name: value for name, value in net.state_dict().items()}}, path)
    with caplog.at_level(logging.WARNING, logger="ttcompress"):
        network = open_dense(path, arch)
    assert network.tensors.keys() == net.state_dict().keys()
    assert (network.source or {})["state_sha256"] == state_sha256(net.state_dict())
    assert [
        f"without the prefix '{part}.'" in line
        for part, line in zip(prefix.split("."), caplog.messages, strict=False)
    ]
    assert len(caplog.messages) == prefix.count(".")


def test_a_prefix_that_the_network_has_itself_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "net.py").write_text(WRAPPED)
    torch.save(
        {f"model.{index}.{name}": torch.ones(shape) for index, name, shape in SHAPES}, tmp_path / "net.pt"
    )
    network = open_dense(tmp_path / "net.pt", f"{tmp_path / 'net.py'}:build")
    assert "model.0.weight" in network.tensors
    assert not caplog.messages


SHAPES: list[tuple[int, str, tuple[int, ...]]] = [
    (0, "weight", (8, 8)), (0, "bias", (8,)), (2, "weight", (3, 8)), (2, "bias", (3,)),
]  # fmt: skip


def test_what_fits_neither_way_is_refused_as_it_is_named(tmp_path: Path) -> None:
    torch.save(
        {f"model.{name}": value for name, value in nn.Linear(3, 5).state_dict().items()}, tmp_path / "net.pt"
    )
    with pytest.raises(ArchitectureError, match=r"model\.weight"):
        open_dense(tmp_path / "net.pt", "lenet5")
    assert "model.weight" in open_weights(tmp_path / "net.pt").tensors


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("which", ["all", "weights", "one bias"])
def test_numbers_that_no_network_computes_with(tmp_path: Path, dtype: torch.dtype, which: str) -> None:
    chosen = {"all": "", "weights": "weight", "one bias": "linear.bias"}[which]
    state = {
        name: value.to(dtype) if name.endswith(chosen) and value.is_floating_point() else value
        for name, value in CifarResNet(3).state_dict().items()
    }
    changed = [name for name, value in state.items() if value.dtype == dtype]
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(
        (CheckpointError, ArchitectureError), match=str(dtype).removeprefix("torch.")
    ) as error:
        open_dense(tmp_path / "net.pt")
    assert any(name in str(error.value) for name in changed)


def test_a_network_of_complex_numbers_gets_them(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(WRAPPED)
    state = {f"model.{index}.{name}": torch.ones(shape) for index, name, shape in SHAPES}
    torch.save({**state, "phase": torch.ones(8, 8, dtype=torch.complex64)}, tmp_path / "net.pt")
    network = open_dense(tmp_path / "net.pt", f"{tmp_path / 'net.py'}:complex_one")
    assert network.model.get_parameter("phase").is_complex()
