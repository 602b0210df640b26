"""The safetensors header against safetensors' own reader, and against every lie that a file can tell."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ttcompress.errors import CheckpointError, TTCompressError
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import (
    ITEM_SIZE,
    TensorInfo,
    canonical_json,
    encode_header,
    read_header,
    read_metadata,
)
from ttcompress.files.tensors import DTYPE_NAMES
from ttcompress.files.writing import write_safetensors
from ttcompress.report.text import read_report

METADATA = {"schema": "ttcompress/1", "b": 1, "a": [1.5, "ä"]}
# Deliberately not in sorted order, and of sizes that leave every alignment.
TENSORS = {
    "z.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.tensor([1, 2, 3], dtype=torch.int8),
    "m.flag": torch.tensor(True),
    "m.empty": torch.empty(0, 4),
    "ü.half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "valid.safetensors"
    write_safetensors(path, TENSORS, METADATA)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that property tests write over and over."""
    return tmp_path_factory.mktemp("scratch") / "lie.safetensors"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def refused(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    for read in (read_metadata, load_compressed, read_report):
        with pytest.raises(CheckpointError):
            read(path)
    assert str(path) in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------ writing


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, TENSORS, METADATA)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        assert set(file.metadata()) == {"format", "ttcompress"}
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["ttcompress"]) == METADATA
        for name, tensor in TENSORS.items():
            read: Tensor = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values())
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_every_type_round_trips_through_safetensors(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "file.safetensors"
    tensor = torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype)
    tensor = tensor if shape == (2, 3) else tensor.reshape(-1)[1].expand(shape).clone()
    write_safetensors(path, {"x": tensor})
    with safe_open(path, "pt") as file:
        read = file.get_tensor("x")
    assert read.dtype == dtype
    assert read.shape == shape
    assert read.tolist() == tensor.tolist()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0)[::5][2:],
        torch.arange(12.0)[::5][3:],
        torch.arange(12.0)[1].expand(1),
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[1::2],
        torch.tensor(2.0).expand(3, 4),
        torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    ],
    ids=[
        "one of stride 5",
        "none of stride 5",
        "one of stride 0",
        "transposed",
        "sliced",
        "expanded",
        "channels last",
    ],
)
def test_any_strides_are_written_row_major(tmp_path: Path, tensor: Tensor) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"x": tensor})
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("x"), tensor)


@pytest.mark.parametrize("name", ["", "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg"])
def test_data_starts_at_a_multiple_of_eight(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {f"x{name}": torch.ones(3)}, METADATA)
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert length % 8 == 0
    assert path.stat().st_size == 8 + length + 12


def test_without_metadata_only_the_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    write_safetensors(path, TENSORS)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_same_content_in_any_order_is_the_same_bytes(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "other.safetensors"
    write_safetensors(path, dict(sorted(TENSORS.items(), reverse=True)), dict(sorted(METADATA.items())))
    assert path.read_bytes() == valid


def test_header_is_sorted_and_has_no_spaces_but_the_padding(valid: bytes) -> None:
    length = struct.unpack("<Q", valid[:8])[0]
    text = valid[8 : 8 + length].rstrip(b" ")
    assert length - len(text) < 8
    header = json.loads(text)
    assert text.decode() == json.dumps(header, sort_keys=True, separators=(",", ":"))
    assert list(header) == sorted(header)
    offsets = [header[name]["data_offsets"] for name in sorted(TENSORS)]
    assert [start for start, _ in offsets] == [0, *(end for _, end in offsets[:-1])]


def test_known_bytes() -> None:
    """A header small enough to have been written by hand."""
    start, order = encode_header({"b": TensorInfo("F32", (2,)), "a": TensorInfo("U8", ())}, {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"data_offsets":[0,1],"dtype":"U8","shape":[]},'
        b'"b":{"data_offsets":[1,9],"dtype":"F32","shape":[2]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert start == len(padded).to_bytes(8, "little") + padded
    assert order == ["a", "b"]


def test_nan_never_gets_into_canonical_json() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"error": float("nan")})


