"""Writing tensors into files: safetensors, alone or in shards with an index, and ordinary state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ttcompress.errors import CheckpointError
from ttcompress.files.header import METADATA_KEY, canonical_json, encode_header
from ttcompress.files.output import replacing
from ttcompress.files.shards import Index, encode_index
from ttcompress.files.tensors import LazyTensors, tensor_data, tensor_infos
from ttcompress.records.common import Json


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Json | None = None,
    mode: int | None = None,
    key: str = METADATA_KEY,
) -> None:
    """Write one safetensors file (docs/format.md), byte for byte the same for the same content.

    Its permissions are those of a new file, or `mode`; metadata stand under `key`.
    """
    # Other readers insist on the format.
    texts = {"format": "pt"}
    if metadata:
        texts[key] = canonical_json(metadata)
    start, order = encode_header(tensor_infos(tensors), texts)

    with replacing(path, mode) as temporary, temporary.open("wb") as file:
        file.write(start)
        for name in order:
            file.write(tensor_data(tensors[name]))


def write_shards(
    folder: Path,
    index: Index,
    tensors: Mapping[str, Tensor],
    metadata: Json | None = None,
) -> None:
    """Write the shards that an index names, each with its tensors, into a folder, and the index at last.

    Raises:
        CheckpointError: the file system refuses.
    """
    infos = tensor_infos(tensors)
    try:
        folder.mkdir(exist_ok=True)
        # Without its index there is no checkpoint, whatever shards there are.
        (folder / index.path.name).unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from error

    for file in index.files:
        own = {name: infos[name] for name, home in index.homes.items() if home == file.name}
        write_safetensors(folder / file.name, LazyTensors(own, tensors.__getitem__), metadata)

    total_size = sum(info.num_bytes for info in infos.values())
    with replacing(folder / index.path.name) as temporary:
        temporary.write_text(encode_index(index.homes, total_size))


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
            apart = {name: each if each.numel() else each.clone() for name, each in tensors.items()}
            torch.save(apart, file)
    else:
        raise CheckpointError(f"{path}: end the name in .pt, .pth or .safetensors")
