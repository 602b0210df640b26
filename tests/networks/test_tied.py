"""One parameter of several layers: decomposed once, held once, stored once; each layer runs by the same cores."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_command
from torch import Tensor, nn

import ttcompress
from ttcompress.errors import PlanError
from ttcompress.files.checkpoint import load_compressed
from ttcompress.layers import base
from ttcompress.layers.embedding import TTEmbedding
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.networks.surgery import expand_layers

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """Tokens to logits, by one table at both ends."""

    def __init__(self, head_first: bool = False):
        super().__init__()
        if head_first:
            self.head = nn.Linear(24, 97)
        self.embed = nn.Embedding(97, 24, padding_idx=0)
        self.inner = nn.Linear(24, 24)
        if not head_first:
            self.head = nn.Linear(24, 97)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.relu(self.inner(self.embed(x))))

def build():
    torch.manual_seed(3)
    return Net()

def head_first():
    torch.manual_seed(3)
    return Net(True)
'''
namespace: dict[str, Any] = {"__name__": "tied_net"}
exec(compile(NET, "net.py", "exec"), namespace)
build, head_first = namespace["build"], namespace["head_first"]
IDS = torch.tensor([[5, 0, 96, 5]])
BUILDERS = pytest.mark.parametrize("make", [build, head_first])


def compressed(make: Callable[[], nn.Module] = build, **options: Any) -> tuple[nn.Module, Any]:
    given = {"ranks": 6, "include": ("embed",), "format": "lowrank", **options}
    return ttcompress.compress(make(), **given)


@BUILDERS
def test_decomposed_once_and_counted_once(make: Callable[[], nn.Module]) -> None:
    model, report = compressed(make)
    embed, head = model.get_submodule("embed"), model.get_submodule("head")
    assert isinstance(embed, TTEmbedding)
    assert isinstance(head, TTLinear)
    assert embed.cores is head.cores
    assert len(report.layers) == 1
    assert sum(each.numel() for each in model.parameters()) == report.params_after
    torch.testing.assert_close(embed.weight, head.weight)

    # The same function as of a network with that table.
    dense = make()
    with torch.no_grad():
        dense.embed.weight.copy_(embed.weight)  # type: ignore[union-attr, operator, arg-type]
    torch.testing.assert_close(model(IDS), dense.eval()(IDS))


def test_no_call_rebuilds_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = compressed()

    def refused(*_: Any) -> Tensor:
        raise AssertionError("the table was made")

    monkeypatch.setattr(base, "dense_weight", refused)
    monkeypatch.setattr("ttcompress.layers.linear.dense_weight", refused)
    many = torch.randint(97, (64, 50))
    model(many)
    with torch.no_grad():
        model(many)
    model.train()(many).sum().backward()


@BUILDERS
@pytest.mark.parametrize("dtype", [None, "int8", "float16"])
def test_stored_once_and_loaded_bit_for_bit(
    make: Callable[[], nn.Module], dtype: str | None, tmp_path: Path
) -> None:
    model, report = compressed(make, **({"dtype": dtype} if dtype else {}))
    file = tmp_path / "net-tt.safetensors"
    ttcompress.save(model, report, file)

    names = [name for name in load_compressed(file) if "cores" in name]
    owner = "head" if make is head_first else "embed"
    assert names
    assert all(name.startswith(owner) for name in names)
    pair = {"head.weight": "embed.weight"} if make is build else {"embed.weight": "head.weight"}
    assert ttcompress.read_report(file).tied == pair

    loaded = ttcompress.load(file, factory=make)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.get_submodule("embed").cores is loaded.get_submodule("head").cores
    again = tmp_path / "again.safetensors"
    ttcompress.save(loaded, ttcompress.read_report(file), again)
    assert again.read_bytes() == file.read_bytes()


def test_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    model, report = compressed()
    (tmp_path / "net.py").write_text(NET)
    ttcompress.save(model, report, tmp_path / "net-tt.safetensors")
    code = (
        "import torch, ttcompress, net\n"
        "loaded = ttcompress.load('net-tt.safetensors', factory=net.build)\n"
        "torch.save(loaded(torch.tensor([[5, 0, 96, 5]])), 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(IDS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model.to(torch.float64)])
def test_copies_and_moves_keep_them_together(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = compressed()
    before = model(IDS)
    twin = copied(model)
    torch.testing.assert_close(twin(IDS).float(), before)
    embed, head = twin.get_submodule("embed"), twin.get_submodule("head")
    assert embed.cores is head.cores
    with torch.no_grad():
        embed.cores[0].zero_()  # type: ignore[index, operator]
    assert not bool(head.weight.any())  # type: ignore[union-attr, operator]


def test_pickled_layers_stay_together() -> None:
    model, _ = compressed()
    pair = nn.ModuleList([model.get_submodule("embed"), model.get_submodule("head")])
    twin = pickle.loads(pickle.dumps(pair))
    assert twin[0].cores is twin[1].cores
    assert torch.equal(twin[0](IDS), pair[0](IDS))


def test_an_optimizer_sees_the_cores_once_with_both_gradients() -> None:
    model, _ = compressed()
    names = [name for name, _ in model.named_parameters() if "cores" in name]
    assert len(names) == 2
    dense = build()
    with torch.no_grad():
        dense.embed.weight.copy_(model.embed.weight)  # type: ignore[union-attr, operator, arg-type]
    for network in (dense, model):
        network.train()(IDS).square().sum().backward()
    embed = model.get_submodule("embed")
    through_table = torch.autograd.grad(embed.weight, [*embed.cores], dense.embed.weight.grad)  # type: ignore[arg-type, union-attr, misc]
    for core, gradient in zip(embed.cores, through_table, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(core.grad, gradient)


@BUILDERS
def test_expanded_layers_are_tied_again(make: Callable[[], nn.Module]) -> None:
    model, _ = compressed(make)
    before = model(IDS)
    dense = expand_layers(model)
    assert type(dense.embed) is nn.Embedding
    assert type(dense.head) is nn.Linear
    assert dense.head.weight is dense.embed.weight
    assert dense.embed.padding_idx == 0
    torch.testing.assert_close(dense(IDS), before)


def test_an_expanded_file_fits_the_network(tmp_path: Path) -> None:
    model, report = compressed()
    ttcompress.save(model, report, tmp_path / "net-tt.safetensors")
    assert run_command("expand", "net-tt.safetensors", "-o", "dense.pt", cwd=tmp_path).code == 0
    state = torch.load(tmp_path / "dense.pt")
    dense = build()
    assert state.keys() == dense.state_dict().keys()
    dense.load_state_dict(state)
    torch.testing.assert_close(dense.eval()(IDS), model(IDS))


class Reader(nn.Module):
    """Multiplies by the table itself, as a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 24)
        self.table = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x) @ self.table.T


