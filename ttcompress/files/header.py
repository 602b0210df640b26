"""The safetensors header, read and written byte for byte; no torch.

A file is an 8-byte little-endian header length, a JSON header padded with spaces to a multiple of 8, and the
bytes of the tensors.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ttcompress.errors import CheckpointError, TTCompressError
from ttcompress.records.reading import parse_json

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MOST_HEADER_BYTES = 100_000_000
METADATA_KEY = "ttcompress"
PLAIN_KEY = "ttcompress.plain"
"""Where a file of a plain network describes its layers."""
RESERVED = "__metadata__"
"""The one name in a header that is none of a tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """Type (as safetensors spells it) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def params(self) -> int:
        """Number of entries."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return self.params * ITEM_SIZE[self.dtype]


def check_readable(path: Path) -> None:
    """See that a path is an ordinary file that may be read; opening a pipe would wait for ever.

    Raises:
        CheckpointError: missing, no ordinary file, empty, or not to be read.
    """
    try:
        problem = _problem_of(path)
    except (OSError, ValueError) as error:
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _problem_of(path: Path) -> str:
    if not path.exists():
        return "no such file"
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is not an ordinary file"
    if path.stat().st_size == 0:
        return "is empty"
    return "" if os.access(path, os.R_OK) else "no permission to read it"


def canonical_json(value: Any) -> str:
    """Sorted keys, no spaces: the same value is always the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The bytes before the data, and the order in which the data follows: by name.

    safetensors' own writer orders metadata at random, which would make equal files differ.

    Raises:
        CheckpointError: a name that no tensor of the format can have.
    """
    if RESERVED in tensors:
        raise CheckpointError(f"a tensor called {RESERVED} cannot be stored in safetensors: rename it")
    header: dict[str, Any] = {RESERVED: dict(metadata)}
    order = sorted(tensors)
    start = 0
    for name in order:
        info = tensors[name]
        end = start + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
        start = end

    text = canonical_json(header).encode()
    # Readers that map the file want the data to begin at a multiple of eight bytes.
    padding = b" " * (-len(text) % 8)
    length = struct.pack("<Q", len(text) + len(padding))
    return length + text + padding, order


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked against each other and against the file's size.

    Raises:
        CheckpointError: missing, empty, truncated, or a header that does not describe the data that follows.
    """
    text, data_bytes = _read_text(path)
    try:
        header = parse_json(text)
        metadata = header.pop(RESERVED, None) or {}
        spans = {name: _entry(entry) for name, entry in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata values must be strings")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged ({brief(error)})") from error

    _check_spans(path, spans, data_bytes)
    infos = {name: info for name, (info, _, _) in spans.items()}
    return infos, metadata


def _read_text(path: Path) -> tuple[bytes, int]:
    """The text of a header, empty where the file is too short for it, and how many bytes follow it."""
    check_readable(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            # A damaged length must not make us read, or allocate, gigabytes.
            fits = length <= min(size - 8, MOST_HEADER_BYTES)
            text = file.read(length) if fits else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return text, size - 8 - length


def read_metadata(path: Path, key: str = METADATA_KEY) -> dict[str, Any]:
    """The `ttcompress` metadata of a compressed file, or those under another key, parsed.

    Raises:
        CheckpointError: not a safetensors file, or one that was not written by this tool.
    """
    _, metadata = read_header(path)
    if key not in metadata:
        if PLAIN_KEY in metadata:
            raise CheckpointError(
                f"{path}: made by expand --factors; name the compressed file that it was made of"
            )
        raise CheckpointError(f"{path}: a safetensors file, but not one that ttcompress wrote")

    try:
        value = parse_json(metadata[key])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ttcompress metadata ({brief(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: damaged ttcompress metadata (not an object)")
    return value


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of this file, and said in one line that begins with its name.

    Metadata that parse may still lie about the tensors beside them in any way, so that any error may come of
    it.

    Raises:
        TTCompressError: the same error with the name, or a CheckpointError in place of one that is none of
            ours.
    """
    try:
        yield
    except TTCompressError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{path}: damaged ({brief(error)})") from error


def brief(error: Exception) -> str:
    """Kind and text of an error, for a one-line message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100]}"


def _entry(entry: Mapping[str, Any]) -> tuple[TensorInfo, int, int]:
    """Type and shape of one tensor, and where its data begin and end."""
    dtype, shape = entry["dtype"], entry["shape"]
    start, end = entry["data_offsets"]
    if dtype not in ITEM_SIZE:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(_is_count(number) for number in (*shape, start, end)):
        raise ValueError("shapes and offsets must be whole numbers from 0")

    info = TensorInfo(dtype, tuple(shape))
    if info.num_bytes != end - start:
        raise ValueError(f"{dtype} {shape} does not fill bytes {start} to {end}")
    return info, start, end


def _is_count(number: Any) -> bool:
    # True and False are integers to Python.
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_spans(path: Path, spans: Mapping[str, tuple[TensorInfo, int, int]], data_bytes: int) -> None:
    """See that the data of the tensors follow each other without a gap, and fill the file."""
    reached = 0
    for start, end in sorted((start, end) for _, start, end in spans.values()):
        if start != reached:
            raise CheckpointError(
                f"{path}: damaged safetensors header: data at {start} where {reached} was expected"
            )
        reached = end

    if reached != data_bytes:
        what = "truncated" if reached > data_bytes else "followed by data that its header does not name"
        raise CheckpointError(
            f"{path}: {what}: the header names {reached:,} bytes, the file holds {data_bytes:,}"
        )
