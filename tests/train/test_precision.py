"""Which precision a training runs in: chosen by the clock at the start, then kept; the clock is the test's own."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import (
    CPU,
    EVERYTHING,
    STEPS,
    equal,
    network,
    position,
    saved,
    teacher,
    training_setup,
    write_images,
)

import ttcompress
from ttcompress.errors import CheckpointError, TrainingStoppedError
from ttcompress.processes import World
from ttcompress.train import precision
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions
from ttcompress.train.precision import chosen_precision, settled
from ttcompress.train.state import State

pytestmark = pytest.mark.usefixtures("one_thread")
AUTO = replace(EVERYTHING, precision="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz; read only."""
    return write_images(tmp_path_factory.mktemp("precision"))


class Clock:
    """Of steps that take some seconds in float32, and others in bfloat16; what ran is listed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wide, self.narrow = 2.0, 1.0
        self.ran: list[str] = []

    def time(self, model: nn.Module) -> nn.Module:
        """Have every training step of a network take its time."""
        model.register_forward_pre_hook(self._pass)
        return model

    def _pass(self, module: nn.Module, _: object) -> None:
        if not module.training:
            return
        is_narrow = torch.is_autocast_enabled("cpu")
        self.now += self.narrow if is_narrow else self.wide
        self.ran.append("bfloat16" if is_narrow else "float32")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def trained(
    folder: Path,
    model: nn.Module,
    options: TrainingOptions,
    file: Path | None = None,
    resume: bool = False,
) -> State:
    return train(model, options, training_setup(folder, file, teacher=teacher()), resume)


@pytest.mark.parametrize(
    ("narrow", "expected"),
    [(0.9, "bfloat16"), (1.8, "bfloat16"), (1.81, "float32"), (2.0, "float32"), (9.0, "float32")],
)
def test_bfloat16_where_it_gains_a_tenth(narrow: float, expected: str, folder: Path, clock: Clock) -> None:
    """And nothing else is another than if it had been stated: not one bit."""
    clock.narrow = narrow
    found = trained(folder, clock.time(network()), AUTO)
    stated = trained(folder, network(), replace(AUTO, precision=expected))
    assert found.precision == stated.precision == expected
    assert set(clock.ran[-3 * STEPS :]) == {expected}
    assert equal(found.model.state_dict(), stated.model.state_dict())
    assert equal(found.optimizer.state_dict(), stated.optimizer.state_dict())
    assert equal(found.history, stated.history)


def test_a_few_steps_are_timed_by_turns(folder: Path, clock: Clock) -> None:
    trained(folder, clock.time(network()), AUTO)
    assert clock.ran[: -3 * STEPS] == ["float32"] * 2 + ["bfloat16"] + ["bfloat16", "float32"] * 3


def test_fewer_where_they_take_minutes(folder: Path, clock: Clock) -> None:
    clock.wide, clock.narrow = 300.0, 200.0
    assert trained(folder, clock.time(network()), AUTO).precision == "bfloat16"
    assert clock.ran[: -3 * STEPS] == ["float32"] * 2 + ["bfloat16"] * 2 + ["float32"]


def test_one_slow_moment_of_the_machine_does_not_decide(folder: Path, clock: Clock) -> None:
    model = clock.time(network())
    count = iter(range(10**6))

    def stutter(module: nn.Module, _: object) -> None:
        # The first timed step in bfloat16, and the last of those in float32.
        if module.training and next(count) in (3, 8):
            clock.now += 5.0

    model.register_forward_pre_hook(stutter)
    assert trained(folder, model, AUTO).precision == "bfloat16"


@pytest.mark.parametrize(("seconds", "expected"), [(0.9, "bfloat16"), (0.8, "float32")])
def test_a_short_training_stays_in_float32(seconds: float, expected: str, folder: Path, clock: Clock) -> None:
    """36 steps of 0.8 seconds, fewer than 30 seconds."""
    clock.wide, clock.narrow = seconds, 0.1
    assert trained(folder, clock.time(network()), AUTO).precision == expected


def test_where_every_run_is_to_be_the_same_nothing_is_timed(folder: Path, clock: Clock) -> None:
    found = trained(folder, clock.time(network()), replace(AUTO, deterministic=True))
    assert found.precision == "float32"
    assert clock.ran == ["float32"] * 3 * STEPS


class Float32Only(nn.Module):
    """As an operator that this device does not have in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("\"an operator\" not implemented for 'BFloat16'")
        return x


def test_what_cannot_run_in_bfloat16_runs_in_float32(folder: Path, clock: Clock) -> None:
    model = nn.Sequential(Float32Only(), *network())
    assert trained(folder, clock.time(model), AUTO).precision == "float32"


def test_an_error_of_the_network_itself_is_raised(folder: Path, clock: Clock) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(folder, clock.time(nn.Sequential(nn.Flatten(), nn.Linear(3, 4))), AUTO)


