"""What one input asks of a network: published counts, layers used twice, and nothing changed by looking."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from ttcompress.errors import DataError
from ttcompress.measure.multiply_adds import usage_of
from ttcompress.networks.running import Example
from ttcompress.networks.zoo import CifarResNet
from ttcompress.tt.cost import Calls

pytestmark = pytest.mark.usefixtures("one_thread")


def test_published_counts() -> None:
    """VGG-16 by the sums of its layers, 13 convolutions 3x3 and three matrices; ResNet-20 likewise."""
    with torch.device("meta"):
        vgg = torchvision.models.vgg16()
    sides = [224, 224, 112, 112, 56, 56, 56, 28, 28, 28, 14, 14, 14]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(9 * a * b * side**2 for a, b, side in zip(widths[:-1], widths[1:], sides, strict=True))
    assert (
        usage_of(vgg, Example((3, 224, 224))).multiply_adds
        == convs + 25088 * 4096 + 4096 * 4096 + 4096 * 1000
    )
    stages = (
        6 * 9 * 16 * 16 * 1024
        + 9 * 16 * 32 * 256
        + 5 * 9 * 32 * 32 * 256
        + 9 * 32 * 64 * 64
        + 5 * 9 * 64 * 64 * 64
    )
    assert usage_of(CifarResNet(3), Example((3, 32, 32))).multiply_adds == 9 * 3 * 16 * 1024 + stages + 640


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.shared(self.shared(x)) @ torch.ones(6, 6))  # type: ignore[no-any-return]


def test_every_use_of_a_layer_counts_and_products_outside_layers_too() -> None:
    usage = usage_of(Twice(), Example((6,)))
    assert usage.multiply_adds == 3 * 36
    assert dict(usage.calls) == {"shared": Calls(2, 2)}


def test_looking_changes_nothing() -> None:
    model = Twice().train()
    before = copy.deepcopy(model.state_dict())
    usage_of(model, Example((6,)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_that_the_network_does_not_take() -> None:
    with pytest.raises(DataError, match="does not take images of shape"):
        usage_of(CifarResNet(3), Example((4, 32, 32)))
