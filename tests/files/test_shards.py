"""Checkpoints of several files with an index: found, checked, read as one, written with the index at last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded import INDEX, write
from torch import Tensor

from ttcompress.errors import CheckpointError
from ttcompress.files.checkpoint import file_digest, is_compressed, load_checkpoint, load_compressed
from ttcompress.files.shards import Index, checkpoint_files, read_index, resolve, stem, stored_bytes
from ttcompress.files.tensors import LazyTensors, state_sha256, tensor_infos
from ttcompress.files.writing import write_shards

TENSORS = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(5).bfloat16()}
HOMES = {"a": "x-2.safetensors", "b": "x-1.safetensors", "c": "x-2.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "net-1.5b", TENSORS, HOMES)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("by", ["", INDEX])
def test_folder_and_index_are_the_same_checkpoint(folder: Path, by: str) -> None:
    read = load_checkpoint(folder / by)
    assert equal(read.tensors, TENSORS)
    digests = {"sha256": file_digest(folder), "state_sha256": state_sha256(TENSORS)}
    assert read.source == {"file": "net-1.5b", **digests}
    assert stem(folder / by) == "net-1.5b"
    assert [file.name for file in checkpoint_files(folder / by)] == ["x-1.safetensors", "x-2.safetensors"]


def test_digest_is_that_of_sha256sum(folder: Path) -> None:
    lines = [
        f"{hashlib.sha256((folder / shard).read_bytes()).hexdigest()}  {shard}\n"
        for shard in sorted({*HOMES.values()})
    ]
    assert file_digest(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_shards_may_be_links_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    (folder / "x-1.safetensors").rename(tmp_path / "blob")
    (folder / "x-1.safetensors").symlink_to(tmp_path / "blob")
    assert equal(load_checkpoint(folder).tensors, TENSORS)


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert resolve(tmp_path) == tmp_path / "model.safetensors"
    assert read_index(tmp_path) is None
    assert equal(load_checkpoint(tmp_path).tensors, TENSORS)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folders_that_hold_no_one_checkpoint(tmp_path: Path) -> None:
    assert "is a folder without" in refused(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(TENSORS, tmp_path / name)
    assert "several checkpoints, name one: a.safetensors, b.safetensors" in refused(tmp_path)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda index: index["weight_map"].update(d="x-1.safetensors"), "d is named but not in x-1.safetensors"),
        (lambda index: index["weight_map"].pop("a"), "a in x-2.safetensors is not named"),
        (lambda index: index["weight_map"].update(a="x-1.safetensors"), "a is named but not in x-1.safetensors"),
        (lambda index: index["weight_map"].update(a="x-3.safetensors"), "lacks 1 of 3 shards: x-3.safetensors"),
        (lambda index: index["weight_map"].update(a="../x-2.safetensors"), "not ../x-2.safetensors"),
        (lambda index: index["weight_map"].update(a="/x-2.safetensors"), "not /x-2.safetensors"),
        (lambda index: index["weight_map"].update(a="sub/x-2.safetensors"), "not sub/x-2.safetensors"),
        (lambda index: index["weight_map"].update(a=".."), "beside the index, not .."),
        (lambda index: index["weight_map"].update(a="x-2.bin"), "beside the index, not x-2.bin"),
        (lambda index: index["weight_map"].update(a=["x-2.safetensors"]), "not an index of shards"),
        (lambda index: index["weight_map"].clear(), "not an index of shards"),
        (lambda index: index.update(weight_map=["a"]), "not an index of shards"),
        (lambda index: index.clear(), "not an index of shards"),
    ],
)  # fmt: skip
def test_bad_indexes(folder: Path, change: Callable[[dict[str, Any]], object], wanted: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    text = refused(folder)
    assert wanted in text
    assert INDEX in text


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_indexes_that_are_no_json(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert ("not an index of shards" if content else "is empty") in refused(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    whole = (folder / "x-2.safetensors").read_bytes()
    (folder / "x-2.safetensors").write_bytes(whole[:-1])
    assert "x-2.safetensors: truncated" in refused(folder)


def test_written_shards_are_read_back_by_others_and_by_us(folder: Path, tmp_path: Path) -> None:
    index = read_index(folder)
    assert index is not None
    write_shards(tmp_path / "new", index, TENSORS)
    written = {shard: load_file(tmp_path / "new" / shard) for shard in set(HOMES.values())}
    assert {name: shard for shard, tensors in written.items() for name in tensors} == HOMES
    assert equal({name: tensors[name] for tensors in written.values() for name in tensors}, TENSORS)
    assert equal(load_compressed(tmp_path / "new"), TENSORS)
    assert json.loads((tmp_path / "new" / INDEX).read_text()) == {
        "metadata": {"total_size": 66},
        "weight_map": HOMES,
    }
    assert stored_bytes(tmp_path / "new") == sum(
        file.stat().st_size for file in (tmp_path / "new").glob("*.safetensors")
    )


def test_a_failure_leaves_no_index_and_no_half_shard(folder: Path) -> None:
    """Of the old checkpoint in the same folder no index either."""
    (folder / ".ttcompress-0123").write_text("of another run")

    def make(name: str) -> Tensor:
        if name == "c":
            raise KeyboardInterrupt
        return TENSORS[name]

    with pytest.raises(KeyboardInterrupt):
        write_shards(folder, Index(folder / INDEX, HOMES), LazyTensors(tensor_infos(TENSORS), make))
    left = sorted(file.name for file in folder.iterdir())
    assert left == [".ttcompress-0123", "x-1.safetensors", "x-2.safetensors"]
    assert "several checkpoints" in refused(folder)


def test_a_type_that_cannot_be_written_leaves_the_old_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no type"):
        write_shards(
            folder, Index(folder / INDEX, HOMES), {**TENSORS, "a": torch.zeros(2, dtype=torch.complex128)}
        )
    assert equal(load_checkpoint(folder).tensors, TENSORS)


# ------------------------------------------------------------------------------------------- shards of torch.save


def _pickled(folder: Path, homes: dict[str, str]) -> Path:
    folder.mkdir()
    for shard in set(homes.values()):
        torch.save({name: TENSORS[name] for name, home in homes.items() if home == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder


PICKLED_HOMES = {"a": "pytorch_model-2.bin", "b": "pytorch_model-1.bin", "c": "pytorch_model-2.bin"}


@pytest.mark.parametrize("by", ["", "pytorch_model.bin.index.json"])
def test_pickled_shards_are_read_as_one(tmp_path: Path, by: str) -> None:
    path = _pickled(tmp_path / "net", PICKLED_HOMES) / by
    read = load_checkpoint(path)
    assert equal(read.tensors, TENSORS)
    assert read.source["file"] == "net"
    assert read.source["sha256"] == file_digest(path)
    assert not is_compressed(path)
    assert read_index(path) is None
    assert stem(path) == "net"


def test_one_bin_file_in_a_folder_is_its_checkpoint(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert equal(load_checkpoint(tmp_path).tensors, TENSORS)


@pytest.mark.parametrize(
    ("homes", "wanted"),
    [
        ({**PICKLED_HOMES, "a": "pytorch_model-1.bin"}, "a is named but not in pytorch_model-1.bin"),
        ({**PICKLED_HOMES, "z": "pytorch_model-1.bin"}, "z is named but not in pytorch_model-1.bin"),
        ({"b": "pytorch_model-1.bin", "a": "pytorch_model-2.bin"}, "c in pytorch_model-2.bin is not named"),
        ({**PICKLED_HOMES, "a": "none.bin"}, "lacks 1 of 3 shards: none.bin"),
        ({**PICKLED_HOMES, "a": "../net/pytorch_model-2.bin"}, "must be bin files beside the index"),
    ],
)
def test_pickled_shards_that_do_not_fit_their_index(
    tmp_path: Path, homes: dict[str, str], wanted: str
) -> None:
    path = _pickled(tmp_path / "net", PICKLED_HOMES) / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": homes}))
    assert wanted in refused(path)
