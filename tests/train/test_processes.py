"""Training in several processes: two of them do what one does, and stop and resume as one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from toys import (
    CPU,
    EVERYTHING,
    PRELOADED,
    apart,
    as_torchrun,
    equal,
    finite,
    frozen_copy,
    network,
    position,
    saved,
    stream,
    training_setup,
    write_images,
)
from toys import teacher as a_teacher

from ttcompress.data.training_batches import Stream
from ttcompress.errors import TrainingError, TrainingStoppedError
from ttcompress.processes import World, joined
from ttcompress.torchrun import expected_rank
from ttcompress.train.batch_norm import ReducedBatchNorm, parallel, reduce_batch_norms
from ttcompress.train.loop import train
from ttcompress.train.options import TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")
STEADY = TrainingOptions(epochs=5, lr=0.05, ema=0.9, label_smoothing=0.1, distill=0.5, weight_decay=0.01)
"""Mixtures and dropout are drawn by each process for its own images."""


# ------------------------------------------------------------------------------------------------------------ alone


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ([5, 4, 3, 3, 3], [[0, 3], [1, 2, 4]]),
        ([1, 1, 8, 1], [[2], [0, 1, 3]]),
        ([2, 2], [[0], [1]]),
        ([7], [[0], []]),
        ([], [[], []]),
    ],
)
def test_work_is_shared_out_by_size(sizes: list[int], shares: list[list[int]]) -> None:
    assert [World(CPU, rank, 2).share(sizes) for rank in range(2)] == shares
    assert World(CPU).share(sizes) == list(range(len(sizes)))


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def norms(dims: int, **options: Any) -> tuple[nn.Module, nn.Module]:
    """One of torch's and ours, of the same values."""
    torch.manual_seed(0)
    kind = nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d
    both = [kind(5, **options), kind(5, **options)]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(both[0], name) is not None:
            value = torch.rand(5) + 0.5
            for each in both:
                getattr(each, name).data.copy_(value)
    reduce_batch_norms(both[1])
    return both[0], both[1]


