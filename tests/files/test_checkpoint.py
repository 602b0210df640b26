"""Checkpoints of every kind that people have, and the ones that would harm them."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
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
from ttcompress.files.tensors import state_sha256
from ttcompress.files.writing import write_safetensors
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
    digests = {"sha256": digest, "state_sha256": state_sha256(STATE)}
    assert checkpoint.source == {"file": f"net{suffix}", **digests}


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
    save(
        {wrapper: STATE, "epoch": 3, "best_acc": 91.7, "optimizer": {"lr": 0.1, "groups": [1]}, "name": "x"},
        path,
    )
    assert equal(load_checkpoint(path).tensors, STATE)


@both_containers
@pytest.mark.parametrize(("key", "wanted"), [("model", STATE), ("ema", OTHER), ("teacher", OTHER)])
def test_key_chooses_among_several(tmp_path: Path, save: Save, key: str, wanted: dict[str, Tensor]) -> None:
    path = tmp_path / "net.pt"
    save({"model": STATE, "ema": OTHER, "teacher": OTHER}, path)
    assert equal(load_checkpoint(path, key).tensors, wanted)


@pytest.mark.parametrize(
    ("content", "key", "taken"),
    [
        ({"model": {"state_dict": STATE}, "epoch": 1}, "", None),
        ({"model_state": STATE, "epoch": 1}, "", None),
        ({"state_dict": {"module": STATE}}, "", None),
        ({"a": {"b": STATE}, "c": 1}, "a.b", "a.b"),
        ({"a.b": STATE, "a": {"b": OTHER}}, "a.b", "a.b"),
        ({"a.b": {"c.d": {"model": STATE}}}, "a.b.c.d", "a.b.c.d.model"),
        ({"model": STATE, "model_ema": OTHER}, "", "model"),
        ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema", "state_dict_ema"),
        ({"params": OTHER, "params_ema": STATE}, "params_ema", "params_ema"),
        ({"model": {"state_dict": STATE, "shadow": OTHER}}, "", "model.state_dict"),
        ({"state_dict": STATE, "optimizer": {"state": {"m": torch.ones(2)}}}, "", None),
    ],
)
def test_nested_state_dicts(tmp_path: Path, content: dict[str, Any], key: str, taken: str | None) -> None:
    """What was taken is recorded where there is something else, or something was asked for."""
    torch.save(content, tmp_path / "net.pt")
    read = load_checkpoint(tmp_path / "net.pt", key)
    assert equal(read.tensors, STATE)
    assert read.source.get("key") == taken
    assert read.source["state_sha256"] == state_sha256(STATE)
    says = [f"takes the state dict {taken!r}" in note and "--key" in note for note in read.notes]
    assert says == [True] * (taken is not None and not key)


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


def test_averaged_models_of_torch_are_undone(tmp_path: Path) -> None:
    net = CifarResNet(3)
    torch.save(
        {"model_ema": 0, "model": torch.optim.swa_utils.AveragedModel(net).state_dict()}, tmp_path / "net.pt"
    )
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, net.state_dict())
    others = {"n_averaged": torch.tensor(1), "head.weight": torch.ones(2)}
    torch.save(others, tmp_path / "other.pt")
    assert equal(load_checkpoint(tmp_path / "other.pt").tensors, others)


def test_what_modules_add_to_a_state_dict_is_left_out_and_said(tmp_path: Path) -> None:
    extra = {"fc._extra_state": {"scale": 1}, "_extra_state": None, "bn._extra_state": b"bytes"}
    torch.save({"model": {**STATE, **extra}}, tmp_path / "net.pt")
    read = load_checkpoint(tmp_path / "net.pt")
    assert equal(read.tensors, STATE)
    assert read.notes == ("without fc._extra_state, _extra_state, bn._extra_state, which are no tensors",)


def test_the_digest_is_of_the_tensors_not_of_the_file(tmp_path: Path) -> None:
    tensors = {
        **STATE,
        "one": torch.ones(3, 1)[:, 0],
        "view": torch.arange(12.0).view(3, 4).t(),
        "none": torch.ones(0),
    }
    tensors |= {"c": torch.ones(2, dtype=torch.complex64), "scalar": torch.tensor(3, dtype=torch.bfloat16)}
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "net.safetensors")
    torch.save(
        {"state_dict": {f"module.{name}": tensors[name] for name in reversed(tensors)}}, tmp_path / "net.pt"
    )
    read = [load_checkpoint(tmp_path / f"net{suffix}").source for suffix in (".pt", ".safetensors")]
    assert {each["state_sha256"] for each in read} == {state_sha256(tensors)}
    changes: list[dict[str, Tensor]] = [
        {"one": torch.tensor([1.0, 1.0, 1.0000001])}, {"one": torch.ones(3, 1)}, {"one": torch.ones(3).double()},
        {"onf": torch.ones(3)}, {"none": torch.ones(0, 1)}, {"scalar": torch.tensor(3, dtype=torch.float16)},
    ]  # fmt: skip
    digests = {state_sha256({**tensors, **change}) for change in changes}
    assert len(digests) == len(changes)
    assert state_sha256(tensors) not in digests


def test_exact_names_cost_no_second_pass(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "net.safetensors")
    assert load_checkpoint(tmp_path / "net.safetensors", exact=True).source.keys() == {"file", "sha256"}


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.encoder."])
def test_other_prefixes_can_be_taken_off(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in STATE.items()}, tmp_path / "net.pt")
    read = load_checkpoint(tmp_path / "net.pt")
    assert [*read.tensors] == [prefix + name for name in STATE]
    for part in prefix.split(".")[:-1]:
        shorter = read.without_prefix()
        assert shorter is not None
        assert shorter.notes[-1] == f"read without the prefix '{part}.' that all names have"
        read = shorter
    assert equal(read.tensors, STATE)
    assert read.source["state_sha256"] == state_sha256(STATE)
    assert read.without_prefix() is None


def test_storages_that_are_packed_are_unpacked(tmp_path: Path) -> None:
    """Mapped as they are they would be garbage."""
    tensors = {"b.weight": torch.ones(64, 64), "a.bias": torch.arange(64.0) / 7}
    torch.save(tensors, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "net.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry.filename), zipfile.ZIP_DEFLATED)
    assert equal(load_checkpoint(tmp_path / "net.pt").tensors, tensors)


# ------------------------------------------------------------------------------------------------------------ refusing


def test_programs_are_refused_by_name_and_with_the_way_out(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    torch.jit.script(net).save(str(tmp_path / "script.pt"))
    torch.jit.trace(net, torch.ones(1, 3)).save(str(tmp_path / "trace.pth"))
    torch.export.save(torch.export.export(net, (torch.ones(1, 3),)), tmp_path / "export.pt2")
    for name, kind in (
        ("script.pt", "TorchScript"),
        ("trace.pth", "TorchScript"),
        ("export.pt2", "torch.export"),
    ):
        text = refused(tmp_path / name)
        assert kind in text
        assert "state_dict" in text
        assert "damaged" not in text


@pytest.mark.parametrize(
    ("start", "wanted"),
    [(b"GGUF\3\0\0\0", "GGUF"), (b"\x89HDF\r\n", "HDF5"), (b"version https://git-lfs.github.com/", "git lfs pull")],
)  # fmt: skip
def test_files_of_others_are_refused_by_name(tmp_path: Path, start: bytes, wanted: str) -> None:
    (tmp_path / "net.pt").write_bytes(start + bytes(100))
    assert wanted in refused(tmp_path / "net.pt")


NAMES = ["__metadata__", "", ".weight", ".", "../x", "\ud800.weight", "a.\udfff"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exact", [False, True])
def test_names_that_no_file_can_hold(tmp_path: Path, name: str, exact: bool) -> None:
    torch.save({**STATE, name: torch.ones(2, 2)}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="names no file can have") as error:
        load_checkpoint(tmp_path / "net.pt", exact=exact)
    assert ascii(name) in str(error.value)
    str(error.value).encode()


@pytest.mark.parametrize(
    "name",
    ["名前.weight", "x\ny.weight", "a\0b", "a/x", "a..weight", "_modules.weight", "__metadata__.weight"],
)
def test_other_odd_names_are_read_and_written(tmp_path: Path, name: str) -> None:
    state = {**STATE, name: torch.ones(2, 2)}
    torch.save(state, tmp_path / "net.pt")
    write_safetensors(tmp_path / "net.safetensors", load_checkpoint(tmp_path / "net.pt").tensors)
    assert load_checkpoint(tmp_path / "net.safetensors").tensors.keys() == state.keys()


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_types_that_no_file_can_hold(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({**STATE, "freqs": torch.zeros(3, dtype=dtype)}, tmp_path / "net.pt")
    assert f"freqs: safetensors has no type for {dtype}" in refused(tmp_path / "net.pt")


@both_containers
@pytest.mark.parametrize("shape", [(60_000, 60_000), (10**6, 10**6), (300_000_000,)])
def test_views_that_stand_for_far_more_than_the_file_holds(
    tmp_path: Path, save: Save, shape: tuple[int, ...]
) -> None:
    save({**STATE, "wide": torch.zeros(1).expand(shape)}, tmp_path / "net.pt")
    text = refused(tmp_path / "net.pt")
    assert "at most 1,073,741,824 are read" in text
    assert "wide" in text


def test_many_views_of_the_same_numbers_count_together(tmp_path: Path) -> None:
    large = torch.zeros(1).expand(20_000_000)
    torch.save({f"{index}": large for index in range(20)}, tmp_path / "net.pt")
    assert "stands for 1,600,000,000 bytes" in refused(tmp_path / "net.pt")
    torch.save({f"{index}": large for index in range(3)}, tmp_path / "few.pt")
    assert len(load_checkpoint(tmp_path / "few.pt").tensors) == 3


def test_an_archive_that_unpacks_to_far_more_than_it_is(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("net/data.pkl", "w", force_zip64=True) as file,
    ):
        for _ in range(110):
            file.write(bytes(10**7))
    assert "unpacks to 1,100,000,000 bytes" in refused(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "name", ["net.pt", "net.safetensors", "x.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "is not an ordinary file" in refused(tmp_path / name)
    (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
    assert "is not an ordinary file" in refused(tmp_path / f"zero-{name}")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "net.pt/x", "~nouser/net.pt"])
def test_paths_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "net.pt").write_bytes(b"x")
    for act in (is_compressed, load_checkpoint, load_compressed):
        with pytest.raises(CheckpointError):
            act(tmp_path / name)


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
    save_file(
        {"a": torch.ones(2), "b.weight": torch.tensor([[1.0, float("nan")]])}, tmp_path / "net.safetensors"
    )
    assert "NaN or Inf in b.weight" in refused(tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["a.mask", "a.bias", "bn.weight", "bn.running_var", "attn.in_proj_weight"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_nan_and_inf_where_nobody_decomposes_are_a_note(tmp_path: Path, name: str, value: float) -> None:
    shape = (4, 4) if name in ("a.mask", "attn.in_proj_weight") else (4,)
    state = {**STATE, name: torch.full(shape, value)}
    torch.save(state, tmp_path / "net.pt")
    read = load_checkpoint(tmp_path / "net.pt")
    assert read.tensors.keys() == state.keys()
    assert read.notes == (f"NaN or Inf in {name}, which stay as they are",)


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
def test_what_is_no_checkpoint(
    tmp_path: Path, suffix: str, make: Callable[[Path], object], wanted: str
) -> None:
    path = tmp_path / f"net{suffix}"
    make(path)
    said = refused(path)
    assert wanted in said
    # Torch would have a user load what is not safe.
    assert "weights_only" not in said
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
        ({1: torch.ones(2), "1": torch.ones(2)}, "called alike"),
        ({"net": STATE, "acc": 0.9}, "no tensors: net, acc; choose with --key net"),
        ({"gen": STATE, "disc": STATE, "epoch": 1}, "choose with --key gen or --key disc"),
        ({"run": {"weights": {"ema": STATE}}, "epoch": 1}, "choose with --key run.weights.ema"),
        (
            {"net": STATE, "optimizer": {"state": {"a": torch.ones(1)}}},
            "no tensors: net, optimizer; choose with --key net",
        ),
        ({"w": torch.ones(2, 2).to_sparse()}, "are not supported: w"),
        ({"w": torch.ones(2, device="meta")}, "are not supported: w"),
    ],
    ids=[
        "list",
        "tensor",
        "number",
        "nothing",
        "wraps nothing",
        "no tensors",
        "a number inside",
        "1 and 1",
        "one by another name",
        "two",
        "three deep",
        "optimizer",
        "sparse",
        "meta",
    ],
)
def test_what_holds_no_state_dict(tmp_path: Path, content: object, wanted: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    assert wanted in refused(tmp_path / "net.pt")
