"""Small folders of the transformers library and of timm, with random weights and tokenizers of a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "flew",
    "on",
    "over",
    "mat",
    "hill",
    "and",
    "then",
    ".",
    ",",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 40
"""More than there are words, as sizes are rounded up."""


def small_bert(**changes: Any) -> nn.Module:
    """Two layers of BERT, 32 wide."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=24, **{**sizes, **changes})
    ).eval()


def small_llama(**changes: Any) -> nn.Module:
    """Two layers of a Llama, 32 wide, its output tied to its table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
        "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **{**sizes, **changes})).eval()


def save_tokenizer(folder: Path) -> None:
    """A tokenizer that splits at spaces and puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=20, **special).save_pretrained(
        folder
    )


def save_folder(model: Any, folder: Path, tokenizer: bool = True, **how: Any) -> Path:
    """A network as its library saves it, with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **how)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_sentence_encoder(folder: Path) -> Path:
    """A folder as sentence-transformers keeps it: the first token is the vector of a text."""
    save_folder(small_bert(), folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    )
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 16})
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one away."""
    held = {**json.loads(path.read_text()), **changes}
    write_json(path, {key: value for key, value in held.items() if value is not None})
