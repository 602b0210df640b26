"""Training on the GPU: as on the CPU, resumed bit for bit, out of memory in one line, in processes, with CUDA graphs."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn
from toys import EVERYTHING, apart, stream, trained_on, write_images

from ttcompress.commands.compress import compress_file
from ttcompress.commands.finetune import finetune_file, state_file
from ttcompress.errors import TrainingError, TrainingStoppedError
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.networks.opening import initialise, open_fresh
from ttcompress.processes import World
from ttcompress.recipe import Recipe
from ttcompress.train.batch_norm import ReducedBatchNorm
from ttcompress.train.options import TrainingOptions
from ttcompress.train.state import State

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
PLAIN = TrainingOptions(epochs=1, lr=0.05, distill=0.0, precision="float32")
OPTIONS = {
    "everything": replace(EVERYTHING, epochs=1),
    "adamw": replace(EVERYTHING, epochs=1, optimizer="adamw", lr=0.005),
    "in parts": replace(PLAIN, accumulate=2, mixup=0.3),
    "plain": PLAIN,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz of small grey images, net.pt and net-tt.safetensors for colours, colours.npz; read only."""
    folder = write_images(tmp_path_factory.mktemp("gpu"))
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 64)
    images = generator.integers(0, 128, (64, 32, 32, 3), dtype=np.uint8)
    images[np.arange(64), labels] += 100
    np.savez(folder / "colours.npz", images=images, labels=labels)

    torch.manual_seed(0)
    model = open_fresh("resnet20").model
    initialise(model)
    write_dense(folder / "net.pt", model.state_dict())
    compress_file(folder / "net.pt", folder / "net-tt.safetensors", Recipe(ratio=2, device="cpu"))
    return folder


def trained(folder: Path, options: TrainingOptions, device: torch.device, **given: Any) -> State:
    return trained_on(device, folder, options, score=lambda _: 0.0, **given)


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("augmentation", ["none", "shift", "flip"])
def test_batches_are_those_of_the_cpu(augmentation: str, folder: Path, device: torch.device) -> None:
    here = replace(stream(folder), augmentation=augmentation)
    there = replace(here, device=device)
    for (images, labels), (wanted, own) in zip(there.epoch(2, 3), here.epoch(2, 3), strict=True):
        assert images.device == device
        torch.testing.assert_close(images.cpu(), wanted, rtol=1e-6, atol=1e-6)
        assert own is not None
        assert labels is not None
        assert torch.equal(labels.cpu(), own)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_goes_where_it_goes_on_the_cpu(name: str, folder: Path, device: torch.device) -> None:
    found = trained(folder, OPTIONS[name], device)
    wanted = trained(folder, OPTIONS[name], CPU)
    assert {each.device for each in found.model.state_dict().values()} == {device}
    assert apart(found.model.state_dict(), wanted.model.state_dict()) < 1e-3
    assert found.history[1]["loss"] == pytest.approx(wanted.history[1]["loss"], rel=1e-3)
    if found.average and wanted.average:
        assert apart(found.average.values, wanted.average.values) < 1e-3


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "auto"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_narrow_types(precision: str, channels_last: bool, folder: Path, device: torch.device) -> None:
    options = replace(EVERYTHING, epochs=1, precision=precision, channels_last=channels_last)
    found = trained(folder, options, device)
    wanted = trained(folder, OPTIONS["everything"], CPU)
    # The first scales of the loss may be too large for float16, and their steps are left out.
    most = 0.5 if precision == "float16" else 0.1
    assert apart(found.model.state_dict(), wanted.model.state_dict()) < most
    assert found.scaler.is_enabled() == (precision == "float16" and device.type == "cuda")


def test_compiled_with_cuda_graphs(folder: Path, gpu: torch.device) -> None:
    options = replace(OPTIONS["plain"], epochs=2, distill=0.5, precision="bfloat16")
    found = trained(folder, replace(options, compile=True), gpu)
    wanted = trained(folder, options, gpu)
    assert apart(found.model.state_dict(), wanted.model.state_dict()) < 0.05
    assert found.history[2]["loss"] == pytest.approx(wanted.history[2]["loss"], rel=0.1)


# ------------------------------------------------------------------------------------------------------- file to file


