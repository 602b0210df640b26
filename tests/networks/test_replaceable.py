"""What hangs on a layer goes along with its replacement, or keeps it from being replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.replaceable import obstacles
from ttcompress.networks.surgery import expand_layers

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def doubled(layer: nn.Module, x: Tensor) -> Tensor:
    return 2 * nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


MARKS: dict[str, Callable[[Any], object]] = {
    "forward": lambda layer: setattr(layer, "forward", lambda x: 2 * x),
    "bound forward": lambda layer: setattr(layer, "forward", MethodType(doubled, layer)),
    "reset": lambda layer: setattr(layer, "reset_parameters", lambda: None),
    "name of a TT layer": lambda layer: setattr(layer, "tt_ranks", 3),
    "buffer": lambda layer: layer.register_buffer("mask", torch.ones(3)),
    "parameter": lambda layer: setattr(layer, "scale", nn.Parameter(torch.ones(3))),
    "module": lambda layer: setattr(layer, "adapter", nn.Linear(3, 3)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "state dict hook": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "load hook": lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_layer_that_is_more_than_its_kind_stays_the_object_that_it_is(mark: str) -> None:
    model = net()
    MARKS[mark](model[2])
    assert obstacles(model).keys() == {"2"}
    layer = model[2]
    _, report = ttcompress.compress(model, ranks=2, include=["*"], inplace=True)
    assert {each.fqn: each.spec.kind for each in report.plan.layers}["2"] == "weight"
    assert model[2] is layer


def test_a_shared_bias_stays_shared() -> None:
    model = net()
    model[2].bias = model[0].bias
    assert set(obstacles(model)) == {"0", "2"}


class Parsed(nn.Module):
    """As networks parsed from lists are: each layer says where its input is from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)])
        for i, layer in enumerate(self.layers):
            layer.i, layer.f, layer.type, layer.notes = i, -1, "linear", {"rows": [i]}

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for layer in self.layers:
            assert layer.type == "linear"
            x = layer(x) + 0 * layer.notes["rows"][0]
            seen.append((layer.i, layer.f))
        assert seen == [(0, -1), (1, -1), (2, -1)]
        return x


@pytest.mark.parametrize(
    "more", [{}, {"calib": torch.ones(64, 64).cumsum(0).sin()}], ids=["weights", "calibrated"]
)
def test_attributes_of_a_layer_go_along(more: dict[str, Any], tmp_path: Path) -> None:
    small, report = ttcompress.compress(Parsed(), ratio=1.3, include=["*"], **more)
    assert report.plan.layers
    x = torch.randn(3, 64)
    wanted = small.eval()(x)
    ttcompress.save(small, report, tmp_path / "n.safetensors")
    again = ttcompress.load(tmp_path / "n.safetensors", factory=Parsed)
    torch.testing.assert_close(again(x), wanted)
    torch.testing.assert_close(expand_layers(again)(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "frozen", [["0.weight"], ["0.bias", "2.weight"], ["0.weight", "0.bias"], ["4.weight"]]
)
def test_what_is_frozen_stays_so_through_a_file(frozen: list[str], tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = net()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    small, report = ttcompress.compress(build(), ranks=2, include=["0", "2"])
    assert len(report.plan.layers) == 2
    ttcompress.save(small, report, tmp_path / "n.safetensors")
    again = ttcompress.load(tmp_path / "n.safetensors", factory=build)
    for module in (small, again):
        for fqn in ("0", "2", "4"):
            layer: Any = module.get_submodule(fqn)
            weights = list(layer.cores) if isinstance(layer, TTLinear) else [layer.weight]
            assert {each.requires_grad for each in weights} == {f"{fqn}.weight" not in frozen}
            assert layer.bias.requires_grad == (f"{fqn}.bias" not in frozen)
    dense = expand_layers(again)
    assert {name for name, each in dense.named_parameters() if not each.requires_grad} == set(frozen)


def test_training_says_what_it_leaves_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    model[0].requires_grad_(False)
    batches = [(torch.randn(16, 64), torch.randint(0, 10, (16,)))]
    before = model[0].weight.detach().clone()
    ttcompress.finetune(model, batches, epochs=1)
    assert torch.equal(model[0].weight, before)
    assert "4,160 parameters are not trained, since they require no gradients: 0" in caplog.text
    with pytest.raises(ttcompress.TTCompressError, match="nothing to train"):
        ttcompress.finetune(net().requires_grad_(False), batches, epochs=1)
