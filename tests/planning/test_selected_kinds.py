"""What is refused of the new kinds of weights, in one line, and what the report says of those that are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import run_command
from torch import nn

import ttcompress
from ttcompress.errors import PlanError

NET = """
import torch
from torch import nn

def tied():
    net = nn.Sequential(nn.Embedding(97, 24), nn.Linear(24, 24), nn.Linear(24, 97))
    net[2].weight = net[0].weight
    return net

def rnn():
    return nn.LSTM(24, 32, proj_size=16)

def plain():
    return nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    names: dict[str, object] = {"__name__": "net"}
    exec(compile(NET, "net.py", "exec"), names)
    for name in ("tied", "rnn"):
        torch.save(names[name]().state_dict(), tmp_path / f"{name}.pt")  # type: ignore[operator]
    dense = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)).state_dict()
    torch.save({**dense, "0.weight": dense["0.weight"].to_sparse()}, tmp_path / "sparse.pt")
    codes = torch.quantize_per_tensor(dense["0.weight"], 0.1, 0, torch.qint8)
    torch.save({**dense, "0.weight": codes}, tmp_path / "quantised.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("net", "options", "wanted"),
    [
        ("tied", ("--ranks", 2, "--include", "0", "--format", "chain"), "format chain is one of convolutions, 0 a table"),
        ("tied", ("--ratio", 2, "--include", "2", "--format", "naive"), "format naive is one of convolutions, 0 a table"),
        ("tied", ("--ratio", 2, "--exclude", "0"), "exclude names 0 but not 2, which has the same weight: name both"),
        ("tied", ("--ratio", 2, "--exclude", "2"), "exclude names 2 but not 0, which has the same weight: name both"),
        ("sparse", ("--ratio", 2), "sparse"),
        ("quantised", ("--ratio", 2), "quantized and meta tensors are not supported"),
    ],
)  # fmt: skip
def test_one_clear_line(folder: Path, net: str, options: tuple[object, ...], wanted: str) -> None:
    done = run_command(
        "compress",
        f"{net}.pt",
        "--arch",
        f"net.py:{net if net == 'tied' else 'plain'}",
        *options,
        "-o",
        "out.safetensors",
        cwd=folder,
    )
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert wanted in done.err
    assert not (folder / "out.safetensors").exists()


def test_a_sparse_weight_in_memory_stays_with_the_reason() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24))
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse_csr())
    with pytest.raises(PlanError, match="its weight is sparse"):
        ttcompress.plan(net, ranks=2, include=("0",))
    plan = ttcompress.plan(net, ranks=2)
    assert next(kept for kept in plan.kept if kept.name == "0.weight").reason.startswith(
        "its weight is sparse"
    )


def test_a_projection_of_an_lstm_is_one_more_weight() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(24, 32, proj_size=16).eval()
    with torch.no_grad():
        for weight in (each for each in net.parameters() if each.dim() == 2):
            weight.copy_(torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1]) / 4)
    compressed, report = ttcompress.compress(net, ranks=2, include=("*",), format="lowrank")
    assert [layer.fqn for layer in report.layers] == ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    x = torch.randn(5, 2, 24)
    torch.testing.assert_close(compressed(x)[0], net(x)[0])


def test_the_report_says_what_is_rebuilt_and_what_could_be_touched() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(97, 24), nn.LSTM(24, 48), nn.Conv1d(8, 8, 3, groups=8))
    _, report = ttcompress.compress(net, ranks=2, include=("1.*",))
    text = str(report)
    able = 97 * 24 + 4 * 48 * (24 + 48)
    total = sum(each.numel() for each in net.parameters())
    assert f"could be touched  {able:,}  {100 * able / total:.1f} % of all parameters" in text
    assert (
        "rebuilt to run    13,824 parameters of 1.weight_ih_l0, 1.weight_hh_l0: fewer bytes on disk" in text
    )
    assert "kept dense        0 (embedding): not selected" in text
    assert report.plan.from_json(report.plan.to_json()).params_able == able
