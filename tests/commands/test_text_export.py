"""Networks that read texts in onnxruntime, timed and counted: torch itself is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Done
from model_folders import VOCABULARY, save_folder, save_sentence_encoder, small_llama, write_json

import ttcompress

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder at 1.3x."""
    from command_line import run_command

    folder = tmp_path_factory.mktemp("export")
    save_sentence_encoder(folder / "encoder")
    assert run_command("compress", "encoder", "--ratio", "1.3", cwd=folder).code == 0
    return folder / "encoder-tt"


def in_onnxruntime(path: Path, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
    assert isinstance(found, np.ndarray)
    return torch.from_numpy(found)


def some_texts(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    tokens = torch.randint(5, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[-1, length // 2 :] = 0
    return tokens, mask


@pytest.mark.slow
def test_an_encoder_is_the_same_at_every_size(run: Run, compressed: Path, tmp_path: Path) -> None:
    done = run("export", compressed, "--onnx", "net.onnx", "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["inputs"], done.json["output"]) == (
        ["input_ids", "attention_mask"],
        "last_hidden_state",
    )

    model = ttcompress.load(compressed)
    for batch, length in ((1, 2), (2, 7), (3, 20)):
        tokens, mask = some_texts(batch, length)
        with torch.no_grad():
            wanted = model(tokens, attention_mask=mask).last_hidden_state
        found = in_onnxruntime(tmp_path / "net.onnx", tokens, mask)
        assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-4)


@pytest.mark.slow
def test_classifiers_and_language_models_give_logits(run: Run, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=24, num_labels=3, **sizes)
    save_folder(BertForSequenceClassification(config), tmp_path / "classifier")
    save_folder(small_llama(), tmp_path / "llama")
    for name in ("classifier", "llama"):
        done = run("export", name, "--onnx", f"{name}.onnx", "--input-size", "9", "--json")
        assert done.code == 0, done.err
        assert done.json["output"] == "logits"
        assert done.json["difference"] < 1e-4


@pytest.mark.slow
def test_an_image_classifier_of_the_library_gives_logits(run: Run, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)).eval()
    save_folder(model, tmp_path / "vit", tokenizer=False)
    write_json(
        tmp_path / "vit" / "preprocessor_config.json",
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}},
    )
    assert run("compress", "vit", "--ratio", "1.2").code == 0
    done = run("export", "vit-tt", "--onnx", "vit.onnx", "--json")
    assert done.code == 0, done.err
    assert (done.json["inputs"], done.json["output"], done.json["input_shape"]) == (
        ["input"],
        "logits",
        [3, 32, 32],
    )


def test_sizes_of_texts_are_checked(run: Run, compressed: Path, tmp_path: Path) -> None:
    for size, words in (
        ("21", "more tokens than the 20"),
        ("3,4", "number of tokens"),
        ("0", "number of tokens"),
    ):
        for verb in (("export", compressed, "--onnx", "net.onnx"), ("bench", compressed)):
            done = run(*verb, "--input-size", size)
            assert done.code == 2
            assert done.err.count("\n") == 1
            assert words in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_bench_times_made_up_texts(
    run: Run, compressed: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    from ttcompress.measure import timing

    monkeypatch.setattr(timing, "SECONDS", 0.01)
    done = run(
        "bench", compressed, "--runtime", runtime, "--input-size", "8", "--batch-sizes", "1,3", "--json"
    )
    assert (done.code, done.err) == (0, "")
    assert done.json["input_size"] == [8]
    one, three = done.json["batches"]
    if runtime == "torch":
        assert three["dense"]["multiply_adds"] == 3 * one["dense"]["multiply_adds"]
        assert one["layers"]


def test_multiply_adds_are_a_budget(run: Run, compressed: Path, tmp_path: Path) -> None:
    save_sentence_encoder(tmp_path / "encoder")
    done = run("plan", "encoder", "--macs-ratio", "1.5", "--input-size", "16", "--json")
    assert (done.code, done.err) == (0, "")
    before, after = done.json["multiply_adds"]
    assert before / after >= 1.5
