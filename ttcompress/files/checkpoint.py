"""State dicts and compressed files, in and out. Nothing that a file holds is ever run."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ttcompress.errors import CheckpointError, shortlist
from ttcompress.files.header import METADATA_KEY, TensorInfo, canonical_json, encode_header, read_header
from ttcompress.files.shards import INDEX_SUFFIX, Index, checkpoint_files, encode_index, read_index, resolve
from ttcompress.records.common import Json

WRAPPERS = ("state_dict", "model", "model_state_dict", "ema")
PREFIXES = ("module.", "_orig_mod.")
TEMPORARY = ".ttcompress-"
DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
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


@dataclass(frozen=True, eq=False)
class LazyTensors(Mapping[str, Tensor]):
    """Tensors of known type and shape, each made anew when it is asked for, so that few are in memory at once."""

    infos: Mapping[str, TensorInfo]
    make: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def load_checkpoint(path: Path, key: str = "", exact: bool = False) -> Checkpoint:
    """Read a dense checkpoint, memory-mapped where its format allows.

    Args:
        path: `.pt`, `.pth`, `.th` or `.safetensors`, the index of several safetensors files, or the folder of either.
        key: which entry of a wrapping dict holds the state dict; needed only where there are several.
        exact: keep prefixes that all names share.

    Raises:
        CheckpointError: missing, empty, damaged or unsafe file, no state dict in it, NaN or Inf in a tensor.
    """
    index, path = read_index(path), resolve(path)
    _check_readable(path)
    tensors = _read_tensors(path) if index or is_safetensors(path) else _state_dict(path, key)
    tensors = tensors if exact else _strip_prefixes(tensors)
    if bad := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise CheckpointError(f"{path}: NaN or Inf in {shortlist(bad)}")
    return Checkpoint(tensors, {"file": index.name if index else path.name, "sha256": file_digest(path)})


def file_digest(path: Path) -> str:
    """The sha256 of a file's content; of a sharded checkpoint, that of what `sha256sum` prints of its shards."""
    files = checkpoint_files(path)
    digests = {}
    for each in files:
        with each.open("rb") as file:
            digests[each] = hashlib.file_digest(file, "sha256").hexdigest()
    if files == [resolve(path)]:
        return digests[files[0]]
    return hashlib.sha256("".join(f"{digest}  {each.name}\n" for each, digest in digests.items()).encode()).hexdigest()


def is_safetensors(path: Path) -> bool:
    """By name or by content."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def is_compressed(path: Path) -> bool:
    """Whether this tool wrote the file, or the shards of the folder.

    Raises:
        CheckpointError: missing or empty, or a damaged safetensors file.
    """
    first = checkpoint_files(path)[0]
    _check_readable(first)
    return is_safetensors(first) and METADATA_KEY in read_header(first)[1]


def load_compressed(path: Path) -> dict[str, Tensor]:
    """The tensors of a compressed file or folder, memory-mapped; its metadata is read by `shards.read_metadata`."""
    return _read_tensors(path)


def _check_readable(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: is empty")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: no permission to read it")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in checkpoint_files(path):
        _check_readable(file)
        read_header(file)
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors: {_first_line(error)}") from error
    return tensors


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


def check_output(path: Path, force: bool, index: Index | None = None) -> None:
    """See, before any work, that a file can be written, or a folder of shards like those of an index.

    Raises:
        CheckpointError: it exists and `force` is not set, is no ordinary file (no folder, or that of the index itself),
            or its parent does not exist.
    """
    try:
        problem = _output_problem(path, force) if index is None else _folder_problem(path, force, index)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
    if problem:
        raise CheckpointError(f"{path}: {problem}")


def _output_problem(path: Path, force: bool) -> str:
    if path.is_dir():
        return "is a folder; name a file"
    if path.exists() and not path.is_file():
        # Renaming over a device such as /dev/null would take it from the whole machine.
        return "is not an ordinary file"
    return _place_problem(path, force, path.exists())


def _folder_problem(path: Path, force: bool, index: Index) -> str:
    if not path.is_dir():
        return "is not a folder, as shards need one" if path.exists() else _place_problem(path, force, False)
    if path.samefile(index.path.parent):
        return "holds the shards that are to be read; choose another --output"
    return _place_problem(path, force, any(path.iterdir()))


def _place_problem(path: Path, force: bool, is_taken: bool) -> str:
    if not path.parent.is_dir():
        return f"{path.parent} is not an existing folder"
    if is_taken and not force:
        return "exists; choose another name, or --force to replace it"
    return "" if os.access(path.parent, os.W_OK) else f"no permission to write in {path.parent}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and else vanishes.

    Raises:
        CheckpointError: the file system refuses (full, read-only).
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
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
    infos = tensor_infos(tensors)
    ours = {METADATA_KEY: canonical_json(metadata)} if metadata else {}
    start, order = encode_header(infos, {"format": "pt", **ours})
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(start)
        for name in order:
            tensor = tensors[name].detach().cpu().contiguous()
            # Where there is at most one entry a contiguous tensor may have any stride, which view() does not take.
            flat = tensor.as_strided((tensor.numel(),), (1,))
            file.write(flat.view(torch.uint8).numpy().data)


def write_shards(folder: Path, index: Index, tensors: Mapping[str, Tensor], metadata: Json | None = None) -> None:
    """Write the shards that an index names, each with its tensors, into a folder, and the index at last.

    Raises:
        CheckpointError: the file system refuses.
    """
    infos = tensor_infos(tensors)
    try:
        folder.mkdir(exist_ok=True)
        # Without an index there is no checkpoint, whatever shards of it there are; and no temporary file of before.
        for old in (*folder.glob(f"*{INDEX_SUFFIX}"), *folder.glob(f"{TEMPORARY}*")):
            old.unlink()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error
    for file in index.files:
        part = {name: infos[name] for name, home in index.homes.items() if home == file.name}
        write_safetensors(folder / file.name, LazyTensors(part, tensors.__getitem__), metadata)
    with replacing(folder / index.path.name) as temporary:
        temporary.write_text(encode_index(index.homes, sum(info.num_bytes for info in infos.values())))


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
            # Empty tensors all have the same address, which torch.save takes for one memory of several types.
            torch.save({name: each if each.numel() else each.clone() for name, each in tensors.items()}, file)
    else:
        raise CheckpointError(f"{path}: end the name in .pt, .pth or .safetensors")


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tensor_infos(tensors: Mapping[str, Tensor]) -> Mapping[str, TensorInfo]:
    """Type and shape by name.

    Raises:
        CheckpointError: a type that safetensors does not have.
    """
    if isinstance(tensors, LazyTensors):
        return tensors.infos
    return {name: TensorInfo(_dtype_name(name, tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name}: safetensors has no type for {tensor.dtype}")
    return DTYPE_NAMES[tensor.dtype]
