"""Passes that halt at one layer after the other give what a pass of its own for each layer gives, and are fewer."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ttcompress
from ttcompress.calibrate import in_step, pairs
from ttcompress.calibrate.calibration import draw_calibration
from ttcompress.calibrate.in_step import Halt, Halts, halts_of
from ttcompress.calibrate.measured import Batch
from ttcompress.calibrate.observe import hooked
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.tt.spool import Spool

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


@pytest.fixture
def free_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file takes no time, so that what does not fit is laid aside."""
    monkeypatch.setattr(pairs, "FILE_SPEED", inf)


def halts(model: nn.Module | None = None) -> Halts:
    found = halts_of(model or Narrowing(), NAMES, IMAGES[:2].clone())
    assert found is not None
    return found


class Aliases(nn.Module):
    """Views of weights and inputs, in-place changes, and one tensor under several names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.third, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        self.places = torch.randn(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.flatten()[None, None]
        turned = self.third.weight.t()
        x = self.first(x[:, :, ::1])
        whole, half = x, x[:, 8:]
        half.mul_(2)
        x = self.second(x)
        x = (x.flatten(2) + whole.flatten(2) + places).transpose(1, 2)
        x = self.third(x) + x @ turned
        logits: Tensor = self.head(x.mean(1))
        return logits


class Remembering(Narrowing):
    """Keeps what it made for the next batch of the same size; what passes that halt need is made by the first of them."""

    def forward(self, x: Tensor) -> Tensor:
        known = vars(self).setdefault("known", {})
        key = x.shape, threading.current_thread() is threading.main_thread()
        if key not in known:
            known[key] = torch.ones_like(x)
        return super().forward(x * known[key])


@pytest.mark.parametrize("build", [Narrowing, lambda: Narrowing(turned=True), Aliases, Remembering])
@pytest.mark.parametrize("batch_size", [32, 13])
@pytest.mark.usefixtures("free_file")
def test_all_ways_of_passing_give_the_same_bits(
    build: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_step, "WORTH_LAYING_ASIDE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "_order_in_step", lambda reference, order: [])
        alone = swept(build(), batch_size)

    # All in a file, some of it, the last layers only, nothing.
    for most in (0, halts(build()).by_name["head"].held * 84, 1 << 40):
        monkeypatch.setattr(pairs, "IN_STEP_BYTES", most)
        other = swept(build(), batch_size)
        assert all(torch.equal(value, other[name]) for name, value in alone.items())

    monkeypatch.setattr(pairs, "Spool", partial(Spool, 0))
    other = swept(build(), batch_size)
    assert all(torch.equal(value, other[name]) for name, value in alone.items())


def test_pairs_that_are_laid_aside_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while those that are held out add up, nor after."""
    monkeypatch.setattr(pairs, "Spool", partial(Spool, 0))
    model = Narrowing().eval()
    plan = make_plan(model, Recipe(ranks=2, conv_ranks=2, format="lowrank"))
    found = pairs.Pairs(plan.layers[0])
    columns = torch.randn(found.fitted.size, 30)
    for number in range(4):
        found.add((columns, 5), (2 * columns, 5), Batch(6, number, is_held_out=number > 1))
    assert not found.fitted._sums
    assert found.held_out._sums
    found.lay_aside()
    assert not found.held_out._sums
    assert torch.equal(found.fitted.own, found.held_out.own)
    assert torch.allclose(found.fitted.crossed, 2 * found.fitted.own)


@pytest.mark.usefixtures("free_file")
def test_what_is_laid_aside_takes_no_memory_and_is_the_same_when_called_back() -> None:
    model = Aliases().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [IMAGES[:4], IMAGES[4:8]]
    found, expected = [], []
    with hooked(model, NAMES, lambda name, module, call: expected.append(call.first.clone())):
        for batch in batches:
            model(batch)
    with in_step.in_step([model], NAMES, batches, 0) as (walk,):
        for name in NAMES:
            for number in range(len(batches)):
                call = walk.call(number, name)
                assert call is not None
                found.append(call.first.clone())
                walk.leave(number)
            assert sum(walk._held) < 2 * in_step.WORTH_LAYING_ASIDE * len(batches)
    for at in range(len(NAMES)):
        for number in range(2):
            assert torch.equal(found[at * 2 + number], expected[number * len(NAMES) + at])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_are_cut_pass_in_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ttcompress.calibrate.room.BUDGET", 200_000)
    together = swept(Narrowing())
    monkeypatch.setattr(pairs, "_order_in_step", lambda reference, order: [])
    alone = swept(Narrowing())
    assert all(torch.equal(value, alone[name]) for name, value in together.items())


@pytest.mark.parametrize(("most", "speed", "grows"), [(1 << 40, 1, False), (0, inf, False), (0, 1, True)])
def test_the_number_of_passes_does_not_grow_with_the_depth(
    most: int, speed: float, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "IN_STEP_BYTES", most)
    monkeypatch.setattr(pairs, "FILE_SPEED", speed)
    needed = []
    for depth in (1, 7):
        model = Narrowing()
        model.second = nn.Sequential(*(nn.Conv2d(16, 16, 1) for _ in range(depth)))
        PASSES.clear()
        swept(model)
        needed.append(len(PASSES))
    assert (needed[1] > needed[0]) == grows