# ------------------------------------------------------------------------------------------------------------ reading


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path, metadata={"who": "they"})
    infos, metadata = read_header(path)
    assert metadata == {"who": "they"}
    assert {name: info.shape for name, info in infos.items()} == {
        name: tuple(t.shape) for name, t in TENSORS.items()
    }
    assert {name: info.dtype for name, info in infos.items()} == {
        name: DTYPE_NAMES[t.dtype] for name, t in TENSORS.items()
    }
    for name, info in infos.items():
        assert info.params == TENSORS[name].numel()
        assert info.num_bytes == TENSORS[name].numel() * TENSORS[name].element_size()


def test_a_file_of_another_tool_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(CheckpointError, match="not one that ttcompress wrote"):
        read_metadata(path)


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}.items() <= ITEM_SIZE.items()


Entry = dict[str, Any]


def changed(**changes: Any) -> Callable[[Entry], object]:
    return lambda header: header["z.weight"].update(changes)


def _swap_ends(header: Entry) -> None:
    header["z.weight"]["data_offsets"].reverse()


def _shift(by: int) -> Callable[[Entry], object]:
    def shift(header: Entry) -> None:
        header["z.weight"]["data_offsets"] = [offset + by for offset in header["z.weight"]["data_offsets"]]

    return shift


HEADER_LIES: dict[str, Callable[[Entry], object]] = {
    "longer shape": changed(shape=[2, 4]),
    "shorter shape": changed(shape=[2, 2]),
    "other type": changed(dtype="F64"),
    "unknown type": changed(dtype="F33"),
    "type is a list": changed(dtype=["F32"]),
    "type is null": changed(dtype=None),
    "negative shape": changed(shape=[-2, -3]),
    "shape of floats": changed(shape=[2.0, 3.0]),
    "shape of bools": changed(shape=[True, 6]),
    "shape of strings": changed(shape=["2", "3"]),
    "shape is a string": changed(shape="23"),
    "shape is a number": changed(shape=6),
    "shape is null": changed(shape=None),
    "shape is nested": changed(shape=[[2, 3]]),
    "shape overflows": changed(shape=[2**63, 2**63]),
    "negative offsets": changed(data_offsets=[-24, 0]),
    "one offset": changed(data_offsets=[24]),
    "three offsets": changed(data_offsets=[0, 12, 24]),
    "offsets are null": changed(data_offsets=None),
    "offsets of floats": changed(data_offsets=[0.0, 24.0]),
    "huge offsets": changed(data_offsets=[2**64, 2**64 + 24]),
    "ends before it starts": _swap_ends,
    "overlap": _shift(-1),
    "gap": _shift(1),
    "no dtype": lambda header: header["z.weight"].pop("dtype"),
    "no shape": lambda header: header["z.weight"].pop("shape"),
    "no offsets": lambda header: header["z.weight"].pop("data_offsets"),
    "a tensor left out": lambda header: header.pop("z.weight"),
    "a tensor in the middle left out": lambda header: header.pop("m.flag"),
    "a tensor twice": lambda header: header.update(other=dict(header["z.weight"])),
    "a tensor beyond the end": lambda header: header.update(
        other={"dtype": "U8", "shape": [1], "data_offsets": [10_000, 10_001]}
    ),
    "a tensor is a number": lambda header: header.update({"z.weight": 3}),
    "a tensor is a list": lambda header: header.update({"z.weight": ["F32", [2, 3], [0, 24]]}),
    "a tensor is null": lambda header: header.update({"z.weight": None}),
    "metadata is a list": lambda header: header.update(__metadata__=["ttcompress"]),
    "metadata is a text": lambda header: header.update(__metadata__="ttcompress"),
    "metadata is a number": lambda header: header.update(__metadata__=7),
    "metadata values are no text": lambda header: header.update(__metadata__={"ttcompress": {"schema": 1}}),
}


@pytest.mark.parametrize("lie", HEADER_LIES.values(), ids=HEADER_LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, valid: bytes, lie: Callable[[Entry], object]) -> None:
    header, payload = split(valid)
    lie(header)
    assert "\n" not in refused(tmp_path / "lie.safetensors", join(header, payload))


