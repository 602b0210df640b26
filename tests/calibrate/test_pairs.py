"""Passes that halt at one layer after the other give what a pass of its own for each layer gives, and are fewer."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ttcompress
from ttcompress.calibrate import pairs
from ttcompress.calibrate.calibration import draw_calibration
from ttcompress.calibrate.in_step import bytes_at_halts

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NAMES = ["first", "second", "third", "head"]
PASSES: list[int] = []


class Narrowing(nn.Module):
    """Its maps become smaller; `turned` calls two layers in another order for some batches."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3)
        self.second: nn.Module = nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append(len(x))
        x = self.first(x).relu()
        inner = (self.third, self.second) if self.turned and len(x) % 2 else (self.second, self.third)
        for layer in inner:
            x = functional.avg_pool2d(x + layer(x).relu(), 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def swept(model: nn.Module, batch_size: int = 32) -> dict[str, Tensor]:
    made, _ = ttcompress.compress(
        model, ratio=1.5, include=["*"], calib=IMAGES, batch_size=batch_size, effort="fast"
    )
    return made.state_dict()


def halted_bytes() -> dict[str, int]:
    return bytes_at_halts(Narrowing(), NAMES, IMAGES[:2].clone())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("batch_size", [32, 13])
def test_all_ways_of_passing_give_the_same_bits(
    turned: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    # None in step, from the third on, all.
    for most in (0, halted_bytes()["head"] * 84, 1 << 40):
        monkeypatch.setattr(pairs, "IN_STEP_BYTES", most)
        found.append(swept(Narrowing(turned), batch_size))
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_batches_that_are_cut_pass_in_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttcompress.calibrate.room.BUDGET", 200_000)
    in_step = swept(Narrowing())
    monkeypatch.setattr(pairs, "IN_STEP_BYTES", 0)
    alone = swept(Narrowing())
    assert all(torch.equal(value, alone[name]) for name, value in in_step.items())


@pytest.mark.parametrize(("most", "grows"), [(1 << 40, False), (0, True)])
def test_the_number_of_passes_does_not_grow_with_the_depth(
    most: int, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "IN_STEP_BYTES", most)
    needed = []
    for depth in (1, 7):
        model = Narrowing()
        model.second = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(depth)))
        PASSES.clear()
        swept(model)
        needed.append(len(PASSES))
    assert (needed[1] > needed[0]) == grows


def test_what_is_alive_at_a_halt_is_counted() -> None:
    inputs, one_pixel = IMAGES[:2].nbytes, 4 * 2 * 16
    assert halted_bytes() == {
        "first": inputs,
        # What ReLU made; the output of the convolution is gone.
        "second": inputs + 10 * 10 * one_pixel,
        "third": inputs + 5 * 5 * one_pixel,
        "head": inputs + 2 * 2 * one_pixel + one_pixel,
    }


def test_a_network_that_takes_not_these_inputs_is_not_halted() -> None:
    assert bytes_at_halts(Narrowing(), NAMES, torch.randn(2, 4, 12, 12)) == {}


def test_memory_says_from_which_layer_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Narrowing().requires_grad_(False)
    calibration = draw_calibration(
        "toy", len(IMAGES), None, 0, lambda indices: IMAGES[torch.tensor(indices)].split(16)
    )
    reference: Any = type("Of", (), {"dense": model, "calibration": calibration})
    count = sum(len(batch) for batch in calibration.fitting(0))
    held = halted_bytes()

    def order_within(most: int) -> list[str]:
        # Of both networks, for each image instead of two.
        monkeypatch.setattr(pairs, "IN_STEP_BYTES", most * count)
        return list(pairs._order_in_step(reference, NAMES))

    assert order_within(held["second"]) == NAMES
    assert order_within(held["second"] - 1) == ["third", "head"]
    assert order_within(held["head"] - 1) == []


PASSES_OF_A_LARGE_NETWORK = """
import resource, sys
import torch
from torch import nn
from ttcompress.calibrate.in_step import in_step

torch.set_num_threads(1)
# What a layer makes is 8 MB, and gone when the next one has run.
model = nn.Sequential(nn.Conv2d(3, 128, 1), *(nn.Conv2d(128, 128, 1) for _ in range(3)), nn.MaxPool2d(32))
names = [str(number) for number in range(5)]
batches = [torch.randn(1, 3, 128, 128) for _ in range(24)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with in_step([model], names, batches) as (walk,):
    for name in names:
        walk.calls(name)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux says it")
def test_halted_passes_hold_what_is_alive_and_little_more() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PASSES_OF_A_LARGE_NETWORK], check=True, capture_output=True, text=True
    )
    alive = 24 * 8
    assert alive < float(run.stdout) < 1.5 * alive
