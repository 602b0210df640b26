"""Training on a GPU that is pretended: nothing is on the wrong device, and every bit is as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretended_gpu import GPU, OnGpu, PretendedGpu, pretended_gpu
from torch import Tensor, nn
from toys import (
    CPU,
    EVERYTHING,
    STEPS,
    accuracy,
    equal,
    network,
    stream,
    trained_on,
    write_images,
)

from ttcompress.data import resident
from ttcompress.data.augment import flipped, shifted
from ttcompress.data.opening import open_data
from ttcompress.data.resident import Shown
from ttcompress.errors import DataError
from ttcompress.records.report import Preprocessing
from ttcompress.train.loop import all_finite
from ttcompress.train.options import TrainingOptions
from ttcompress.train.state import State

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz; read only."""
    return write_images(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch) as mode:
        yield mode


def at_home(values: Any) -> Any:
    """The same on the CPU, through all dicts and lists."""
    if isinstance(values, dict):
        return {name: at_home(each) for name, each in values.items()}
    if isinstance(values, list | tuple):
        return [at_home(each) for each in values]
    return values.values if isinstance(values, OnGpu) else values


def scored_at_home(model: nn.Module) -> float:
    here = network(dropout=0)
    here.load_state_dict(at_home(dict(model.state_dict())))
    return accuracy(here.eval())


def trained(folder: Path, options: TrainingOptions, device: torch.device, **given: Any) -> State:
    return trained_on(device, folder, options, **{"score": scored_at_home, **given})


PLAIN = TrainingOptions(epochs=1, lr=0.05, distill=0.0, precision="float32")
OPTIONS = {
    "everything": replace(EVERYTHING, epochs=2),
    "adamw": replace(EVERYTHING, epochs=1, optimizer="adamw", lr=0.005),
    "in parts": replace(PLAIN, accumulate=2, mixup=0.3),
    "plain": PLAIN,
}


@pytest.mark.parametrize("most_bytes", [resident.MOST_BYTES, 0])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_there_is_a_training_here(
    name: str, most_bytes: int, folder: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From images that lie there, and from such as are sent batch by batch."""
    monkeypatch.setattr(resident, "MOST_BYTES", most_bytes)
    options = OPTIONS[name]
    found = trained(folder, options, GPU)
    wanted = trained(folder, options, torch.device("cpu"))
    assert all(isinstance(each, OnGpu) for each in found.model.state_dict().values())
    assert equal(at_home(dict(found.model.state_dict())), dict(wanted.model.state_dict()))
    assert equal(at_home(found.best), wanted.best)
    assert equal(found.history, wanted.history)
    if found.average and wanted.average:
        assert equal(at_home(found.average.values), wanted.average.values)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_does_not_wait(name: str, folder: Path, gpu: PretendedGpu) -> None:
    """What has come of it is looked at every tenth step and at the end of an epoch."""
    # To clip, torch asks for the device of gradients where it is told that they are on the CPU.
    options = replace(OPTIONS[name], clip=0.0)
    reads = []
    for epochs in (1, 2):
        before = gpu.waits
        trained(folder, replace(options, epochs=epochs), GPU, score=lambda _: 0.0)
        reads.append(gpu.waits - before)
    assert reads[1] - reads[0] < STEPS


@pytest.mark.parametrize("augmentation", ["none", "shift", "flip"])
@pytest.mark.parametrize("most_bytes", [resident.MOST_BYTES, 0])
def test_batches_there_are_those_here(
    most_bytes: int, augmentation: str, folder: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "MOST_BYTES", most_bytes)
    here = replace(stream(folder), augmentation=augmentation, rank=1, size=2)
    there = replace(here, device=GPU)
    assert equal(at_home([*there.epoch(1, 2)]), [*here.epoch(1, 2)])
    assert equal(at_home(there.sample), here.sample)
    assert [*there.epoch(1, here.steps)] == []
    assert gpu.waits == 0


@pytest.mark.parametrize("labelled", [True, False])
def test_images_are_shown_there_as_here(labelled: bool, folder: Path, gpu: PretendedGpu) -> None:
    images = stream(folder).images
    if not labelled:
        np.savez(folder / "bare.npz", images=np.load(folder / "train.npz")["images"])
        images = open_data(f"npz:{folder / 'bare.npz'}")
    here, there = (Shown(images, stream(folder).preprocessing, each) for each in (CPU, GPU))
    assert equal(at_home([*there.batches(20)]), [*here.batches(20)])
    with pytest.raises(DataError, match="channels"):
        [*Shown(images, Preprocessing((0.0,) * 3, (1.0,) * 3), GPU).batches(20)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found_there(bad: float, gpu: PretendedGpu) -> None:
    tensors = [torch.randn(3, 2), torch.randn(4, dtype=torch.float64), torch.empty(0), torch.randn(2).half()]
    for number, each in enumerate(tensors):
        assert all_finite([each.to(GPU) for each in tensors])
        if each.numel():
            spoilt = [*tensors]
            spoilt[number] = each.clone()
            spoilt[number][1] = bad
            assert not all_finite([each.to(GPU) for each in spoilt])
            assert not all_finite(spoilt)
    assert all_finite([])


def test_augmentation_there_is_as_here(gpu: PretendedGpu) -> None:
    batch = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    which, down, right = torch.tensor([True, False]), torch.tensor([1, -1]), torch.tensor([0, 2])
    there = batch.to(GPU)
    assert torch.equal(at_home(flipped(there, which)), flipped(batch, which))
    assert torch.equal(at_home(shifted(there, down, right, 3)), shifted(batch, down, right))
    assert gpu.waits == 0


def test_the_pretence_finds_what_is_on_the_wrong_device(gpu: PretendedGpu) -> None:
    x: Tensor = torch.ones(3).to(GPU)
    assert isinstance(x, OnGpu)
    with pytest.raises(RuntimeError, match="on the CPU and on the GPU"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).sum().item() == 6
    assert gpu.waits == 1
