"""Where a network goes: one file, or for those of a library a folder like the one that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ttcompress.files.model_folder import COMPRESSED, ModelFolder, copy_carried, model_folder, written_names
from ttcompress.files.output import check_folder_output, check_output, replacing_folder
from ttcompress.files.shards import stem
from ttcompress.files.writing import write_safetensors
from ttcompress.networks import hub
from ttcompress.records.common import Json
from ttcompress.records.report import Architecture

FILE_SUFFIXES = (".safetensors", ".pt", ".pth")


def library_folder(source: Path | None, arch: str | None, output: Path | None = None) -> ModelFolder | None:
    """The folder of a library that a network comes from, where another one is to be made of it.

    Raises:
        TTCompressError: a folder that cannot be followed.
    """
    in_one_file = output is not None and output.suffix in FILE_SUFFIXES
    return None if source is None or arch is not None or in_one_file else model_folder(source)


def default_name(source: Path, folder: ModelFolder | None, mark: str) -> Path:
    """What an output is called that nobody named: by its source, with a mark."""
    if folder is None:
        return Path(f"{stem(source)}{mark}.safetensors")
    return Path(f"{folder.title if source.is_dir() else stem(source)}{mark}")


def check_network_output(
    output: Path,
    force: bool,
    folder: ModelFolder | None,
    source: Path | None = None,
    compressed: bool = True,
) -> None:
    """See, before any work, that a network can be written; not over the source, where that is given.

    Args:
        compressed: whether its weights are.

    Raises:
        CheckpointError: it cannot.
    """
    if folder is None:
        check_output(output, force, source=source)
    else:
        check_folder_output(output, written_names(folder.path), force, source and folder.path, compressed)


def write_network(
    output: Path, tensors: Mapping[str, Tensor], metadata: Json, folder: ModelFolder | None
) -> None:
    """Write a compressed network as one file, or as a folder with what belongs to it.

    Raises:
        CheckpointError: the file system refuses.
    """
    if folder is None:
        write_safetensors(output, tensors, metadata)
        return
    with replacing_folder(output) as temporary:
        copy_carried(folder.path, temporary)
        write_safetensors(temporary / COMPRESSED, tensors, metadata)


def write_dense_folder(
    output: Path, model: nn.Module, architecture: Architecture, folder: ModelFolder | None
) -> None:
    """Write a dense network as its library would, with what belongs to it in the folder that it came from.

    Raises:
        TTCompressError: the library does not save it, or the file system refuses.
    """
    with replacing_folder(output) as temporary:
        hub.save(model, architecture, temporary)
        if folder is not None:
            copy_carried(folder.path, temporary, besides=[each.name for each in temporary.iterdir()])