class Held(nn.Module):
    """A count of its calls, a table that grows to the largest of them, one that never changes, a mask with NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.register_buffer("same", torch.arange(3.0).expand(4, 3), persistent=False)
        self.register_buffer("mask", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        if len(x) > len(self.table):
            self.table = torch.arange(float(len(x)))
        return x


def test_what_a_network_holds_is_as_before(folder: Path, clock: Clock) -> None:
    held = Held()
    found = trained(folder, clock.time(nn.Sequential(held, *network())), replace(AUTO, ema=0.0))
    assert found.precision == "bfloat16"
    assert float(held.calls) == 3 * STEPS
    assert len(held.table) >= 8


def test_memory_formats_are_tried_and_then_as_asked(folder: Path) -> None:
    kept = settled(AUTO, "bfloat16", CPU)
    assert kept.channels_last is False
    unset = replace(AUTO, channels_last=None)
    gpu = torch.device("cuda", 0)
    found = {
        (name, device): settled(unset, name, device).channels_last
        for name in ("float32", "bfloat16")
        for device in (CPU, gpu)
    }
    assert found == {
        ("float32", CPU): True,
        ("bfloat16", CPU): True,
        ("float32", gpu): False,
        ("bfloat16", gpu): True,
    }


def is_channels_last(model: nn.Module) -> bool:
    kernel = model[0].weight  # type: ignore[index]
    return bool(kernel.is_contiguous(memory_format=torch.channels_last))


def test_a_module_is_laid_out_only_where_that_is_asked_for(folder: Path, clock: Clock) -> None:
    def wide(seed: int) -> nn.Module:
        # A kernel of one input channel is in both formats.
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 4))

    x, labels = torch.randn(64, 2, 8, 8), torch.arange(64) % 4
    batches = list(zip(x.split(4), labels.split(4), strict=True))
    for last in (False, None):
        model = clock.time(wide(0))
        ttcompress.finetune(model, batches, epochs=2, channels_last=last, device="cpu")
        assert not is_channels_last(model)
        assert "bfloat16" in clock.ran
    model = wide(0)
    ttcompress.finetune(model, batches, epochs=1, channels_last=True, device="cpu")
    assert is_channels_last(model)


# ------------------------------------------------------------------------------------------------------- going on


def test_a_resumed_training_keeps_what_was_chosen(folder: Path, tmp_path: Path, clock: Clock) -> None:
    whole = trained(folder, network(), replace(AUTO, precision="bfloat16"))
    file = tmp_path / "x.training"
    model = clock.time(network())
    stop_at(model, batch=9 + STEPS + 3)
    with pytest.raises(TrainingStoppedError):
        trained(folder, model, AUTO, file)
    assert 0 < position(file)[0] < 3
    assert saved(file)["precision"] == "bfloat16"

    # Now the clock would say something else, but is not asked.
    clock.narrow, clock.ran = 9.0, []
    done = position(file)[0] * STEPS + position(file)[1]
    found = trained(folder, clock.time(network(99)), AUTO, file, resume=True)
    assert found.precision == "bfloat16"
    assert clock.ran == ["bfloat16"] * (3 * STEPS - done)
    assert equal(found.model.state_dict(), whole.model.state_dict())
    assert equal(found.history, whole.history)


def stop_at(model: nn.Module, batch: int) -> None:
    """Ask the process to stop in some forward pass of the training."""
    count = iter(range(10**6))

    def ask(module: nn.Module, _: object) -> None:
        if module.training and next(count) == batch:
            signal.raise_signal(signal.SIGTERM)

    model.register_forward_pre_hook(ask)


def test_asked_to_stop_while_steps_are_timed_it_can_go_on(folder: Path, tmp_path: Path, clock: Clock) -> None:
    file = tmp_path / "x.training"
    model = clock.time(network())
    stop_at(model, batch=4)
    with pytest.raises(TrainingStoppedError):
        trained(folder, model, AUTO, file)
    assert position(file) == (0, 0)
    assert trained(folder, network(99), AUTO, file, resume=True).precision == "bfloat16"


@pytest.mark.parametrize("wrong", [None, "auto", "float64", ["float32"], torch.ones(2), 5])
def test_a_precision_that_there_is_not_is_refused(wrong: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    trained(folder, network(), replace(AUTO, epochs=1), file)
    content = saved(file)
    content["precision"] = wrong
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="or damaged: its precision; start again"):
        trained(folder, network(), replace(AUTO, epochs=1), file, resume=True)


# -------------------------------------------------------------------------------------------------- more than one


class Beside(World):
    """The first of two processes, where the other one's times are these, one after the other."""

    def total(self, values: Tensor) -> Tensor:
        return values + OTHERS.pop(0)


OTHERS: list[float] = []


@pytest.mark.parametrize(("other", "expected"), [(1.2, "bfloat16"), (1.4, "float32")])
def test_processes_decide_by_their_mean(other: float, expected: str, folder: Path, clock: Clock) -> None:
    OTHERS[:] = [1000.0, other]
    model = clock.time(network())
    setup = training_setup(folder, world=Beside(CPU, 0, 2))
    # Half the time here, the other process's share beside it: 0.85 or 0.95 in the mean.
    state = State(
        model, torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", enabled=False), None
    )
    assert chosen_precision(state, replace(AUTO, accumulate=2, distill=0.0), setup) == expected
    assert not OTHERS


# ----------------------------------------------------------------------------------------------- the user's loader


class Drawn(TensorDataset):
    """Images moved by the random numbers of Python, as augmentations of the user's do."""

    def __getitem__(self, index: int) -> Any:
        x, label = super().__getitem__(index)
        return x + random.random() / 10, label


def test_a_loader_is_asked_no_more_often_for_the_choice(clock: Clock) -> None:
    ends = []
    for given in ("auto", "bfloat16"):
        random.seed(0)
        generator = torch.Generator().manual_seed(1)
        x, labels = torch.randn(64, 16, generator=torch.Generator().manual_seed(2)), torch.arange(64) % 4
        loader: Any = DataLoader(Drawn(x, labels), batch_size=8, shuffle=True, generator=generator)
        torch.manual_seed(0)
        model = clock.time(nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.2), nn.ReLU(), nn.Linear(32, 4)))
        history = ttcompress.finetune(model, loader, epochs=3, precision=given, device="cpu")
        ends.append((history, model.state_dict()))
    assert "float32" in clock.ran
    assert equal(ends[0], ends[1])
