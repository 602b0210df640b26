"""State dicts and compressed files, in and out. Nothing that a file holds is ever run."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.header import METADATA_KEY, TensorInfo, canonical_json, encode_header, read_header
from ttcompress.types import Json

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")
DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a dense checkpoint by key, prefixes removed, and where they came from (base name and sha256)."""

    tensors: dict[str, Tensor]
    source: Json

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by key."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def load_checkpoint(path: Path, key: str = "") -> Checkpoint:
    """Read a dense checkpoint, memory-mapped where its format allows: `.pt`, `.pth`, `.th` or `.safetensors`.

    Args:
        key: which entry of a wrapping dict holds the state dict; needed only where there are several.

    Raises:
        CheckpointError: missing, empty, damaged or unsafe file, no state dict in it, NaN or Inf in a tensor.
    """
    _check_readable(path)
    tensors = _strip_prefixes(_read_tensors(path) if is_safetensors(path) else _state_dict(path, key))
    if bad := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise CheckpointError(f"{path}: NaN or Inf in {shortlist(bad)}")
    return Checkpoint(tensors, {"file": path.name, "sha256": file_digest(path)})


def file_digest(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_safetensors(path: Path) -> bool:
    """By name or by content."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_compressed(path: Path) -> bool:
    """Whether this tool wrote the file.

    Raises:
        CheckpointError: missing or empty, or a damaged safetensors file.
    """
    _check_readable(path)
    return is_safetensors(path) and METADATA_KEY in read_header(path)[1]


def load_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed file; its metadata is read by `header.read_metadata`."""
    _check_readable(path)
    return _read_tensors(path)


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    read_header(path)
    try:
        return dict(load_file(path))
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {_first_line(error)}") from error


def _state_dict(path: Path, key: str) -> dict[str, Tensor]:
    loaded = _load_pickle(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    found = [name for name in ([key] if key else WRAPPERS) if isinstance(loaded.get(name), Mapping)]
    if key and not found:
        raise CheckpointError(f"{path}: holds no dict {key!r}; it has {shortlist(loaded)}")
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds several state dicts: {', '.join(found)}; choose one with --key")
    state = loaded[found[0]] if found else loaded
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        what = f"entries that are no tensors: {shortlist(others)}" if others else "nothing"
        raise CheckpointError(f"{path}: no state dict found; it holds {what}")
    if odd := [name for name, tensor in state.items() if _is_odd(tensor)]:
        raise CheckpointError(f"{path}: sparse, quantized and meta tensors are not supported: {shortlist(odd)}")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _is_odd(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta


def _load_pickle(path: Path) -> Any:
    """torch.load, tensors and plain containers only: weights_only is never given up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            text = str(error)
    if unsafe := re.search(r"GLOBAL ([\w.]+)", text) or re.search(r"(?:class|function) ([\w.]+)", text):
        raise CheckpointError(
            f"{path}: holds Python objects ({unsafe[1]}), which could run code and are never loaded; "
            "save only the tensors: torch.save(model.state_dict(), ...)"
        )
    raise CheckpointError(
        f"{path}: truncated, damaged, or not a checkpoint ({text.splitlines()[0][:100] if text else 'unreadable'})"
    )


def _strip_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.dtype not in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64
    ):  # fmt: skip
        return True
    return all(bool(bound.isfinite()) for bound in torch.aminmax(tensor))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def check_output(path: Path, force: bool) -> None:
    """See, before any work, that a file can be written.

    Raises:
        CheckpointError: it exists and `force` is not set, is no ordinary file, or its folder does not exist.
    """
    try:
        problem = _output_problem(path, force)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _output_problem(path: Path, force: bool) -> str:
    if path.is_dir():
        return "is a folder; name a file"
    if not path.parent.is_dir():
        return f"{path.parent} is not an existing folder"
    if path.exists() and not path.is_file():
        # Renaming over a device such as /dev/null would take it from the whole machine.
        return "is not an ordinary file"
    if path.exists() and not force:
        return "exists; choose another name, or --force to replace it"
    return "" if os.access(path.parent, os.W_OK) else f"no permission to write in {path.parent}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and else vanishes.

    Raises:
        CheckpointError: the file system refuses (full, read-only).
    """
    temporary = path.with_name(f".ttcompress-{secrets.token_hex(8)}")
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Json | None = None) -> None:
    """Write one safetensors file (docs/format.md), byte for byte the same for the same content."""
    infos = {name: TensorInfo(_dtype_name(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    ours = {METADATA_KEY: canonical_json(metadata)} if metadata else {}
    start, order = encode_header(infos, {"format": "pt", **ours})
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(start)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            # Where there is at most one entry a contiguous tensor may have any stride, which view() does not take.
            flat = tensor.as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def write_dense(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an ordinary state dict: by torch.save for `.pt` and `.pth`, or as `.safetensors`.

    Raises:
        CheckpointError: another suffix.
    """
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors)
    elif path.suffix in (".pt", ".pth"):
        # Given a name, torch.save would write it, random as it is, into the file.
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(dict(tensors), file)
    else:
        raise CheckpointError(f"{path}: end the name in .pt, .pth or .safetensors")


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name}: safetensors has no type for {tensor.dtype}")
    return DTYPE_NAMES[tensor.dtype]
