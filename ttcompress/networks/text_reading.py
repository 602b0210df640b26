"""The reader of a network of the transformers library: its tokenizer, and what files beside it say of its use."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from ttcompress.errors import DataError, TTCompressError
from ttcompress.files.model_folder import check_tokenizer_files, read_json, read_modules
from ttcompress.networks.factories import one_line
from ttcompress.networks.reader import Pooling, Reader, Task
from ttcompress.networks.transformers_models import check_installed, quiet
from ttcompress.records.report import Architecture

USUAL = 512
"""Tokens to which a text is cut where nobody says otherwise."""
UNLIMITED = 2**20
"""Tokens of the longest sequence of a network that has no limit of its own."""
TEXT_INPUTS = ("input_ids", "attention_mask")
OTHER_INPUTS = ("pixel_values", "input_features", "input_values")
"""Of networks that read images or sounds."""
POOLINGS = {
    "cls": Pooling.FIRST,
    "cls_token": Pooling.FIRST,
    "max": Pooling.MAX,
    "max_tokens": Pooling.MAX,
    "lasttoken": Pooling.LAST,
    "last_token": Pooling.LAST,
}
"""As sentence-transformers calls them; all others are means, whose directions are the same."""


def reader_of(model: nn.Module, architecture: Architecture, folder: Path) -> Reader | None:
    """How a network reads text; None where it reads something else. The tokenizer is opened when it is first used.

    Raises:
        TTCompressError: files of the folder that cannot be read.
    """
    names = tuple(inspect.signature(model.forward).parameters)
    if "input_ids" not in names:
        return None
    task = _task(architecture.name, model, names)
    if task is None:
        return None

    longest = _longest(model, folder)
    stated = (read_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    usual = stated if _is_length(stated) else USUAL
    inputs = tuple(name for name in TEXT_INPUTS if name in names)
    tokenizer = _Tokenizer(folder)
    return Reader(task, tokenizer.tokenize, longest, min(usual, longest), _pooling(folder), inputs)


def _task(name: str, model: nn.Module, inputs: Sequence[str]) -> Task | None:
    check_installed()
    from transformers.models.auto import modeling_auto as auto

    if name in _classes(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        return Task.CAUSAL
    if any(other in inputs for other in OTHER_INPUTS) or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None
    if name in _classes(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES):
        return Task.CLASSIFIER
    return Task.ENCODER


def _classes(mapping: Any) -> set[str]:
    """The names of the classes of a mapping, whose values are names or several."""
    found: set[str] = set()
    for names in mapping.values():
        found |= {names} if isinstance(names, str) else set(names)
    return found


def _longest(model: nn.Module, folder: Path) -> int:
    """Tokens of the longest sequence: as many as there are positions, or as the tokenizer is said to give."""
    config: Any = model.config
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_ctx")]
    limits.append((read_json(folder / "tokenizer_config.json") or {}).get("model_max_length"))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Those like RoBERTa count positions from behind the one of padding.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - before)
    return min([UNLIMITED, *(limit for limit in limits if _is_length(limit))])


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _pooling(folder: Path) -> Pooling:
    """How sentence-transformers makes a vector of a text in this folder."""
    for entry in read_modules(folder):
        if entry.kind.endswith("Pooling"):
            config = read_json(folder / entry.path / "config.json") or {}
            if isinstance(config.get("pooling_mode"), str):
                return POOLINGS.get(config["pooling_mode"], Pooling.MEAN)
            chosen = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
            return next((POOLINGS[name] for name in chosen if name in POOLINGS), Pooling.MEAN)
    return Pooling.MEAN


@dataclass(frozen=True)
class _Tokenizer:
    """The tokenizer of a folder, opened when it is first used."""

    folder: Path

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Reader`.

        Raises:
            DataError: the folder has no tokenizer that can be used.
        """
        if not texts:
            return []
        with quiet():
            encoded = self._opened(list(texts), truncation=False, padding=False, verbose=False)
        return [list(numbers) for numbers in encoded["input_ids"]]

    @cached_property
    def _opened(self) -> Any:
        from transformers import AutoTokenizer

        check_tokenizer_files(self.folder)
        try:
            return AutoTokenizer.from_pretrained(
                str(self.folder), local_files_only=True, trust_remote_code=False
            )
        except TTCompressError:
            raise
        except Exception as error:
            raise DataError(f"{self.folder}: the tokenizer cannot be opened: {one_line(error)}") from error
