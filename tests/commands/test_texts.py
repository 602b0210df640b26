"""Networks that read text, from the command line: compressed, measured, searched and trained on texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from command_line import Done
from model_folders import WORDS, save_folder, save_sentence_encoder, small_bert, small_llama

import ttcompress

pytest.importorskip("transformers")
Run = Callable[..., Done]


def sentence(random: Random) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(2, 9)))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Lines, lines of JSON with classes, and pairs with scores."""
    random = Random(0)
    lines = [sentence(random) for _ in range(80)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    classed = [json.dumps({"text": line, "label": number % 3}) for number, line in enumerate(lines)]
    (tmp_path / "classes.jsonl").write_text("\n".join(classed))
    pairs = [f"a\tb\tc\td\t{random.randint(0, 5)}\t{sentence(random)}\t{sentence(random)}" for _ in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join(pairs))
    return tmp_path


def test_an_encoder_is_fitted_to_sentences_and_measured_by_pairs(run: Run, texts: Path) -> None:
    save_sentence_encoder(texts / "encoder")
    done = run(
        *("compress", "encoder", "--ratio", "1.2", "--calib", "text:lines.txt", "--data", "stsb:pairs.csv"),
        *("--effort", "fast", "-o", "small"),
    )
    assert done.code == 0, done.out + done.err
    assert "Spearman x 100" in done.out + done.err
    assert "texts of text:lines.txt" in done.out + done.err

    report = run("report", "small", "--json").json
    accuracy = report["accuracy"]
    assert (accuracy["unit"], accuracy["n"], accuracy["data"]) == ("pairs", 40, "stsb:pairs.csv")
    assert 0 < accuracy["beside"]["mean cosine to the dense vectors"] <= 1
    measured = run("evaluate", "small", "--data", "stsb:pairs.csv", "--json").json
    assert measured["value"] == pytest.approx(accuracy["compressed"])
    assert measured["interval"] == pytest.approx(accuracy["interval"])
    low, high = accuracy["lost_interval"]
    assert low < accuracy["dense"] - accuracy["compressed"] < high


def test_texts_alone_say_how_alike_two_encoders_are(run: Run, texts: Path) -> None:
    save_sentence_encoder(texts / "encoder")
    arguments = ("--data", "text:lines.txt", "--limit", "30", "-o", "small.safetensors", "--max-drop", "1e-9")
    done = run("compress", "encoder", "--ratio", "1.2", *arguments)
    assert done.code == 1
    accuracy = run("report", "small.safetensors", "--json").json["accuracy"]
    low, high = accuracy["lost_interval"]
    assert low < 1 - accuracy["compressed"] < high
    assert accuracy["interval"] == pytest.approx([1 - high, 1 - low])
    assert "mean cosine to the dense vectors is worse by" in done.err
    refused = run("evaluate", "encoder", "--data", "text:lines.txt")
    assert refused.code == 2
    assert "not how good one is" in refused.err


def test_a_language_model_is_measured_by_perplexity(run: Run, texts: Path) -> None:
    save_folder(small_llama(), texts / "llama")
    done = run(
        *("compress", "llama", "--ratio", "1.2", "--calib", "text:lines.txt", "--data", "text:lines.txt"),
        *("--seq-len", "16", "--effort", "fast", "-o", "small.safetensors"),
    )
    assert done.code == 0, done.out + done.err
    accuracy = run("report", "small.safetensors", "--json").json["accuracy"]
    assert accuracy["metric"] == "perplexity"
    assert accuracy["unit"] == "tokens"
    assert accuracy["interval"][0] < accuracy["compressed"] < accuracy["interval"][1]
    low, high = accuracy["lost_interval"]
    assert low < accuracy["compressed"] - accuracy["dense"] < high


def test_the_smallest_language_model_within_a_rise_of_perplexity(run: Run, texts: Path) -> None:
    save_folder(small_llama(), texts / "llama")
    done = run(
        *("compress", "llama", "--max-drop", "0.5", "--val", "text:lines.txt", "--seq-len", "16"),
        *("--data", "text:lines.txt", "-o", "small.safetensors", "--device", "cpu"),
    )
    assert done.code == 0, done.out + done.err
    report = run("report", "small.safetensors", "--json").json
    for point in report["search"]:
        rise = point["accuracy"] - report["accuracy"]["dense"]
        assert point["drop"] == pytest.approx(rise, abs=1e-3)
    assert report["accuracy"]["compressed"] - report["accuracy"]["dense"] <= 0.5 + 1e-3


def test_a_classifier_of_texts_has_accuracy(run: Run, texts: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**{**small_bert().config.to_dict(), "num_labels": 3})
    save_folder(BertForSequenceClassification(config).eval(), texts / "classifier")
    arguments = ("--calib", "text:lines.txt", "--effort", "fast", "-o", "small.safetensors")
    done = run("compress", "classifier", "--ratio", "1.2", "--data", "text:classes.jsonl", *arguments)
    assert done.code == 0, done.out + done.err
    assert "top-1 accuracy" in done.out + done.err
    refused = run("evaluate", "classifier", "--data", "text:lines.txt")
    assert refused.code == 2
    assert "no labels" in refused.err


@pytest.mark.parametrize("kind", ["encoder", "llama"])
def test_a_compressed_network_learns_from_the_dense_one(kind: str, run: Run, texts: Path) -> None:
    if kind == "encoder":
        save_sentence_encoder(texts / kind)
    else:
        save_folder(small_llama(), texts / kind)
    assert run("compress", kind, "--ratio", "1.3", "-o", "small").code == 0
    done = run(
        *("finetune", "small", "--teacher", kind, "--train", "text:lines.txt", "--epochs", "8"),
        *(
            "--seq-len",
            "16",
            "--batch-size",
            "8",
            "--optimizer",
            "adamw",
            "--lr",
            "0.003",
            "--distill",
            "1" if kind == "encoder" else "0.1",
        ),
        *("--device", "cpu", "--data", "text:lines.txt", "-o", "trained", "--json"),
    )
    assert done.code == 0, done.out + done.err
    finetuning = done.json["finetuning"]
    history = finetuning["history"]
    assert history[-1]["loss"] < 0.9 * history[1]["loss"]
    assert history[-1]["val"] > history[0]["val"]
    assert finetuning["teacher"].startswith(kind)
    assert type(ttcompress.load(texts / "trained")) is type(ttcompress.load(texts / "small"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--calib", "text:none.txt"), "no file none.txt"),
        (("--calib", "text:empty.txt"), "holds no text"),
        (("--calib", "text:latin.txt"), "not UTF-8"),
        (("--calib", "text:lines.txt", "--seq-len", "999"), "sequences of at most 20 tokens"),
        (("--calib", "text:lines.txt", "--data", "digits"), "texts or images, not both"),
        (("--data", "stsb:lines.txt"), "not a pair of the STS benchmark"),
    ],
)
def test_bad_texts_leave_nothing(arguments: tuple[str, ...], says: str, run: Run, texts: Path) -> None:
    save_sentence_encoder(texts / "encoder")
    (texts / "empty.txt").write_text("\n")
    (texts / "latin.txt").write_bytes("Größe\n".encode("latin-1") * 20)
    before = sorted(texts.iterdir())
    done = run("compress", "encoder", "--ratio", "1.2", "-o", "small", *arguments)
    assert done.code == 2
    assert says in done.err
    assert done.err.strip().count("\n") == 0
    assert sorted(texts.iterdir()) == before


def test_a_network_that_reads_no_text_says_so(run: Run, texts: Path) -> None:
    import torch

    torch.save({"0.weight": torch.randn(64, 64), "0.bias": torch.zeros(64)}, texts / "net.pt")
    (texts / "net.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(64, 64))\n"
    )
    done = run("compress", "net.pt", "--arch", "net.py:build", "--ratio", "2", "--calib", "text:lines.txt")
    assert done.code == 2
    assert "reads no text" in done.err
