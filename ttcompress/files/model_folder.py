"""Folders that libraries keep a network in: config.json, its weights, and what belongs to both; no torch.

Nothing in such a folder is ever run, and what would need its own code is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from ttcompress.errors import ArchitectureError, CheckpointError, shortlist
from ttcompress.files.header import brief
from ttcompress.records.common import Json
from ttcompress.records.reading import parse_json, read_text

CONFIG = "config.json"
COMPRESSED = "model.safetensors"
"""Where a folder that we write has its weights."""
GENERATION = "generation_config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The names under which both libraries write weights, in the order in which they look for them."""
REMOTE_CODE = ("auto_map", "custom_pipelines")
"""Entries of a configuration that name code beside it."""
CHOSEN_HERE = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("fusion_config", "distributed_config", "kernel_config", "use_kernels", "transformers_weights"),
    *("_name_or_path", "name_or_path", "_commit_hash"),
)
"""Entries of a configuration that say how and where a network was run, which may name code from elsewhere."""
MOST_REPEATS = 1000
REPEATS = ("layers", "depth", "depths", "blocks", "stages", "labels", "experts")
"""Ends of the names of entries by which parts of a network are counted."""
LARGEST_NUMBER = 2**31
"""Of any size in a configuration."""


@dataclass(frozen=True)
class ModelFolder:
    """A network as a library keeps it: `config` as config.json has it, `weights` where its tensors are.

    `library` is `transformers` or `timm`, `name` the class or the network there.
    """

    path: Path
    library: str
    name: str
    config: Json
    generation: Json
    weights: Path

    @property
    def title(self) -> str:
        """The name of the folder, wherever it was named from."""
        return self.path.resolve().name or "model"


def model_folder(path: Path) -> ModelFolder | None:
    """The folder that a path stands for, itself or that of a file of weights; None where no library is named there.

    Raises:
        ArchitectureError: a configuration that names no network, or one that needs code of its own.
        CheckpointError: a configuration that is no JSON, or a folder without weights.
    """
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / CONFIG)
    named = _named(config) if config is not None else None
    if config is None or named is None:
        if config is not None and path.is_dir():
            raise ArchitectureError(
                f"{folder / CONFIG}: names no network: neither `architectures` of the transformers library nor "
                "`architecture` of timm"
            )
        return None

    library, name = named
    check_config(folder / CONFIG, config)
    generation = read_json(folder / GENERATION) or {}
    weights = _weights_in(folder) if path.is_dir() else path
    return ModelFolder(folder, library, name, cleaned(config), cleaned(generation), weights)


def _named(config: Json) -> tuple[str, str] | None:
    """The library and the name of the network in it."""
    classes = config.get("architectures")
    if isinstance(classes, list) and classes and isinstance(classes[0], str):
        return "transformers", classes[0]
    name = config.get("architecture")
    return ("timm", name) if isinstance(name, str) and name else None


def read_json(path: Path) -> Json | None:
    """A JSON object in a small file; None where there is no such file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    if not path.exists():
        return None
    try:
        found = parse_json(read_text(path, CheckpointError))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON ({brief(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return found


def _weights_in(folder: Path) -> Path:
    """The file with the weights, or the index of several; the folder itself where another name may be meant."""
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    return found[0] if found else folder


# ------------------------------------------------------------------------------------------------------------- refusals


def check_config(where: Path | str, config: Mapping[str, Any]) -> None:
    """See that a configuration can be followed without code of its own, and asks for nothing beyond measure.

    Raises:
        ArchitectureError: it cannot.
    """
    for place, key, value in _entries(config):
        if key in REMOTE_CODE and value:
            raise ArchitectureError(
                f"{where}: {place} names code that comes with the network, which is never run; name a function of "
                "your own that builds it with --arch net.py:build"
            )
        if key == "quantization_config" and value:
            raise ArchitectureError(
                f"{where}: {place}: the weights are quantized already; compress the network that they were made of"
            )
        _check_number(where, place, key, value)


def _check_number(where: Path | str, place: str, key: str, value: Any) -> None:
    is_count = key.lower().endswith(REPEATS)
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, int) or isinstance(each, bool):
            continue
        most = MOST_REPEATS if is_count else LARGEST_NUMBER
        if key == "num_labels":
            most = LARGEST_NUMBER // MOST_REPEATS
        if abs(each) > most:
            raise ArchitectureError(f"{where}: {place} is {each:,}, more than {most:,}")


def _entries(value: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every entry of a configuration and of those in it, with its place."""
    if isinstance(value, list):
        for each in value:
            yield from _entries(each, place)
    if isinstance(value, Mapping):
        for key, each in value.items():
            here = f"{place}.{key}" if place else str(key)
            yield here, str(key), each
            yield from _entries(each, here)