BAD_JSON = {
    "nothing": b"",
    "not json": b"{nonsense",
    "an array": b"[]",
    "a number": b"3",
    "a text": b'"text"',
    "null": b"null",
    "not utf-8": b'{"\xff\xfe": 1}',
    "too deep": b"[" * 100_000,
    "a number too long to read": b'{"a": ' + b"9" * 10_000 + b"}",
    "cut": b'{"a": {"dtype": "U8", "shape": [1], "data',
}


@pytest.mark.parametrize("text", BAD_JSON.values(), ids=BAD_JSON)
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, text: bytes) -> None:
    refused(tmp_path / "bad.safetensors", join(text, b"\0" * 16))


@pytest.mark.parametrize(
    "length", [2**64 - 1, 2**63, 2**40, 100_000_001, "size - 7", "size", "one more", "one less", 0]
)
def test_a_wrong_header_length_is_refused(tmp_path: Path, valid: bytes, length: int | str) -> None:
    true = struct.unpack("<Q", valid[:8])[0]
    named = {"size - 7": len(valid) - 7, "size": len(valid), "one more": true + 1, "one less": true - 1}
    number = named[length] if isinstance(length, str) else length
    refused(tmp_path / "length.safetensors", struct.pack("<Q", number) + valid[8:])


def test_a_huge_header_length_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate(1 << 41)
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"trailing data"])
def test_trailing_data_is_refused(tmp_path: Path, valid: bytes, extra: bytes) -> None:
    assert "does not name" in refused(tmp_path / "long.safetensors", valid + extra)


@pytest.mark.parametrize("missing", ["folder", "file"])
def test_what_cannot_be_opened(tmp_path: Path, missing: str) -> None:
    path = tmp_path if missing == "folder" else tmp_path / "none.safetensors"
    with pytest.raises(CheckpointError, match=r"is a folder|no such file"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_truncated_anywhere_is_refused(valid: bytes, scratch: Path, share: float) -> None:
    refused(scratch, valid[: int(share * len(valid))])


@settings(max_examples=400, deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_any_other_byte_gives_our_error_or_a_consistent_file(
    valid: bytes, scratch: Path, at: float, value: int
) -> None:
    """A byte changed in a tensor cannot be seen; one in the header is refused or leaves spans that fill the file."""
    position = int(at * len(valid))
    scratch.write_bytes(valid[:position] + bytes([value]) + valid[position + 1 :])
    try:
        infos, _ = read_header(scratch)
    except CheckpointError:
        return
    length = struct.unpack("<Q", scratch.read_bytes()[:8])[0]
    assert sum(info.num_bytes for info in infos.values()) == len(valid) - 8 - length
    for read in (load_compressed, read_report):
        with suppress(TTCompressError):
            read(scratch)


NUMBERS = (
    st.integers(-(2**65), 2**65)
    | st.integers(-2, 40)
    | st.floats()
    | st.booleans()
    | st.none()
    | st.text(max_size=3)
)
JSON_VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from([*TENSORS, "__metadata__"]),
    key=st.sampled_from(["dtype", "shape", "data_offsets", "format", "ttcompress", None]),
    value=JSON_VALUES | st.lists(NUMBERS, min_size=2, max_size=2) | st.sampled_from(sorted(ITEM_SIZE)),
)
def test_any_other_value_in_the_header_is_refused_or_harmless(
    valid: bytes, scratch: Path, name: str, key: str | None, value: object
) -> None:
    header, payload = split(valid)
    if key is None:
        header[name] = value
    else:
        header[name][key] = value
    scratch.write_bytes(join(header, payload))
    try:
        infos, _ = read_header(scratch)
    except CheckpointError:
        return
    # Accepted: then the data must be divided among the tensors without remainder, as safetensors insists on too.
    assert sum(info.num_bytes for info in infos.values()) == len(payload)
    assert all(isinstance(size, int) and size >= 0 for info in infos.values() for size in info.shape)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"text"', "{}", '{"schema":"ttcompress/1"}', "[" * 100_000]
)
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "metadata.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "ttcompress": text})
    with pytest.raises(TTCompressError) as error:
        read_report(path)
    assert "\n" not in str(error.value)
