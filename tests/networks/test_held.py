"""Layers that something outside the module tree holds: where no swap reaches, none is made."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

import ttcompress
from ttcompress.errors import ArchitectureError, PlanError, TTCompressError
from ttcompress.networks.held import copied, held_layers
from ttcompress.networks.replaceable import obstacles

pytestmark = pytest.mark.usefixtures("one_thread")
REGISTRY: list[nn.Module] = []


@dataclass(frozen=True)
class Step:
    layer: Any


class Pair(NamedTuple):
    name: str
    layer: Any


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer


def through_registry(x: Tensor) -> Tensor:
    y: Tensor = REGISTRY[-1](x)
    return y


def registered(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    REGISTRY.append(layer)
    return through_registry


def closure(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


def nested_closure(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    inner = {"run": [lambda x: layer(x)]}
    return lambda x: inner["run"][0](x)


def of_weight(weight: Tensor, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x, weight, layer.bias)


KEPT: dict[str, Callable[[Any], Any]] = {
    "list": lambda layer: [layer],
    "dict of tuples": lambda layer: {"first": (1, layer)},
    "set": lambda layer: {layer},
    "deque": lambda layer: deque([layer]),
    "named tuple": lambda layer: Pair("first", layer),
    "dataclass": Step,
    "slots": Slotted,
    "namespace": lambda layer: SimpleNamespace(layer=layer),
    "bound method": lambda layer: layer.forward,
    "partial": lambda layer: partial(layer),
    "closure": closure,
    "nested closure": nested_closure,
    "default of a function": lambda layer: lambda x, run=layer: run(x),
    "method of its weight": lambda layer: layer.weight.t,
    "parameters": lambda layer: list(layer.parameters()),
    "bias": lambda layer: {"bias": layer.bias},
    "view of its weight": lambda layer: layer.weight.detach().t(),
    "array of its weight": lambda layer: layer.weight.detach().numpy(),
    "module outside the tree": lambda layer: [nn.Sequential(nn.ReLU(), layer)],
    "iterator": lambda layer: itertools.cycle([layer]),
    "weak reference": weakref.ref,
    "weak dictionary": lambda layer: weakref.WeakValueDictionary(first=layer),
    "global": registered,
    "closure over its weight": lambda layer: of_weight(layer.weight, layer),
}
SHARED = {
    "method of its weight",
    "weak reference",
    "weak dictionary",
    "global",
    "view of its weight",
    "array of its weight",
}
"""What deepcopy leaves with the original, or takes apart."""
WEIGHT_IS_HELD = {name for name in KEPT if "its weight" in name or name == "parameters"}


class Net(nn.Module):
    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.kept = keep(self.a)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y


@pytest.mark.parametrize("how", KEPT)
def test_a_layer_that_is_held_elsewhere_stays_the_object_that_it_is(how: str) -> None:
    """What holds the layer sees its new weight; where the weight itself is held it stays dense."""
    net = Net(KEPT[how])
    layer = net.a
    found = held_layers(net)
    assert found.keys() == {"a"}
    assert "kept" in found["a"] or "Net." in found["a"]

    module, report = ttcompress.compress(net, ranks=2, include=["*"], inplace=True)
    assert module is net
    assert net.a is layer
    kinds = {each.fqn: each.spec.kind for each in report.plan.layers}
    assert kinds["b"] == "linear"
    if how not in WEIGHT_IS_HELD:
        assert kinds["a"] == "weight"
        return
    assert type(net.a) is nn.Linear
    reasons = {kept.name: kept.reason for kept in report.plan.kept}
    assert "outside the module tree" in reasons["a.weight"]


@pytest.mark.parametrize("how", KEPT)
def test_copies_hold_their_own_layers_or_are_refused(how: str) -> None:
    net = Net(KEPT[how])
    if how in SHARED:
        with pytest.raises(
            ArchitectureError, match=r"a: held by .* which a copy of the network would go on to run"
        ):
            copied(net)
        return
    twin = copied(net)
    assert held_layers(twin).keys() == {"a"}
    with torch.no_grad():
        net.a.weight.zero_()
    assert bool(twin.a.weight.any())


def test_functions_of_a_copy_reach_into_the_copy() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            # A closure over the module itself: swapping `a` in it is seen.
            self.first = lambda x: self.a(x)
            self.b.register_forward_hook(lambda module, given, output: output + self.a(given[0]))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.first(x))
            return y

    net = Early()
    assert held_layers(net) == {}
    x = torch.randn(3, 64)
    small, report = ttcompress.compress(net, ratio=1.2, include=["a"])
    assert [layer.fqn for layer in report.plan.layers] == ["a"]
    a, b = small.a, small.b
    with torch.no_grad():
        inner = a(x)
        wanted = nn.functional.linear(inner, b.weight, b.bias) + a(inner)
        torch.testing.assert_close(small.eval()(x), wanted)
    assert type(net.a) is nn.Linear


class Steps(nn.Module):
    """Runs what it holds by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.steps = [self.a, torch.relu]
        self.weights = [self.c.weight, self.c.bias]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return nn.functional.linear(self.b(x), *self.weights)


