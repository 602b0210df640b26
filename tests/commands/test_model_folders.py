"""Folders of the transformers library through the commands: in, compressed, out again; bad ones in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
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


@pytest.mark.slow
def test_an_encoder_goes_in_and_out(run: Run, encoder: Path, tmp_path: Path) -> None:
    done = run("compress", encoder, "--ratio", "1.3")
    assert (done.code, done.err) == (0, "")
    folder = tmp_path / "encoder-tt"
    kept = {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "sentence_bert_config.json",
    }
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


@pytest.mark.slow
def test_one_file_holds_all_that_is_needed(run: Run, encoder: Path, tmp_path: Path) -> None:
    assert run("compress", encoder, "--ratio", "1.3", "-o", "one.safetensors").code == 0
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "one.safetensors", tmp_path / "elsewhere" / "one.safetensors")
    python(LOADED, moved, tmp_path / "fresh.pt")
    assert run("expand", moved, "-o", "dense").code == 0
    python(STOCK, tmp_path / "dense", tmp_path / "stock.pt", "encoder")
    assert torch.allclose(torch.load(tmp_path / "stock.pt"), torch.load(tmp_path / "fresh.pt"), atol=1e-5)


def test_a_language_model_generates_as_its_expanded_one(
    run: Run, language_model: Path, tmp_path: Path
) -> None:
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


# ---------------------------------------------------------------------------------------------------------------- timm


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT of timm for seven classes, in the layout of its hub."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm") / "vit"
    folder.mkdir()
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "input_size": [3, 32, 32], "crop_pct": 0.8}
    write_json(
        folder / "config.json",
        {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 7,
            "model_args": arguments,
            "pretrained_cfg": cfg,
        },
    )
    return folder


STOCK_TIMM = """
import sys, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
torch.manual_seed(0)
with torch.no_grad():
    torch.save(model(torch.randn(2, 3, 32, 32)), sys.argv[2])
"""
LOADED_TIMM = """
import sys, torch, ttcompress
model = ttcompress.load(sys.argv[1])
torch.manual_seed(0)
with torch.no_grad():
    torch.save(model(torch.randn(2, 3, 32, 32)), sys.argv[2])
"""


@pytest.mark.slow
def test_a_network_of_timm_goes_in_and_out(run: Run, vit: Path, tmp_path: Path) -> None:
    done = run("compress", vit, "--ratio", "1.3", "--json")
    assert (done.code, done.err) == (0, "")
    known = done.json["preprocessing"]
    assert (known["mean"], known["input_size"], known["resize"]) == ([0.4, 0.5, 0.6], [3, 32, 32], 40)
    assert {each.name for each in (tmp_path / "vit-tt").iterdir()} == {"config.json", "model.safetensors"}

    python(LOADED_TIMM, tmp_path / "vit-tt", tmp_path / "fresh.pt")
    assert run("expand", "vit-tt", "-o", "dense").code == 0
    python(STOCK_TIMM, tmp_path / "dense", tmp_path / "stock.pt")
    assert torch.allclose(torch.load(tmp_path / "fresh.pt"), torch.load(tmp_path / "stock.pt"), atol=1e-5)


def test_a_checkpoint_of_timm_is_named_on_the_command_line(run: Run, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    done = run(
        "compress", "net.pt", "--arch", "timm:mobilenetv3_small_050.lamb_in1k", "--ratio", "1.05", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["architecture"]["arguments"] == {"num_classes": 5}
    assert done.json["preprocessing"]["input_size"] == [3, 224, 224]
    assert ttcompress.load(tmp_path / "net-tt.safetensors")(torch.randn(1, 3, 64, 64)).shape == (1, 5)

    done = run(
        "compress", "net.pt", "--arch", "timm:mobilenetv3_smal_050", "--ratio", "1.05", "-o", "x.safetensors"
    )
    assert done.code == 2
    assert "mobilenetv3_small_050" in done.err


@pytest.mark.parametrize("argument", [{"checkpoint_path": "evil.pt"}, {"pretrained": True}, {"depth": 10**9}])
def test_what_timm_would_load_or_repeat_is_refused(
    run: Run, vit: Path, tmp_path: Path, argument: dict[str, object]
) -> None:
    copy = shutil.copytree(vit, tmp_path / "copy")
    edit_json(copy / "config.json", model_args=argument)
    refused(run("compress", copy, "--ratio", "1.3"), tmp_path, next(iter(argument)))


@pytest.fixture
def images(tmp_path: Path) -> str:
    """Colour images of seven classes."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (32, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(32) % 7)
    return f"npz:{tmp_path / 'images.npz'}"


def test_a_sweep_makes_a_folder_a_point(run: Run, vit: Path, tmp_path: Path, images: str) -> None:
    command = ("sweep", vit, "--ratios", "1.2,1.5", "--data", images, "-o", "sizes", "--json")
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    assert [point["file"] for point in done.json["points"]] == ["vit-1.2x", "vit-1.5x"]
    before = (tmp_path / "sizes" / "vit-1.5x" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "sizes" / "vit-1.2x")
    assert run(*command).code == 0
    assert (tmp_path / "sizes" / "vit-1.2x" / "config.json").is_file()
    assert (tmp_path / "sizes" / "vit-1.5x" / "model.safetensors").stat().st_mtime_ns == before