def cleaned(value: Any) -> Any:
    """A configuration without what says how it was run, and with numbers that every reader of JSON has."""
    if isinstance(value, Mapping):
        return {key: cleaned(each) for key, each in value.items() if key not in CHOSEN_HERE}
    if isinstance(value, list):
        return [cleaned(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        # As the transformers library itself writes them.
        return {"__float__": {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}[str(value)]}
    return value


# ------------------------------------------------------------------------------------------------------ what goes along

CARRIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "chat_template.jinja", "chat_template.json"),
    *(
        "preprocessor_config.json",
        "processor_config.json",
        "image_processor_config.json",
        "feature_extractor_config.json",
    ),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *(CONFIG, GENERATION),
)
"""Small files that belong to a network, whatever its weights are."""
CARRIED_ENDINGS = (".model", ".spm")
"""Of files of tokenizers."""
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "tokenizer_config.json",
)


def carried_files(folder: Path) -> list[Path]:
    """What of a folder belongs to its network beside its weights, as paths in that folder."""
    names = [name for name in CARRIED if (folder / name).is_file()]
    names += sorted(
        each.name for each in folder.iterdir() if each.suffix in CARRIED_ENDINGS and each.is_file()
    )
    return [Path(name) for name in names] + _module_files(folder)


@dataclass(frozen=True)
class Module:
    """A step of a sentence-transformers model: its class, and its folder beside the network."""

    kind: str
    path: str


def read_modules(folder: Path) -> list[Module]:
    """The steps that sentence-transformers lists; none where there is no such list.

    Raises:
        CheckpointError: a list that cannot be read.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return []
    try:
        entries = parse_json(read_text(path, CheckpointError))
        found = [Module(str(entry["type"]), str(entry["path"])) for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: does not list modules ({brief(error)})") from error
    # A path from elsewhere could name any folder of this machine.
    return [each for each in found if Path(each.path).name == each.path]


def copy_carried(folder: Path, to: Path, besides: Collection[str] = ()) -> None:
    """Copy what belongs to a network beside its weights, but for some files."""
    for name in carried_files(folder):
        if str(name) not in besides:
            (to / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, to / name)


def written_names(folder: Path) -> set[str]:
    """What a folder that is made of this one has in it."""
    return {name.parts[0] for name in carried_files(folder)} | {COMPRESSED, GENERATION}


def _module_files(folder: Path) -> list[Path]:
    """What sentence-transformers keeps of each step after the network, such as 1_Pooling/config.json."""
    found: list[Path] = []
    for module in read_modules(folder):
        part = folder / module.path
        if module.path and part.is_dir():
            found += sorted(each.relative_to(folder) for each in part.iterdir() if each.is_file())
    return found


def check_tokenizer_files(folder: Path) -> None:
    """See that a folder has a tokenizer that needs no code of its own.

    Raises:
        CheckpointError: it has none.
        ArchitectureError: it needs code of its own.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{folder}: has no tokenizer; it is one of {shortlist(TOKENIZERS)}")
    for name in ("tokenizer_config.json", CONFIG):
        config = read_json(folder / name)
        if config:
            check_config(folder / name, {key: config[key] for key in REMOTE_CODE if key in config})
