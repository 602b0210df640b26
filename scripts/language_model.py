"""Perplexity of a small language model, dense and compressed: python -m scripts.language_model FOLDER --text DIR

A Llama of four layers with a tied table is trained on `valid.txt` of WikiText-2 and measured on its `test.txt`: dense,
and at each ratio without texts, calibrated on what it was trained on, and after an epoch of training against the dense
one. FOLDER keeps the networks and the figures (rows.jsonl): what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ttcompress.commands.compress import compress_file
from ttcompress.commands.evaluate import evaluate_file
from ttcompress.commands.finetune import finetune_file
from ttcompress.recipe import Recipe

VOCABULARY, CONTEXT = 4096, 128
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": True, "attention_dropout": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--text", type=Path, required=True, help="the folder of WikiText-2, with valid.txt and test.txt"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.2, 1.5, 2.0])
    parser.add_argument("--epochs", type=int, default=8, help="of the dense network")
    parser.add_argument("--effort", default="default")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)

    dense = arguments.folder / "dense"
    if not (dense / "config.json").exists():
        train(dense, arguments.text / "valid.txt", arguments.epochs)
    rows = arguments.folder / "rows.jsonl"
    remembered(rows, {"what": "dense", "ratio": 1.0}, lambda: perplexity(dense, arguments.text))
    for ratio in arguments.ratios:
        for what in ("plain", "calibrated", "trained"):
            key = {"what": what, "ratio": ratio}
            remembered(rows, key, lambda what=what, ratio=ratio: measured(what, ratio, arguments))  # type: ignore[misc]
    print(table(read(rows)))


# ------------------------------------------------------------------------------------------------------------ the rows


def read(rows: Path) -> list[Row]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def remembered(rows: Path, key: Row, measure: Any) -> None:
    if any(key.items() <= row.items() for row in read(rows)):
        return
    row = {**key, **measure()}
    print(row, flush=True)
    with rows.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def table(rows: list[Row]) -> str:
    lines = ["| | perplexity | 95 % interval |", "|---|---|---|"]
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['what']}, {row['ratio']:g}x | {row['perplexity']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines)


def perplexity(network: Path, text: Path) -> Row:
    recipe = Recipe(data=f"text:{text}/test.txt", seq_len=CONTEXT, batch_size=32, device="cpu")
    figure, _ = evaluate_file(network, recipe)
    return {"perplexity": figure.value, "interval": figure.interval}  # type: ignore[union-attr]


def measured(what: str, ratio: float, arguments: argparse.Namespace) -> Row:
    """Compress as it says, where that is not done, and measure."""
    folder, dense = arguments.folder, arguments.folder / "dense"
    output = folder / f"{what}-{ratio:g}"
    common = {"seq_len": CONTEXT, "device": "cpu", "batch_size": 16}
    if what == "trained":
        recipe = Recipe(
            train=f"text:{arguments.text}/valid.txt", teacher=str(dense), epochs=1, optimizer="adamw", lr=1e-3,
            temperature=1.0, **common,
        )  # fmt: skip
        finetune_file(folder / f"calibrated-{ratio:g}", output, recipe, force=True)
    elif what == "calibrated":
        recipe = Recipe(
            ratio=ratio, calib=f"text:{arguments.text}/valid.txt", effort=arguments.effort, **common
        )
        compress_file(dense, output, recipe, force=True)
    else:
        compress_file(dense, output, Recipe(ratio=ratio, **common), force=True)
    return perplexity(output, arguments.text)


# --------------------------------------------------------------------------------------------------- the dense network


def train(folder: Path, text: Path, epochs: int) -> None:
    """A tokenizer and a network from one file of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)).train()
    tokens = torch.tensor(tokenizer.encode(text.read_text()).ids)
    rows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    fit(model, rows, epochs)
    model.eval().save_pretrained(folder)


def fit(model: nn.Module, rows: torch.Tensor, epochs: int, size: int = 16, rate: float = 2e-3) -> None:
    """AdamW with one cycle of the rate."""
    steps = epochs * (len(rows) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for epoch in range(epochs):
        order = torch.randperm(len(rows))[: len(rows) // size * size]
        for chosen in order.view(-1, size):
            batch = rows[chosen]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}", flush=True)


if __name__ == "__main__":
    main()