def test_a_file_answers_as_the_network_in_memory(tmp_path: Path) -> None:
    net, x = Steps().eval(), torch.randn(4, 64)
    small, report = ttcompress.compress(net, ratio=1.2, include=["*"], calib=torch.randn(64, 64))
    assert [layer.fqn for layer in report.plan.layers] == ["b"]
    ttcompress.save(small, report, tmp_path / "n.safetensors")
    again = ttcompress.load(tmp_path / "n.safetensors", factory=Steps)
    # Its lists of parameters have the values of the file.
    torch.testing.assert_close(again(x), small.eval()(x))


def test_a_file_whose_plan_names_a_held_layer_is_refused(tmp_path: Path) -> None:
    def free() -> nn.Module:
        net = Steps()
        net.steps, net.weights = [], []
        return net

    # By ranks, so that both are replaced whatever their random weights are.
    small, report = ttcompress.compress(free(), ranks=8, format="lowrank", include=["a", "b"])
    ttcompress.save(small, report, tmp_path / "n.safetensors")
    with pytest.raises(ArchitectureError, match=r"a cannot be replaced: also held by Steps\.steps") as error:
        ttcompress.load(tmp_path / "n.safetensors", factory=Steps)
    assert "\n" not in str(error.value)


def test_a_layer_named_outright_that_is_held_is_refused() -> None:
    with pytest.raises(PlanError, match=r"a cannot be compressed \(also held by something outside"):
        ttcompress.compress(Net(KEPT["parameters"]), ratio=1.1, include=["a"])
    planned = ttcompress.plan(Net(lambda layer: None), ratio=1.1, include=["a"])
    with pytest.raises(PlanError, match=r"a cannot be (replaced|compressed)[: (]+also held"):
        ttcompress.compress(Net(KEPT["closure"]), plan=planned)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "swin_t", "vit_b_32", "googlenet"])
def test_known_networks_hold_nothing_elsewhere(name: str) -> None:
    with torch.device("meta"):
        more = {"init_weights": False} if name == "googlenet" else {}
        assert obstacles(torchvision.models.get_model(name, weights=None, **more)) == {}


def test_a_mention_is_not_a_hold() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Linear(4, 4))
    net.notes = [tuple(layer.weight.shape), type(layer), "0", torch.ones(4), layer.weight.dtype]  # type: ignore[assignment]
    net.again = net  # type: ignore[assignment]
    del net._modules["again"]
    assert held_layers(net) == {}


def test_what_cannot_be_copied_is_one_line() -> None:
    class Stubborn(nn.Linear):
        def __init__(self, error: BaseException) -> None:
            super().__init__(64, 64)
            self.error = error

        def __deepcopy__(self, memo: Any) -> nn.Module:
            raise self.error

    for error in (KeyError("x"), SystemExit(0), NotImplementedError(), OSError("a\nb")):
        net = nn.Sequential(nn.Linear(64, 64), Stubborn(error), nn.Linear(64, 10))
        with pytest.raises(TTCompressError, match="cannot be copied") as raised:
            ttcompress.compress(net, ratio=1.1)
        assert "\n" not in str(raised.value)
        assert raised.value.__cause__ is error