def test_shared_with_another_module_it_is_rebuilt() -> None:
    model, _ = ttcompress.compress(Reader(), ranks=6, format="lowrank", include=("*",))
    assert any(isinstance(each, TTWeight) for each in model.modules())
    assert not any(isinstance(each, TTEmbedding) for each in model.modules())
    assert sum(each.numel() for each in model.parameters()) == 6 * (97 + 24)
    assert model(IDS).shape == (1, 4, 97)


@pytest.mark.parametrize("name", ["embed", "head"])
def test_excluded_by_one_name_only(name: str) -> None:
    other = {"embed": "head", "head": "embed"}[name]
    with pytest.raises(PlanError, match=f"exclude names {name} but not {other}, which has the same weight"):
        ttcompress.compress(build(), ranks=2, exclude=(name,))
    _, report = ttcompress.compress(build(), ranks=2, include=("*",), exclude=("embed", "head"))
    assert [layer.fqn for layer in report.layers] == ["inner"]


def test_included_by_either_name() -> None:
    for name in ("embed", "head"):
        _, report = ttcompress.compress(build(), ranks=2, include=(name,))
        assert [layer.fqn for layer in report.layers] == ["embed"]


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_what_cores_cannot_do_stays_dense_with_the_reason(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Embedding(97, 24, **options), nn.Linear(24, 24), nn.Linear(24, 4))
    _, report = ttcompress.compress(net, ranks=2)
    reasons = {kept.fqn: kept.reason for kept in report.kept}
    assert next(iter(options)) in reasons["0"]
    with pytest.raises(PlanError, match=next(iter(options))):
        ttcompress.compress(net, ranks=2, include=("0",))


def test_equal_linears_share_cores_too() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 2))
    net[2].weight = net[0].weight
    model, report = ttcompress.compress(net, ranks=2)
    assert [layer.fqn for layer in report.layers] == ["0"]
    assert isinstance(model[2], TTLinear)  # type: ignore[index]
    assert model[0].cores is model[2].cores  # type: ignore[index, union-attr]
    assert json.loads(json.dumps(report.to_json()))["tied"] == {"2.weight": "0.weight"}
