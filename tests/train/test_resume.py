"""Training that never loses work: stopped, killed, starved of disk, given the wrong file and driven to NaN."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import (
    EVERYTHING,
    PRELOADED,
    STEPS,
    equal,
    finite,
    frozen_copy,
    network,
    position,
    saved,
    stream,
    teacher,
    training_setup,
    write_images,
)

from ttcompress.errors import CheckpointError, TrainingError, TrainingStoppedError
from ttcompress.train import loop as training
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions
from ttcompress.train.state import State
from ttcompress.train.stopping import stop_requests

pytestmark = pytest.mark.usefixtures("one_thread")
RATES = {"sgd": 0.05, "adamw": 0.005}
EAGER = {"CHECK_EVERY": 1, "SAVE_EVERY": 0.0}
Actions = dict[tuple[str, int], Callable[[], object]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz, and what uninterrupted trainings leave: sgd and adamw; read only."""
    folder = write_images(tmp_path_factory.mktemp("resume"))
    for optimizer in RATES:
        go_on(folder, folder / optimizer, {}, optimizer)
    return folder


def is_whole(file: Path, folder: Path, optimizer: str = "sgd") -> bool:
    """Whether it is what an uninterrupted training leaves, random numbers and all."""
    return equal(saved(file), saved(folder / optimizer))


def go_on(
    folder: Path, file: Path, actions: Actions, optimizer: str = "sgd", model: nn.Module | None = None
) -> State:
    """Begin or resume; before some batch of the whole training, or while some epoch is scored, something happens."""
    resume = file.exists()
    model = model or network(99 if resume else 0)
    at = position(file) if resume else (0, 0)
    counts = {"batch": at[0] * STEPS + at[1], "score": at[0] + resume}

    def act(module: nn.Module, _: object) -> None:
        kind = "batch" if module.training else "score"
        counts[kind] += 1
        actions.get((kind, counts[kind] - 1), lambda: None)()

    model.register_forward_pre_hook(act)
    options = replace(EVERYTHING, optimizer=optimizer, lr=RATES[optimizer])
    return train(model, options, training_setup(folder, file, teacher=teacher()), resume)


