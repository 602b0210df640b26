"""What can move the mean output of a layer, by running the network."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ttcompress.calibrate.shifts import Shift, batch_norms_after


class Shared(nn.Module):
    """A convolution, and a norm, that each run twice."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.shares_conv = conv

    def forward(self, x: Tensor) -> Tensor:
        first = self.norms[0](self.conv[0](x))
        if self.shares_conv:
            return self.norms[1](self.conv[0](first))  # type: ignore[no-any-return]
        return self.norms[0](self.conv[1](first))  # type: ignore[no-any-return]


def net(*between: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *between, norm or nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (net(), {"0": "1"}),
        (net(nn.ReLU()), {"1": "2"}),
        (net(norm=nn.BatchNorm2d(4, affine=False)), {"0": "1"}),
        (net(norm=nn.BatchNorm2d(4, track_running_stats=False)), {}),
        (net(norm=nn.GroupNorm(2, 4)), {}),
        (Shared(conv=True), {}),
        (Shared(conv=False), {}),
    ],
)
def test_norms_that_alone_take_an_output(model: nn.Module, expected: dict[str, str]) -> None:
    before = deepcopy(model.eval().state_dict())
    assert batch_norms_after(model, torch.randn(2, 3, 5, 5)) == expected
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("shift", [Shift("0.bias"), Shift("1.running_mean", -1)])
def test_the_mean_output_is_moved_from_where_the_dense_network_has_it(shift: Shift) -> None:
    dense, by = net().eval(), torch.randn(4)
    moved = deepcopy(dense)
    x = torch.randn(2, 3, 5, 5)
    for _ in range(2):
        shift.move(moved, dense, by)
        scale = dense[1].weight / (dense[1].running_var + dense[1].eps).sqrt()
        expected = dense(x) + (by * scale)[:, None, None]
        torch.testing.assert_close(moved(x), expected)
