"""Folders of the transformers library as networks: what the library itself makes of them is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_folders import edit_json, save_folder, save_sentence_encoder, small_bert, small_llama

from ttcompress.errors import ArchitectureError, DataError, TTCompressError
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


def test_a_tokenizer_is_missed_only_when_text_is_read(encoder: Path, tmp_path: Path) -> None:
    save_folder(small_bert(), tmp_path / "bare", tokenizer=False)
    reader = open_dense(tmp_path / "bare").reader
    assert reader is not None
    with pytest.raises(TTCompressError, match=r"has no tokenizer; it is one of tokenizer\.json"):
        reader.tokenize(["the cat"])


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}', "never run"), ("[", "no JSON")],
)
def test_tokenizers_run_no_code_of_their_own(tmp_path: Path, content: str, words: str) -> None:
    folder = save_folder(small_bert(), tmp_path / "encoder")
    reader = open_dense(folder).reader
    assert reader is not None
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(TTCompressError, match=words):
        reader.tokenize(["the cat"])


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = save_folder(small_bert(), tmp_path / "encoder")
    (folder / "tokenizer.json").write_text("{}")
    reader = open_dense(folder).reader
    assert reader is not None
    with pytest.raises(DataError, match=r"the tokenizer cannot be opened") as error:
        reader.tokenize(["the cat"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "RobertaModel", "GPT2LMHeadModel", "ViTModel"]
)
def test_what_networks_are_for(name: str, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = getattr(transformers, name)
    more = {"image_size": 32} if name == "ViTModel" else {"vocab_size": 40, "max_position_embeddings": 18}
    folder = save_folder(kind(kind.config_class(**sizes, **more)), tmp_path / "net", tokenizer=False)
    reader = open_dense(folder).reader
    tasks = {
        "BertForSequenceClassification": Task.CLASSIFIER,
        "RobertaModel": Task.ENCODER,
        "GPT2LMHeadModel": Task.CAUSAL,
    }
    assert (reader and reader.task) == tasks.get(name)
    if name == "RobertaModel":
        # Its first two positions are not for tokens: with one more it fails.
        assert reader is not None
        model = open_dense(folder).model
        model(torch.full((1, reader.longest), 5))
        with pytest.raises((IndexError, RuntimeError), match=r"index|size"):
            model(torch.full((1, reader.longest + 1), 5))


def test_types_stay_as_they_are_stored(tmp_path: Path) -> None:
    folder = save_folder(small_llama().bfloat16(), tmp_path / "narrow")
    edit_json(folder / "config.json", dtype="float32")
    model = open_dense(folder).model
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_older_names_of_weights_are_known(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "old"
    folder.mkdir()
    tensors = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): each
        for name, each in load_file(encoder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((encoder / "config.json").read_bytes())
    assert torch.equal(open_dense(folder).model(TOKENS)[0], open_dense(encoder).model(TOKENS)[0])


def test_without_the_library_one_line_says_how_to_get_it(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArchitectureError, match=r'pip install "ttcompress\[transformers\]"'):
        open_dense(encoder)


def test_a_configuration_cannot_choose_code_from_elsewhere(encoder: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    edit_json(
        folder / "config.json",
        attn_implementation="someone/kernel",
        _attn_implementation_internal="someone/kernel",
    )
    assert torch.equal(open_dense(folder).model(TOKENS)[0], open_dense(encoder).model(TOKENS)[0])