def raising(*numbers: int) -> Callable[[], object]:
    return lambda: [signal.raise_signal(number) for number in numbers]


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("eager", [False, True])
def test_stopped_again_and_again_it_ends_as_if_it_never_was(
    optimizer: str, eager: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in EAGER.items() if eager else ():
        monkeypatch.setattr(training, name, value)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    stops = [
        (("batch", 3), signal.SIGTERM, (0, 4 if eager else 10)),
        (("batch", 11), signal.SIGINT, (0, 12)),
        (("score", 1), signal.SIGTERM, (1, 0)),
        (("batch", 30), signal.SIGINT, (2, 7 if eager else 10)),
        (("batch", 35), signal.SIGTERM, (2, 12)),
    ]
    file = tmp_path / "x.training"
    for place, number, expected in stops:
        with pytest.raises(TrainingStoppedError, match=r"^stopped in epoch \d; .* is in .*x\.training$"):
            go_on(folder, file, {place: raising(number)}, optimizer)
        assert position(file) == expected
        assert [
            signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ] == handlers
    state = go_on(folder, file, {}, optimizer)
    assert is_whole(file, folder, optimizer)
    whole = saved(folder / optimizer)
    assert equal(frozen_copy(state.best), whole["best"])
    assert equal(frozen_copy(state.model.state_dict()), whole["model"])
    assert equal(state.history, whole["progress"]["history"])


def test_a_second_signal_does_not_wait(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    # A shell that starts the tests in the background has them ignore it.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go_on(folder, file, {("batch", 17): raising(signal.SIGINT, signal.SIGINT)})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)
    assert position(file) == (1, 0)
    go_on(folder, file, {})
    assert is_whole(file, folder)


def test_asked_to_stop_while_the_start_is_scored_it_stops_like_later(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    with pytest.raises((TrainingStoppedError, KeyboardInterrupt)) as caught:
        go_on(folder, file, {("score", 0): raising(signal.SIGINT)})
    assert caught.type is TrainingStoppedError
    go_on(folder, file, {})
    assert is_whole(file, folder)


def test_where_there_are_no_signals_it_trains_all_the_same(folder: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=go_on, args=(folder, tmp_path / "x.training", {}))
    thread.start()
    thread.join()
    assert is_whole(tmp_path / "x.training", folder)


# ------------------------------------------------------------------------------------------------------- processes


@contextmanager
def child(mode: str, *arguments: object) -> Iterator[tuple[Any, Connection]]:
    """A process that trains, and a line to it; killed in the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=run_child, args=(theirs, mode, *arguments))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()


def wait_for(line: Connection) -> Any:
    assert line.poll(60)
    return line.recv()


def run_child(line: Connection, mode: str, folder: Path, file: Path, optimizer: str) -> None:
    torch.set_num_threads(1)
    actions: Actions = {("batch", 16): lambda: (line.send("here"), line.recv())}
    if mode == "slow":
        vars(training).update(EAGER)
        actions = {
            ("batch", number): lambda: (line.send("here"), time.sleep(0.01)) for number in range(3 * STEPS)
        }
    if mode == "half":
        vars(training).update(EAGER)
        torch.save, actions = half_save(torch.save, range(4)), {}
    try:
        go_on(folder, file, actions, optimizer)
    except TrainingStoppedError as error:
        line.send(str(error))
        sys.exit(130)
    # Whoever is to be killed does not end before.
    line.send("here")
    line.recv()


def half_save(save: Callable[..., None], first: range) -> Callable[..., None]:
    """Good the first times, then the end of the process in the middle."""
    left = iter(first)

    def write(content: object, target: Any) -> None:
        if next(left, None) is not None:
            return save(content, target)
        save(content, buffer := io.BytesIO())
        target.write(buffer.getvalue()[: buffer.tell() // 2])
        target.flush()
        return os.kill(os.getpid(), signal.SIGKILL)

    return write


@pytest.mark.parametrize(
    ("number", "optimizer"), [(signal.SIGTERM, "adamw"), (signal.SIGINT, "sgd"), (signal.SIGHUP, "sgd")]
)
def test_a_process_that_is_asked_to_stop_saves_and_ends(
    number: int, optimizer: str, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.training"
    with child("wait", folder, file, optimizer) as (process, line):
        wait_for(line)
        os.kill(process.pid, number)
        line.send("go on")
        assert wait_for(line) == f"stopped in epoch 2; the last good state is in {file}"
        process.join(60)
        assert process.exitcode == 130
    assert position(file) == (1, 10)
    go_on(folder, file, {}, optimizer)
    assert is_whole(file, folder, optimizer)


def test_a_closed_terminal_is_ignored_where_nohup_says_so() -> None:
    """And only that."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop_requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path) -> None:
    """Each time it takes a few steps; in the end also of those that were done before."""
    file, delays = tmp_path / "x.training", np.random.default_rng().uniform(0, 0.2, 5)
    for delay in delays:
        with child("slow", folder, file, "sgd") as (process, line):
            wait_for(line)
            time.sleep(delay)
        assert process.exitcode == -signal.SIGKILL
    go_on(folder, file, {})
    assert is_whole(file, folder), delays


def test_killed_in_the_middle_of_a_save_it_has_the_one_before(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    with child("half", folder, file, "sgd") as (process, _):
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    assert position(file) == (0, 3)
    go_on(folder, file, {})
    assert is_whole(file, folder)


def test_a_full_disk_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    file, limits = tmp_path / "x.training", resource.getrlimit(resource.RLIMIT_FSIZE)
    most = len((folder / "sgd").read_bytes()) // 2
    full: Actions = {("batch", 15): lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))}
    try:
        with pytest.raises(CheckpointError, match=r"^.*x\.training: cannot be written: [^\n]*$"):
            go_on(folder, file, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each.name for each in tmp_path.iterdir()] == ["x.training"]
    assert position(file) == (1, 0)
    go_on(folder, file, {})
    assert is_whole(file, folder)


# ------------------------------------------------------------------------------------------------------------ files


FOREIGN: dict[str, Any] = {
    "a network": {"0.weight": torch.ones(3)},
    "a list": [1, 2],
    "an object": TrainingOptions(epochs=1, lr=1),
    "its first key": {"fingerprint": {"lr": 1, "seed": 3}},
}


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", *FOREIGN])
def test_what_is_no_checkpoint_is_refused_in_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    file, model = tmp_path / "x.training", network()
    before, content = frozen_copy(model.state_dict()), (folder / "sgd").read_bytes()
    parts = {
        "empty": [b""],
        "text": [b"{}"],
        "truncated": [content[: len(content) * k // 9] for k in range(1, 9)],
    }
    if kind == "folder":
        file.mkdir()
    for part in parts.get(kind, [b""]):
        if kind in FOREIGN:
            torch.save(FOREIGN[kind], file)
        elif kind in parts:
            file.write_bytes(part)
        with pytest.raises(CheckpointError, match=r"^[^\n]*x\.training: [^\n]*$"):
            train(model, EVERYTHING, training_setup(folder, file), resume=True)
        assert equal(frozen_copy(model.state_dict()), before)


NAN = float("nan")


def put(*keys: Any, value: Any) -> Callable[[Any], object]:
    """Replaces what is under some keys."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def spoil(*keys: Any) -> Callable[[Any], object]:
    """Puts a NaN into the tensor that is under some keys."""

    def change(content: Any) -> None:
        for key in keys:
            content = content[key]
        content.flatten()[0] = NAN

    return change


DAMAGE: dict[str, Callable[[Any], object]] = {
    **{
        f"no {name}": lambda content, name=name: content.pop(name)
        for name in ("model", "optimizer", "precision", "progress", "best")
    },
    **{
        f"{name} a list": put(name, value=[1])
        for name in ("model", "optimizer", "scaler", "progress", "best", "average")
    },
    "fingerprint a number": put("fingerprint", value=5),
    "fingerprint of tensors": put("fingerprint", value={"lr": torch.ones(3)}),
    "no average": put("average", value=None),
    "a tensor less": lambda content: content["model"].pop(next(iter(content["model"]))),
    "a tensor more": put("best", "x", value=torch.ones(1)),
    "another shape": lambda content: content["model"].update(
        {name: each[None] for name, each in content["model"].items()}
    ),
    "another type": lambda content: content["best"].update(
        {name: each.double() for name, each in content["best"].items()}
    ),
    "no tensors": lambda content: content["model"].update(dict.fromkeys(content["model"], 1.0)),
    "a sparse tensor": lambda content: content["best"].update(
        {name: each.to_sparse() for name, each in content["best"].items() if each.dim() == 2}
    ),
    "NaN in the network": lambda content: spoil("model", next(name for name in content["model"]))(content),
    "NaN in the best": lambda content: spoil("best", next(name for name in content["best"]))(content),
    "NaN in the average": lambda content: spoil("average", "values", next(iter(content["best"])))(content),
    "average of other names": put("average", "values", value={}),
    "updates a text": put("average", "updates", value="x"),
    "epoch a text": put("progress", "epoch", value="1"),
    "epoch below 0": put("progress", "epoch", value=-1),
    "epoch true": put("progress", "epoch", value=True),
    "epoch too large": put("progress", "epoch", value=10**9),
    "step a tensor": put("progress", "step", value=torch.ones(2)),
    "step too large": put("progress", "step", value=10**9),
    "sums short": put("progress", "sums", value=[1.0]),
    "sums NaN": put("progress", "sums", value=[1.0, NAN, 1.0]),
    "no images seen": put("progress", "step", value=1),
    "history of numbers": lambda content: put(
        "progress", "history", value=[1] * len(content["progress"]["history"])
    )(content),
    "history NaN": put("progress", "history", 0, "val", value=NAN),
    "history a text": put("progress", "history", 1, "loss", value="x"),
    "history empty": put("progress", "history", value=[]),
    "history another epoch": put("progress", "history", 1, "epoch", value=7),
    "groups a number": put("optimizer", "param_groups", value=5),
    "no groups": put("optimizer", "param_groups", value=[]),
    "a group a number": put("optimizer", "param_groups", 0, value=5),
    "rate a text": put("optimizer", "param_groups", 0, "lr", value="x"),
    "rate NaN": put("optimizer", "param_groups", 0, "lr", value=NAN),
    "other parameters": put("optimizer", "param_groups", 0, "params", value=[7, 8]),
    "kept a list": put("optimizer", "state", value=[]),
    "kept of a text": put("optimizer", "state", value={"x": {}}),
    "kept of no parameter": lambda content: put(
        "optimizer", "state", 10**6, value=content["optimizer"]["state"][0]
    )(content),
    "nothing kept of a parameter": put("optimizer", "state", 0, value={}),
    "kept of another shape": lambda content: content["optimizer"]["state"][0].update(
        {name: torch.ones(7, 7) for name in content["optimizer"]["state"][0]}
    ),
    "kept NaN": lambda content: content["optimizer"]["state"][0].update(
        {name: each * NAN for name, each in content["optimizer"]["state"][0].items()}
    ),
}


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_in_one_line(
    damage: str, optimizer: str, folder: Path, tmp_path: Path
) -> None:
    """And the network stays as it is."""
    content = saved(folder / optimizer)
    DAMAGE[damage](content)
    file = tmp_path / "x.training"
    torch.save(content, file)
    model = network(7)
    before = frozen_copy(model.state_dict())
    options = replace(EVERYTHING, optimizer=optimizer, lr=RATES[optimizer])
    with pytest.raises(CheckpointError, match=r"^[^\n]*x\.training: [^\n]*$"):
        train(model, options, training_setup(folder, file, teacher=teacher()), resume=True)
    assert damage.endswith("too large") or equal(frozen_copy(model.state_dict()), before)


def test_other_options_are_refused_by_name(folder: Path) -> None:
    content, model = (folder / "sgd").read_bytes(), network()
    before = frozen_copy(model.state_dict())
    other = training_setup(folder, folder / "sgd", fingerprint={"lr": 2, "seed": 3, "new": "x"})
    with pytest.raises(
        CheckpointError, match=r"sgd: was trained otherwise: lr was 1, is 2; new was None, is x; repeat"
    ):
        train(model, EVERYTHING, other, resume=True)
    assert equal(frozen_copy(model.state_dict()), before)
    assert (folder / "sgd").read_bytes() == content


@pytest.mark.parametrize("options", [{"norm": False}, {"wide": True}], ids=str)
def test_the_state_of_another_network_is_refused_in_one_line(options: Any, folder: Path) -> None:
    """The same options, but what the factory of the network builds was changed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) if options.get("wide") else network(**options)
    with pytest.raises(CheckpointError, match=r"^[^\n]*sgd: [^\n]*$"):
        train(model, EVERYTHING, training_setup(folder, folder / "sgd"), resume=True)


# ---------------------------------------------------------------------------------------------------- out of memory


def raise_error(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nsecond line"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
    ids=str,
)
def test_out_of_memory_is_one_line_and_nothing_is_lost(
    error: Exception, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "x.training"
    with pytest.raises(TrainingError) as caught:
        go_on(folder, file, {("batch", 17): raise_error(error)})
    assert str(caught.value) == (
        "out of memory in epoch 2: a smaller --batch-size or a larger --accumulate takes less; "
        f"the last good state is in {file}"
    )
    assert caught.value.__cause__ is error
    assert position(file) == (1, 0)
    go_on(folder, file, {})
    assert is_whole(file, folder)


def test_other_errors_of_the_network_are_its_own(folder: Path, tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught:
        go_on(folder, tmp_path / "x.training", {("batch", 3): raise_error(error)})
    assert caught.value is error


def test_without_a_saved_state_none_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    with pytest.raises(TrainingError, match=r"takes less$"):
        go_on(folder, file, {("score", 0): raise_error(MemoryError())})
    assert not file.exists()


# ------------------------------------------------------------------------------------------------------- not finite


def nan_from(batch: int) -> nn.Module:
    """A network with NaN among what it says from some batch on."""
    model, count = network(), iter(range(1000))
    spoil = model.register_forward_hook
    spoil(lambda module, _, found: found * float("nan") if module.training and next(count) >= batch else None)
    return model


class Masked(nn.Module):
    """A network with a mask of infinities that it does not compute with, and a bias of NaN that it never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network(0)
        self.register_buffer("mask", torch.full((3, 3), -float("inf")).triu(1))
        self.unused = nn.Parameter(torch.tensor([NAN]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(images)
        return found


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_infinite_from_the_start_stays_and_does_not_stop_the_training(
    ema: float, folder: Path, tmp_path: Path
) -> None:
    file, model = tmp_path / "x.training", Masked()
    mask = model.get_buffer("mask").clone()
    options = TrainingOptions(epochs=2, lr=0.05, ema=ema)
    whole = train(model, options, training_setup(folder, file))
    assert torch.equal(whole.best["mask"], mask)
    assert finite({name: value for name, value in whole.best.items() if name.startswith("net")})
    assert equal(train(Masked(), options, training_setup(folder, file), resume=True).best["mask"], mask)


def test_a_network_that_turns_nan_ends_in_one_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.training"
    where = "a value is not finite in epoch 2, batch 10: start again with a lower --lr"
    message = rf"^{where}; the last good state is in {file}$"
    with pytest.raises(TrainingError, match=message):
        go_on(folder, file, {}, model=nan_from(13))
    assert position(file) == (1, 0)
    assert finite(saved(file))
    go_on(folder, file, {})
    assert is_whole(file, folder)


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("rate", [1e1, 1e2, 1e4, 1e8, 1e16])
def test_no_learning_rate_brings_nan_into_the_checkpoint(
    rate: float, optimizer: str, folder: Path, tmp_path: Path
) -> None:
    file, few = tmp_path / "x.training", stream(folder, batch_size=32)
    options = TrainingOptions(epochs=4, lr=rate, warm_up=0.0, optimizer=optimizer, ema=0.9)
    ends = pytest.raises(TrainingError, match=r"^[^\n]*not finite in epoch \d[^\n]*$")
    with ends if rate > 1e6 else nullcontext():
        train(network(), options, training_setup(folder, file, stream=few))
    assert finite(saved(file))


def test_gradients_that_are_not_finite_do_not_end_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    """The loss of the last batch of an epoch is finite, but not its gradient: only the next loss shows it."""
    file, model, count = tmp_path / "x.training", network(), iter(range(1000))
    model.get_parameter("10.bias").register_hook(lambda each: each / 0 if next(count) == STEPS - 1 else None)
    with pytest.raises(TrainingError, match="not finite"):
        train(model, TrainingOptions(epochs=2, lr=0.05, clip=0.0), training_setup(folder, file))
    assert finite(saved(file))