def run(norm: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Output, gradients of some loss and statistics."""
    given = batch.clone().requires_grad_()
    norm.zero_grad()
    output = norm(given)
    (output * batch.exp()).sum().backward()
    assert given.grad is not None
    gradients = {f"{name}'s": each.grad.clone() for name, each in norm.named_parameters()}
    return {"output": output.detach(), "input's": given.grad, **gradients, **frozen_copy(norm.state_dict())}


@pytest.mark.parametrize("shape", [(16, 5), (6, 5, 7), (6, 5, 4, 3)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"momentum": 0.0}, {"affine": False}],
    ids=str,
)
def test_reduced_batch_norm_is_batch_norm(
    shape: tuple[int, ...], options: dict[str, Any], group: None
) -> None:
    theirs, ours = norms(len(shape), **options)
    assert isinstance(ours, ReducedBatchNorm)
    for mode in (True, True, True, False):
        batch = 2 * torch.randn(shape) + 1
        found, expected = (run(norm.train(mode), batch) for norm in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: n + text
            )


@pytest.mark.parametrize("mean", [1e1, 1e3, 1e5])
def test_a_large_mean_costs_no_more_digits_than_elsewhere(mean: float, group: None) -> None:
    """Against float64: the variance is no difference of large numbers, and the output hardly worse than torch's."""
    theirs, ours = norms(4, momentum=1.0, affine=False)
    values = mean + torch.randn(32, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    exact, axes = values.double().numpy(), (0, 2, 3)
    expected = (exact - exact.mean(axes, keepdims=True)) / np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
    errors = [float(np.abs(norm(values).double().numpy() - expected).max()) for norm in (theirs, ours)]
    assert errors[1] <= 4 * errors[0] + 1e-6
    np.testing.assert_allclose(ours.get_buffer("running_mean"), exact.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(ours.get_buffer("running_var"), exact.var(axes, ddof=1), rtol=1e-3)


def test_other_types_come_out_as_they_went_in(group: None) -> None:
    theirs, ours = norms(4)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.randn(8, 5, 3, 3).to(dtype)
        assert ours(values).dtype == theirs(values).dtype == dtype
        torch.testing.assert_close(ours(values), theirs(values), rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-3, atol=1e-3)  # type: ignore[attr-defined]


def test_one_value_has_no_variance_here_either(group: None) -> None:
    for norm in norms(2):
        with pytest.raises(ValueError, match=r"more than (1|one) value (per|a) channel"):
            norm(torch.ones(1, 5))


def test_other_norms_stay_as_they_are() -> None:
    model = nn.Sequential(
        nn.GroupNorm(1, 3), nn.InstanceNorm2d(3, track_running_stats=True), nn.LayerNorm([3, 4, 4])
    )
    kinds = [type(each) for each in model]
    reduce_batch_norms(model)
    assert [type(each) for each in model] == kinds


def test_what_a_batch_norm_does_besides_it_still_does(group: None) -> None:
    class Bounded(nn.BatchNorm2d):
        """As in networks that keep norm and activation in one module."""

        def forward(self, input: Tensor) -> Tensor:
            return torch.relu(super().forward(input))

    model, values = nn.Sequential(Bounded(3)), torch.randn(6, 3, 4, 4)
    expected = model(values)
    reduce_batch_norms(model)
    torch.testing.assert_close(model(values), expected, rtol=1e-4, atol=1e-5)


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    was = distributed.is_initialized()
    with joined(CPU) as world:
        assert (world, expected_rank()) == (World(CPU, 0, 1), 0)
        assert distributed.is_initialized() == was
        assert world.leads
        assert torch.equal(world.total(torch.arange(3)), torch.arange(3))
        assert [world.any(flag) for flag in (True, False)] == [True, False]
        model = network()
        kinds = [type(each) for each in model.modules()]
        assert parallel(model, world) is model
        assert [type(each) for each in model.modules()] == kinds


# -------------------------------------------------------------------------------------------------------- two of them


def share_of(world: World, source: Stream) -> Stream:
    return replace(source, rank=world.rank, size=world.size)


def tiny(folder: Path, count: int) -> Stream:
    """So few images that they are one batch, and no full one."""
    whole = stream(folder, 16)
    return replace(whole, images=whole.images.chosen(range(count)))


def local_norms(seed: int) -> nn.Module:
    """A batch norm without running statistics has those of the batch always."""
    model = network(seed, dropout=0)
    model[2] = nn.BatchNorm2d(6, track_running_stats=False)
    return model


def uneven() -> Tensor:
    return 2 * torch.randn(3, 7, 5, 2, 2, generator=torch.Generator().manual_seed(0)) + 1


def trainings(folder: Path, world: World) -> dict[str, Any]:
    """Whatever one process does as two do: state dict, best, average and history of each."""
    long, parts = replace(STEADY, epochs=9), replace(STEADY, epochs=1)
    source = stream(folder, 16)
    alone = world.size == 1
    cases = {
        "fifty steps": (network(dropout=0), long, source),
        "adamw": (network(dropout=0), replace(parts, optimizer="adamw", lr=0.005), source),
        "in parts": (network(norm=False, dropout=0), replace(parts, accumulate=1 if alone else 3), source),
        "local norms": (local_norms(0), parts, source),
        "a half batch": (network(dropout=0), parts, tiny(folder, 10)),
        "an odd batch": (network(dropout=0), replace(parts, epochs=4), tiny(folder, 5)),
    }
    found = {}
    for name, (model, options, source) in cases.items():
        file = folder / f"{name} of {world.size}, {world.rank}.training"
        given = training_setup(folder, file, world=world, stream=share_of(world, source), teacher=a_teacher())
        state = train(model, options, given)
        found[name] = {
            "end": model.state_dict(),
            "best": state.best,
            "average": state.values,
            "history": state.history,
        }
    return found


def norm_of_shares(world: World) -> list[dict[str, Tensor]]:
    norm = norms(4)[1]
    return [run(norm, batch) for batch in uneven()[:, world.rank :: world.size]]


def totals(world: World) -> dict[str, Any]:
    own = torch.tensor([world.rank + 1.0, 10.0], dtype=torch.float64)
    total = world.total(own)
    flags = [world.any(flag) for flag in (False, True, world.rank == 0, world.rank == 1)]
    return {"total": total.tolist(), "own": own.tolist(), "flags": flags}


def a_nan(folder: Path, world: World) -> dict[str, Any]:
    """Of one process alone, in the second epoch."""
    model, count = network(dropout=0), iter(range(100))

    def spoil(module: nn.Module, _: object, output: Tensor) -> Tensor | None:
        late = module.training and next(count) >= 8
        return output * float("nan") if late and world.rank == 1 else None

    model.register_forward_hook(spoil)
    try:
        train(
            model,
            STEADY,
            training_setup(folder, folder / "nan", world=world, stream=share_of(world, stream(folder, 16))),
        )
    except TrainingError as error:
        return {"message": str(error)}
    return {}


def long_training(folder: Path, world: World, file: Path, dropout: float, line: Connection | None) -> None:
    """3 epochs of 12 steps; with a line to the outside it waits there in the middle of the second."""
    resume = file.exists()
    model, count = network(99 if resume else 0, dropout=dropout), iter(range(100))

    def wait(module: nn.Module, _: object) -> None:
        if line and module.training and next(count) == 16:
            line.send("here")
            line.recv()

    model.register_forward_pre_hook(wait)
    given = training_setup(
        folder, file, world=world, stream=share_of(world, stream(folder)), teacher=a_teacher()
    )
    train(model, replace(EVERYTHING, ema=0.9), given, resume)


def run_child(
    line: Connection, rank: int, port: int, mode: str, folder: Path, file: Path, dropout: float
) -> None:
    torch.set_num_threads(1)
    os.environ.update(as_torchrun(rank, 2, port))
    with joined(CPU) as world:
        assert (world.rank, world.size, expected_rank()) == (rank, 2, rank)
        if mode != "everything":
            try:
                long_training(folder, world, file, dropout, line if mode == "wait" else None)
            except TrainingStoppedError:
                sys.exit(130)
            return
        for each in (0.0, 0.3):
            long_training(folder, world, folder / f"whole {each}", each, None)
        found = {
            "norm": norm_of_shares(world),
            "totals": totals(world),
            "trainings": trainings(folder, world),
        }
        torch.save({**found, "nan": a_nan(folder, world)}, folder / f"rank {rank}.pt")


@contextmanager
def pair(mode: str, folder: Path, file: Path, dropout: float = 0.0) -> Iterator[list[tuple[Any, Connection]]]:
    """Two processes that train together and lines to them; killed in the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    both = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_child, args=(theirs, rank, port, mode, folder, file, dropout))
        process.start()
        theirs.close()
        both.append((process, ours))
    try:
        yield both
    finally:
        for process, _ in both:
            process.kill()
            process.join()


def codes(both: list[tuple[Any, Connection]]) -> list[int]:
    for process, _ in both:
        process.join(100)
    return [process.exitcode for process, _ in both]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz, and what two processes left: rank 0.pt and rank 1.pt, whole 0.0 and whole 0.3; read only."""
    folder = write_images(tmp_path_factory.mktemp("distributed"))
    with pair("everything", folder, folder / "unused") as both:
        assert codes(both) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Any]:
    return trainings(folder, World(CPU))


def test_totals_are_over_both(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        expected = {"total": [3, 20], "own": [rank + 1, 10], "flags": [False, True, True, True]}
        assert found["totals"] == expected


def test_batch_norm_is_over_uneven_shares_as_over_the_whole(ranks: list[dict[str, Any]]) -> None:
    """Outputs, and gradients of the inputs, of the shares; gradients of the parameters add up; statistics alike."""
    norm = norms(4)[0]
    for number, batch in enumerate(uneven()):
        shares = [found["norm"][number] for found in ranks]
        for name, expected in run(norm, batch).items():
            for rank, share in enumerate(shares):
                found = sum(each[name] for each in shares) if name in ("weight's", "bias's") else share[name]
                part = expected[rank::2] if name in ("output", "input's") else expected
                torch.testing.assert_close(
                    found, part, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: n + text
                )


@pytest.mark.parametrize(
    "name", ["fifty steps", "adamw", "in parts", "local norms", "a half batch", "an odd batch"]
)
def test_two_processes_end_where_one_does(
    name: str, folder: Path, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    ours, theirs = (found["trainings"][name] for found in ranks)
    assert equal(ours, theirs)
    alone = single[name]
    assert apart(alone["end"], alone["average"]) > 1e-4
    for part in ("end", "average", "best"):
        assert apart(ours[part], alone[part]) < 1e-5
    for found, expected in zip(ours["history"], alone["history"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert (folder / f"{name} of 2, 0.training").exists()
    assert not (folder / f"{name} of 2, 1.training").exists()
    assert equal(saved(folder / f"{name} of 2, 0.training")["model"], frozen_copy(ours["end"]))


def test_nan_in_one_ends_both(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["nan"] == ranks[1]["nan"]
    assert ranks[0]["nan"]["message"].startswith("a value is not finite in epoch 2, batch 6: ")
    assert position(folder / "nan") == (1, 0)
    assert finite(saved(folder / "nan"))


@pytest.mark.parametrize(
    ("number", "dropout"), [(signal.SIGTERM, 0.0), (signal.SIGKILL, 0.0), (signal.SIGTERM, 0.3)], ids=str
)
def test_what_ends_one_of_two_ends_both_and_they_go_on(
    number: int, dropout: float, folder: Path, tmp_path: Path
) -> None:
    """Bit-equal in the end to those that were not stopped."""
    file = tmp_path / "x.training"
    with pair("wait", folder, file, dropout) as both:
        for _, line in both:
            assert line.poll(60)
        os.kill(both[1][0].pid, number)
        for _, line in both:
            line.send("go on")
        stopped = codes(both)
    if number == signal.SIGTERM:
        assert (stopped, position(file)) == ([130, 130], (1, 10))
    else:
        assert stopped[0] not in (0, None)
        assert (stopped[1], position(file)) == (-signal.SIGKILL, (1, 0))
    with pair("resume", folder, file, dropout) as both:
        assert codes(both) == [0, 0]
    assert equal(saved(file), saved(folder / f"whole {dropout}"))
