"""Checkpoints of every kind that people have, and the ones that would harm them."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ttcompress.errors import CheckpointError
from ttcompress.files.checkpoint import is_compressed, is_safetensors, load_checkpoint, load_compressed
from ttcompress.networks.zoo import CifarResNet, lenet5

STATE = {
    "fc.weight": torch.arange(6.0).reshape(2, 3),
    "fc.bias": torch.tensor([0.5, -1.0]),
    "bn.num_batches_tracked": torch.tensor(7),
}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}

Save = Callable[[object, Path], None]


def save_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def save_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS = {"zip": save_zip, "legacy": save_legacy}
both_containers = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


def equal(read: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert list(read) == list(wanted)
    return all(
        read[name].dtype == wanted[name].dtype
        and read[name].shape == wanted[name].shape
        and torch.equal(read[name], wanted[name])
        for name in wanted
    )


def refused(path: Path, key: str = "") -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, key)
    text = str(error.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------------- reading


@both_containers
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ""])
def test_bare_state_dict(tmp_path: Path, save: Save, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save(OrderedDict(STATE), path)
    checkpoint = load_checkpoint(path)
    assert equal(checkpoint.tensors, STATE)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.source == {"file": f"net{suffix}", "sha256": digest}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save_file(STATE, path)
    assert is_safetensors(path)
    assert not is_compressed(path)
    read = load_checkpoint(path).tensors
    assert equal({name: read[name] for name in STATE}, STATE)


@both_containers
@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "ema"])
def test_wrapped_state_dict(tmp_path: Path, save: Save, wrapper: str) -> None:
    path = tmp_path / "net.pt"
    save({wrapper: STATE, "epoch": 3, "best_acc": 91.7, "optimizer": {"lr": 0.1, "groups": [1]}, "name": "x"}, path)
    assert equal(load_checkpoint(path).tensors, STATE)


@both_containers
@pytest.mark.parametrize(("key", "wanted"), [("model", STATE), ("ema", OTHER), ("teacher", OTHER)])
def test_key_chooses_among_several(tmp_path: Path, save: Save, key: str, wanted: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pt"
    save({"model": STATE, "ema": OTHER, "teacher": OTHER}, path)
    assert equal(load_checkpoint(path, key).tensors, wanted)


def test_several_without_key_are_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "ema": OTHER}, tmp_path / "net.pt")
    text = refused(tmp_path / "net.pt")
    assert "model, ema" in text
    assert "--key" in text


@pytest.mark.parametrize("key", ["nothing", "epoch"])
def test_a_key_that_holds_no_state_dict_names_those_there_are(tmp_path: Path, key: str) -> None:
    torch.save({"model": STATE, "epoch": 3}, tmp_path / "net.pt")
    text = refused(tmp_path / "net.pt", key)
    assert repr(key) in text
    assert "model" in text


def test_a_parameter_called_model_is_no_wrapper(tmp_path: Path) -> None:
    state = {"model": torch.ones(2), "head": torch.ones(3)}
    torch.save(state, tmp_path / "net.pt")
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, state)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@pytest.mark.parametrize("wrapper", ["", "state_dict"])
def test_prefixes_are_removed(tmp_path: Path, prefix: str, wrapper: str) -> None:
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "net.pt")
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, STATE)
    save_file(state, tmp_path / "net.safetensors")
    assert load_checkpoint(tmp_path / "net.safetensors").tensors.keys() == STATE.keys()


def test_prefixes_that_only_some_keys_have_are_part_of_the_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    torch.save(state, tmp_path / "net.pt")
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, state)


def test_real_wrappers_of_torch_are_undone(tmp_path: Path) -> None:
    net = CifarResNet(3)
    wrapped = nn.DataParallel(torch.compile(net))
    torch.save({"state_dict": wrapped.state_dict()}, tmp_path / "net.pt")
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, net.state_dict())


def test_parameters_and_shared_storage_are_read_as_plain_tensors(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save({"a": weight, "b": weight, "c": weight.detach()[0]}, tmp_path / "net.pt")
    read = load_checkpoint(tmp_path / "net.pt").tensors
    assert not any(tensor.requires_grad for tensor in read.values())
    assert torch.equal(read["b"], weight)
    assert torch.equal(read["c"], weight[0])


# ------------------------------------------------------------------------------------------------------------ refusing


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


BOMBS: dict[str, Callable[[Path], Bomb]] = {
    "os.system": lambda trace: Bomb(os.system, f"touch {trace}"),
    "exec": lambda trace: Bomb(exec, f"open({str(trace)!r}, 'w').close()"),
    "Path.touch": lambda trace: Bomb(Path.touch, trace),
    "torch.save": lambda trace: Bomb(torch.save, {}, str(trace)),
}


@both_containers
@pytest.mark.parametrize("place", ["whole", "value", "wrapped", "epoch"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, save: Save, place: str, bomb: Callable[[Path], Bomb]
) -> None:
    path, trace = tmp_path / "net.pt", tmp_path / "trace"
    content: dict[str, Any] = {
        "whole": bomb(trace),
        "value": {**STATE, "evil": bomb(trace)},
        "wrapped": {"state_dict": {**STATE, "evil": bomb(trace)}},
        "epoch": {"state_dict": STATE, "epoch": bomb(trace)},
    }
    save(content[place], path)
    text = refused(path)
    assert not trace.exists()
    assert "could run code" in text
    # The file really is one that does harm where it is trusted; else this test would prove nothing.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_plain_pickle_that_would_run_code_does_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"state_dict": Bomb(os.system, f"touch {trace}")}))
    refused(path)
    assert not trace.exists()


def test_the_environment_cannot_turn_the_safety_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, trace = tmp_path / "net.pt", tmp_path / "trace"
    torch.save({**STATE, "evil": Bomb(os.system, f"touch {trace}")}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not trace.exists()


@both_containers
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_module_is_refused_with_what_to_do(tmp_path: Path, save: Save, wrapped: bool) -> None:
    module = lenet5()
    save({"model": module} if wrapped else module, tmp_path / "net.pt")
    text = refused(tmp_path / "net.pt")
    assert "torch.nn.modules" in text
    assert "model.state_dict()" in text


@both_containers
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_and_inf_are_named(tmp_path: Path, save: Save, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[1, 2] = value
    save({"module.good": torch.ones(2), "module.bad.weight": bad}, tmp_path / "net.pt")
    text = refused(tmp_path / "net.pt")
    assert "NaN or Inf in bad.weight" in text
    assert "good" not in text


def test_nan_in_safetensors_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, tmp_path / "net.safetensors")
    assert "NaN or Inf in b" in refused(tmp_path / "net.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda path: path.touch(), "is empty"),
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b"\0"), ""),
        (lambda path: path.write_bytes(b"not a checkpoint at all\n" * 9), ""),
        (lambda path: path.write_bytes(b"PK\x03\x04 but no archive"), ""),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
    ],
    ids=["empty", "missing", "folder", "one byte", "text", "half a zip", "dangling link"],
)
def test_what_is_no_checkpoint(tmp_path: Path, suffix: str, make: Callable[[Path], object], wanted: str) -> None:
    path = tmp_path / f"net{suffix}"
    make(path)
    assert wanted in refused(path)
    if wanted:
        for read in (is_compressed, load_compressed):
            with pytest.raises(CheckpointError, match=wanted):
                read(path)


@both_containers
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, save: Save, share: float) -> None:
    path = tmp_path / "net.pt"
    save(CifarResNet(3).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.9, 0.999])
def test_truncated_safetensors(tmp_path: Path, share: float) -> None:
    path = tmp_path / "net.safetensors"
    save_file(CifarResNet(3).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ([torch.ones(2)], "a list"),
        (torch.ones(2), "a Tensor"),
        (3, "a int"),
        ({}, "nothing"),
        ({"state_dict": {}}, "nothing"),
        ({"epoch": 3, "weights": {"a": 1}}, "epoch, weights"),
        ({"state_dict": {"fc.weight": torch.ones(2), "lr": 0.1}}, "lr"),
        ({"w": torch.ones(2, 2).to_sparse()}, "are not supported: w"),
        ({"w": torch.ones(2, device="meta")}, "are not supported: w"),
    ],
    ids=["list", "tensor", "number", "nothing", "wraps nothing", "no tensors", "a number inside", "sparse", "meta"],
)
def test_what_holds_no_state_dict(tmp_path: Path, content: object, wanted: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert wanted in refused(tmp_path / "net.pt")