def test_what_is_alive_at_a_halt_is_counted() -> None:
    one_pixel = 4 * 2 * 16
    found = halts()
    assert {name: halt.held for name, halt in found.by_name.items()} == {
        # The input was made elsewhere.
        "first": 0,
        # What ReLU made; the output of the convolution is gone.
        "second": 10 * 10 * one_pixel,
        "third": 5 * 5 * one_pixel,
        "head": 2 * 2 * one_pixel + one_pixel,
    }
    assert 0 < found.by_name["first"].seconds < found.by_name["head"].seconds < found.seconds


def test_views_of_weights_are_not_what_a_pass_made() -> None:
    found = halts(Aliases())
    assert found.by_name["first"].held == 0


def test_a_network_that_takes_not_these_inputs_is_not_halted() -> None:
    assert halts_of(Narrowing(), NAMES, torch.randn(2, 4, 12, 12)) is None


@pytest.mark.parametrize(
    ("speed", "most", "expected"),
    [
        # All fits, though a file would take for ever.
        (1e-9, 100, NAMES),
        # What the second layer sees does not.
        (1e-9, 50, ["third", "head"]),
        # In step for the last one alone is no faster than on its own.
        (1e-9, 15, []),
        (1e-9, 5, []),
        # As long as a file takes less than a pass: 1.2, 0.4 and 0.2 s.
        (100, 5, NAMES),
        # 120, 40 and 20 s.
        (1, 5, []),
    ],
)
def test_from_which_layer_on_passes_go_in_step(
    speed: float, most: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name = {
        name: Halt(held, second)
        for name, held, second in zip(NAMES, (0, 60, 20, 10), (10, 30, 40, 60), strict=True)
    }
    monkeypatch.setattr(pairs, "halts_of", lambda *_: Halts(by_name, 70))
    monkeypatch.setattr(pairs, "IN_STEP_BYTES", most * 84)
    monkeypatch.setattr(pairs, "FILE_SPEED", speed)
    calibration = draw_calibration(
        "toy", len(IMAGES), None, 0, lambda indices: IMAGES[torch.tensor(indices)].split(16)
    )
    reference: Any = type("Of", (), {"dense": Narrowing(), "calibration": calibration})
    assert pairs._order_in_step(reference, NAMES) == expected


@pytest.mark.usefixtures("free_file")
def test_what_a_network_keeps_is_there_for_all_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_step, "WORTH_LAYING_ASIDE", 1)
    model = Remembering().eval()
    with in_step.in_step([model], NAMES, [IMAGES[:4], IMAGES[4:8], IMAGES[8:12]], 0) as (walk,):
        for name in NAMES[:2]:
            for number in range(3):
                assert walk.call(number, name) is not None
                walk.leave(number)
        (kept,) = vars(model)["known"].values()
        assert kept.untyped_storage().nbytes() == 0
    assert torch.equal(kept, torch.ones(4, 3, 12, 12))


def test_a_sweep_looks_at_no_more_images_of_a_large_set() -> None:
    images = torch.zeros(3000, 1)
    calibration = draw_calibration(
        "toy", len(images), 3000, 0, lambda indices: images[torch.tensor(indices)].split(64)
    )
    seen = {False: 0, True: 0}
    for piece, at in pairs._pieces(calibration):
        seen[at.is_held_out] += len(piece)
    assert seen == {False: pairs.SWEEP_IMAGES, True: pairs.DECIDING_IMAGES}


PASSES_OF_A_LARGE_NETWORK = """
import torch
from torch import nn
from ttcompress.calibrate.in_step import halts_of, in_step

def held():
    # Of its own making: what is read from libraries comes and goes.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon:"))

torch.set_num_threads(1)
# What a layer makes is 8 MB, and gone when the next one has run.
model = nn.Sequential(nn.Upsample(scale_factor=8), nn.Tanh(), nn.Tanh(), nn.Tanh(), nn.MaxPool2d(32))
names = [str(number) for number in range(5)]
batches = [torch.randn(1, 2, 128, 128) for _ in range(24)]
# What is loaded for the first call is no memory of a pass.
halts_of(model, names, batches[0])
before = held()
with in_step([model], names, batches, MOST) as (walk,):
    for name in names:
        for number in range(len(batches)):
            walk.call(number, name)
            walk.leave(number)
    print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read where Linux says it")
@pytest.mark.parametrize("most", [24 * 8, 48])
def test_halted_passes_hold_what_they_may_and_little_more(most: int) -> None:
    program = PASSES_OF_A_LARGE_NETWORK.replace("MOST", str(most << 20))
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    # What was there before may be given back meanwhile.
    assert most - 16 < float(run.stdout) < most + 60
