"""Folders of the transformers library as networks: what the library itself makes of them is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import (
    save_folder,
    save_sentence_encoder,
    small_llama,
)

from ttcompress.networks.opening import open_any, open_dense
from ttcompress.networks.reader import Pooling, Task

pytest.importorskip("transformers")

TOKENS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_encoder(tmp_path_factory.mktemp("hub") / "encoder")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(small_llama(), tmp_path_factory.mktemp("hub") / "llama")


def test_an_encoder_is_what_the_library_loads(encoder: Path) -> None:
    from transformers import AutoModel

    opened, wanted = open_dense(encoder), AutoModel.from_pretrained(encoder)
    assert type(opened.model) is type(wanted)
    assert not opened.model.training
    assert torch.equal(opened.model(TOKENS)[0], wanted(TOKENS)[0])


def test_what_a_folder_says_of_texts(encoder: Path) -> None:
    reader = open_any(encoder).reader
    assert reader is not None
    assert (reader.task, reader.pooling) == (Task.ENCODER, Pooling.FIRST)
    # There are 24 positions, but the tokenizer is said to give 20 tokens at most, and its makers cut to 16.
    assert (reader.longest, reader.usual) == (20, 16)
    assert reader.tokenize(["the cat sat", "unheard"]) == [[2, 5, 7, 10, 3], [2, 1, 3]]
    assert reader.inputs == ("input_ids", "attention_mask")


def test_a_language_model_keeps_its_tie(language_model: Path) -> None:
    network = open_dense(language_model)
    model = network.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert network.reader is not None
    assert network.reader.task is Task.CAUSAL