def test_a_compressed_folder_is_measured_and_trained_further(
    run: Run, vit: Path, tmp_path: Path, images: str
) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    done = run("compress", "vit", "--ratio", "1.3", "--train", images, "--finetune", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["finetuning"]["teacher"]
    assert done.json["file"] == "vit-tt"
    done = run("evaluate", "vit-tt", "--data", images, "--json")
    assert done.code == 0, done.err

    done = run("finetune", "vit-tt", "--train", images, "--epochs", "1", "--json")
    assert done.code == 0, done.err
    assert {each.name for each in (tmp_path / "vit-tt-ft").iterdir()} == {"config.json", "model.safetensors"}
    # The dense network lies beside it, and so is its teacher.
    assert done.json["finetuning"]["teacher"]

    done = run("finetune", "vit", "--train", images, "--epochs", "1")
    assert done.code == 0, done.err
    assert run("compress", "vit-ft", "--ratio", "1.3").code == 0


def test_a_network_in_memory_says_how_it_is_built(encoder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    model, report = ttcompress.compress(AutoModel.from_pretrained(encoder), ratio=1.3)
    ttcompress.save(model, report, tmp_path / "one.safetensors")
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        found = ttcompress.load(tmp_path / "one.safetensors")(tokens)[0]
        assert torch.allclose(found, model(tokens)[0], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "evil.Net"}}, "never run"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
        ({"hidden_size": 33}, "BertModel"),
        ({"hidden_size": 2**30}, "parameters"),
    ],
)
def test_what_a_compressed_file_says_of_its_network_is_not_trusted(
    run: Run, encoder: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    from ttcompress.files.checkpoint import load_compressed
    from ttcompress.files.header import read_metadata
    from ttcompress.files.writing import write_safetensors

    assert run("compress", encoder, "--ratio", "1.3", "-o", "one.safetensors").code == 0
    metadata = read_metadata(tmp_path / "one.safetensors")
    metadata["architecture"]["config"].update(changes)
    write_safetensors(tmp_path / "bad.safetensors", load_compressed(tmp_path / "one.safetensors"), metadata)
    with pytest.raises(ttcompress.TTCompressError, match=words) as error:
        ttcompress.load(tmp_path / "bad.safetensors")
    assert "\n" not in str(error.value)


def refused(done: Done, folder: Path, *words: str) -> None:
    """Exit 2, one line with these words, and nothing written."""
    assert done.code == 2, (done.code, done.err)
    assert done.err.count("\n") == 1, done.err
    assert done.out == ""
    assert all(word in done.err for word in words), done.err
    assert not [each for each in folder.iterdir() if "tt" in each.name], list(folder.iterdir())


@pytest.fixture
def copied(encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, ("NoSuchModel", "transformers")),
        ({"architectures": ["AutoModel"]}, ("AutoModel",)),
        ({"architectures": ["BertConfig"]}, ("BertConfig",)),
        ({"architectures": ["os.system"]}, ("os.system",)),
        ({"architectures": None}, ("config.json", "names no network")),
        ({"auto_map": {"AutoModel": "modeling.Net"}}, ("auto_map", "never run")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantization_config",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"num_hidden_layers": "many"}, ("BertModel",)),
        ({"vocab_size": 2**31 - 1}, ("parameters",)),
        ({"max_position_embeddings": 2**30}, ("BertModel",)),
        ({"hidden_act": "no_such"}, ("BertModel",)),
        ({"hidden_size": 64}, ("other shapes", "embeddings.LayerNorm.bias")),
        ({"num_hidden_layers": 3}, ("missing", "encoder.layer.2")),
    ],
)
def test_bad_configurations_are_refused(
    run: Run, copied: Path, tmp_path: Path, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    edit_json(copied / "config.json", **changes)
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, *words)


def test_bad_folders_are_refused(run: Run, copied: Path, tmp_path: Path) -> None:
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config[:-20])
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, "config.json", "no JSON")
    (copied / "config.json").write_text("[1, 2]")
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, "no JSON object")
    (copied / "config.json").unlink()
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, "known architecture")
    (copied / "config.json").write_text(config)
    (copied / "model.safetensors").unlink()
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, "folder without")


def test_a_missing_shard_is_named(run: Run, tmp_path: Path) -> None:
    folder = save_folder(small_llama(), tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert run("compress", folder, "--ratio", "1.3", "-o", "whole").code == 0
    shutil.rmtree(tmp_path / "whole")
    shards[0].unlink()
    refused(run("compress", folder, "--ratio", "1.3"), tmp_path, "lacks 1 of", shards[0].name)


def test_pickled_weights_are_read_safely(run: Run, copied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    assert run("compress", copied, "--ratio", "1.3", "-o", "whole").code == 0
    shutil.rmtree(tmp_path / "whole")
    torch.save({**tensors, "evil": Evil()}, copied / "pytorch_model.bin")
    refused(run("compress", copied, "--ratio", "1.3"), tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('ran', 'w')",)


def test_existing_folders_are_replaced_only_by_force_and_only_whole(
    run: Run, copied: Path, tmp_path: Path
) -> None:
    assert run("compress", copied, "--ratio", "1.3", "-o", "out").code == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    done = run("compress", copied, "--ratio", "1.5", "-o", "out")
    assert (done.code, "--force" in done.err) == (2, True)

    (tmp_path / "out" / "notes.txt").write_text("mine")
    done = run("compress", copied, "--ratio", "1.5", "-o", "out", "--force")
    assert (done.code, "notes.txt" in done.err) == (2, True)
    (tmp_path / "out" / "notes.txt").unlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before

    assert run("compress", copied, "--ratio", "1.5", "-o", "out", "--force").code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    done = run("compress", copied, "--ratio", "1.5", "-o", copied, "--force")
    assert (done.code, "to be read" in done.err) == (2, True)
    done = run("expand", "out", "-o", "out", "--force")
    assert (done.code, "to be read" in done.err) == (2, True)
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".ttcompress")]


def test_same_input_same_bytes(run: Run, encoder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run("compress", encoder, "--ratio", "1.3", "-o", name).code == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
