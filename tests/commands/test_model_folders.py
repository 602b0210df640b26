"""Folders of the transformers library through the commands: in, compressed, out again; bad ones in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Done
from model_folders import edit_json, save_folder, save_sentence_encoder, small_llama, write_json

import ttcompress

pytest.importorskip("transformers")

Run = Callable[..., Done]
TOKENS = [[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sentence_encoder(tmp_path_factory.mktemp("hub") / "encoder")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(small_llama(), tmp_path_factory.mktemp("hub") / "llama")


def python(code: str, *arguments: object) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = f"""
import sys, torch, ttcompress
model = ttcompress.load(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.tensor({TOKENS}))[0], sys.argv[2])
print(type(model).__name__)
"""
STOCK = f"""
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
kind = AutoModelForCausalLM if sys.argv[3] == "causal" else AutoModel
model, info = kind.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    torch.save(model(torch.tensor({TOKENS}))[0], sys.argv[2])
"""


def test_an_encoder_goes_in_and_out(run: Run, encoder: Path, tmp_path: Path) -> None:
    done = run("compress", encoder, "--ratio", "1.3")
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "encoder-tt"
    kept = {"config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "sentence_bert_config.json"}
    assert {each.name for each in folder.iterdir()} == kept | {"model.safetensors", "1_Pooling"}
    for name in (*kept, "1_Pooling/config.json"):
        assert (folder / name).read_bytes() == (encoder / name).read_bytes()

    compressed = ttcompress.load(folder)
    assert type(compressed).__name__ == "BertModel"
    with torch.no_grad():
        wanted = compressed(torch.tensor(TOKENS))[0]
    python(LOADED, folder, tmp_path / "fresh.pt")
    assert torch.equal(torch.load(tmp_path / "fresh.pt"), wanted)

    done = run("expand", folder, "-o", "dense")
    assert (done.code, done.err) == (0, "")
    python(STOCK, tmp_path / "dense", tmp_path / "stock.pt", "encoder")
    assert torch.allclose(torch.load(tmp_path / "stock.pt"), wanted, atol=1e-5)
    assert (tmp_path / "dense" / "1_Pooling").is_dir()


def test_one_file_holds_all_that_is_needed(run: Run, encoder: Path, tmp_path: Path) -> None:
    assert run("compress", encoder, "--ratio", "1.3", "-o", "one.safetensors").code == 0
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "one.safetensors", tmp_path / "elsewhere" / "one.safetensors")
    python(LOADED, moved, tmp_path / "fresh.pt")
    assert run("expand", moved, "-o", "dense").code == 0
    python(STOCK, tmp_path / "dense", tmp_path / "stock.pt", "encoder")
    assert torch.allclose(torch.load(tmp_path / "stock.pt"), torch.load(tmp_path / "fresh.pt"), atol=1e-5)


def test_a_language_model_generates_as_its_expanded_one(run: Run, language_model: Path, tmp_path: Path) -> None:
    done = run("compress", language_model, "--ratio", "1.3", "--include", "+model.embed_tokens")
    assert (done.code, done.err) == (0, "")
    compressed = ttcompress.load(tmp_path / "llama-tt")
    assert compressed.generation_config.eos_token_id == 3
    tokens = torch.tensor([[5, 6, 7]])
    found = compressed.generate(tokens, max_new_tokens=8, do_sample=False)

    assert run("expand", tmp_path / "llama-tt", "-o", "dense").code == 0
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.equal(dense.generate(tokens, max_new_tokens=8, do_sample=False), found)