def recipe(folder: Path, device: torch.device, **options: Any) -> Recipe:
    data = f"npz:{folder / 'colours.npz'}"
    quick = {"train": data, "val": data, "epochs": 2, "lr": 0.01, "batch_size": 32, "precision": "float32"}
    return Recipe(**{**quick, "device": str(device), "seed": 0, **options})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_bit_for_bit(optimizer: str, folder: Path, tmp_path: Path, device: torch.device) -> None:
    options = {"deterministic": True, "optimizer": optimizer, "lr": 0.002}
    source, asked = folder / "net-tt.safetensors", recipe(folder, device, **options)
    finetune_file(source, tmp_path / "whole.safetensors", asked, origin=folder / "net.pt")

    def stop(epoch: Any) -> None:
        if epoch["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = tmp_path / "cut.safetensors"
    with pytest.raises(TrainingStoppedError):
        finetune_file(source, cut, asked, origin=folder / "net.pt", log=stop)
    assert state_file(cut).is_file()
    assert not cut.exists()
    finetune_file(source, cut, asked, origin=folder / "net.pt", resume=True)
    assert cut.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_precision_is_chosen_and_written(folder: Path, tmp_path: Path, device: torch.device) -> None:
    output = tmp_path / "auto.safetensors"
    asked = recipe(folder, device, epochs=1, precision="auto")
    finetune_file(folder / "net-tt.safetensors", output, asked, origin=folder / "net.pt")
    assert read_metadata(output)["finetuning"]["precision"] in ("float32", "bfloat16")


@pytest.fixture
def little_memory(gpu: torch.device) -> Iterator[None]:
    """A GPU with 256 MiB more than what is held already."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    held = torch.cuda.memory_reserved(gpu) + 2**28
    torch.cuda.set_per_process_memory_fraction(held / total, gpu)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_out_of_memory_in_one_line(folder: Path, tmp_path: Path, gpu: torch.device) -> None:
    """Nothing is lost: what was there stays, and a smaller batch trains."""
    output = tmp_path / "out.safetensors"
    source, origin = folder / "net-tt.safetensors", folder / "net.pt"
    tiled = {name: np.concatenate([each] * 60) for name, each in np.load(folder / "colours.npz").items()}
    np.savez(tmp_path / "many.npz", **tiled)
    data = f"npz:{tmp_path / 'many.npz'}"

    with pytest.raises(TrainingError, match=r"out of memory.*--batch-size") as caught:
        finetune_file(
            source, output, recipe(folder, gpu, train=data, batch_size=3840, epochs=1), origin=origin
        )
    assert "\n" not in str(caught.value)
    assert "the last good state is in" in str(caught.value)
    assert not output.exists()
    assert state_file(output).is_file()

    # The error holds what was there when memory ran out.
    del caught
    gc.collect()
    torch.cuda.empty_cache()
    finetune_file(source, output, recipe(folder, gpu, batch_size=16, epochs=1), origin=origin, force=True)
    assert output.is_file()


# --------------------------------------------------------------------------------------------------- several processes


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    """A group of this process alone: NCCL on a GPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = distributed.HashStore()
    own = device if device.type == "cuda" else None
    distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=own)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_processes_that_exchange_gradients(folder: Path, device: torch.device) -> None:
    """One that believes in another, and exchanges with itself alone, trains as one that is alone."""
    several = World(device, 0, 2)
    assert several.total(torch.arange(3.0, device=device)).tolist() == [0, 1, 2]
    assert (several.any(True), several.any(False)) == (True, False)
    several.wait()
    options = replace(PLAIN, accumulate=2)
    found, wanted = trained(folder, options, device, world=several), trained(folder, options, device)
    assert apart(found.model.state_dict(), wanted.model.state_dict()) < 1e-4


@pytest.mark.usefixtures("group")
def test_batch_norm_of_processes(device: torch.device) -> None:
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    exact = nn.BatchNorm2d(5).double().train()
    exact(x).square().mul(x).sum().backward()
    ours = ReducedBatchNorm(5).to(device).train()
    near = x.float().to(device)
    ours(near).square().mul(near).sum().backward()
    assert apart(ours.state_dict(), exact.state_dict()) < 1e-5
    assert ours.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad.cpu().double(), exact.weight.grad, rtol=1e-4, atol=1e-4)
