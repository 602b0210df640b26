"""Files of text, as lines, JSON and pairs; samples of tokens; batches to train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttcompress.data.text import open_texts
from ttcompress.data.token_batches import TokenStream
from ttcompress.data.tokens import TokenSamples, one_by_one, packed
from ttcompress.errors import DataError

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=60)


def letters(texts: object) -> list[list[int]]:
    """A tokenizer: a number a letter, between 1 and 2."""
    return [[1, *(ord(letter) for letter in text), 2] for text in texts]  # type: ignore[attr-defined]


def samples_of(lengths: list[int], labelled: bool = False) -> TokenSamples:
    rows = tuple(
        tuple(100 * number + place for place in range(length)) for number, length in enumerate(lengths)
    )
    return TokenSamples("made up", rows, tuple(range(len(lengths))) if labelled else None)


def test_a_plain_file_has_a_text_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  two \n\r\n")
    (tmp_path / "b.txt").write_text("three\n")
    texts = open_texts(f"text:{tmp_path}/*.txt")
    assert texts.texts == ("one", "two", "three")
    assert len(texts.documents) == 2
    assert (texts.name, texts.labels, texts.scores) == ("text:*.txt", None, None)
    assert open_texts(f"text:{tmp_path}/b.txt").name == "text:b.txt"


def test_json_lines_have_texts_and_classes(tmp_path: Path) -> None:
    lines = [{"text": "one", "label": 1, "more": []}, {"text": "two\nlines", "label": 0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    texts = open_texts(f"text:{tmp_path}/a.jsonl")
    assert (texts.texts, texts.labels) == (("one", "two\nlines"), (1, 0))


def test_quotes_of_the_sts_benchmark_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('main\tMSR\t2012\t0001\t2.500\tA "cat" sat.\tA dog\' ran."\tsource\n')
    texts = open_texts(f"stsb:{tmp_path}/a.csv")
    assert (texts.texts, texts.scores) == (('A "cat" sat.', "A dog' ran.\""), (2.5,))


@pytest.mark.parametrize(
    ("reference", "content", "says"),
    [
        ("text:", b"", "names no place"),
        ("text:none.txt", b"", "no file none.txt"),
        ("text:*.md", b"", "no file"),
        ("text:.", b"", "no ordinary file"),
        ("text:a.txt", b"\n \n", "holds no text"),
        ("text:a.txt", "Größe".encode("latin-1"), "not UTF-8 text"),
        ("text:a.jsonl", b'{"text": 1}', "line 1: has to be an object with 'text'"),
        ("text:a.jsonl", b'{"text": "x"}\n{', "line 2: no JSON"),
        ("text:a.jsonl", b'{"text": "x", "label": -1}', "label must be a whole number"),
        ("text:a.jsonl", b'{"text": "x", "label": 1}\n{"text": "y"}', "some texts have a label"),
        ("stsb:a.csv", b"only\tthree\tcells", "line 1: not a pair"),
        ("stsb:a.csv", b"a\tb\tc\td\t7\tx\ty", "is no score from 0 to 5"),
        ("stsb:a.csv", b"", "holds no pairs"),
    ],
)
def test_bad_texts_are_refused_in_one_line(
    reference: str, content: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = reference.partition(":")[2]
    if name and name not in (".", "none.txt", "*.md"):
        Path(name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        open_texts(reference)
    assert "\n" not in str(caught.value)


def test_a_long_text_is_cut_before_what_ends_it() -> None:
    samples = one_by_one("x", ["abcdef", "ab"], letters, most=4)
    assert samples.rows == ((1, 97, 98, 2), (1, 97, 98, 2))


@given(st.lists(st.text("ab", max_size=9), min_size=1, max_size=5), st.integers(2, 7))
def test_packing_loses_no_token_but_a_last_single_one(documents: list[str], length: int) -> None:
    tokens = [token for row in letters(documents) for token in row]
    samples = packed("x", documents, letters, length)
    assert all(len(row) == length for row in samples.rows[:-1])
    joined = [token for row in samples.rows for token in row]
    assert joined == tokens[: len(joined)]
    assert len(tokens) - len(joined) == (len(tokens) % length == 1)


@given(LENGTHS, st.integers(1, 5))
def test_batches_have_no_padding_and_every_sample_once(lengths: list[int], size: int) -> None:
    samples = samples_of(lengths)
    seen = []
    for indices, inputs in samples.indexed_batches(range(len(samples)), size):
        assert len(indices) <= size
        assert bool(inputs["attention_mask"].all())
        assert inputs["input_ids"].tolist() == [list(samples.rows[index]) for index in indices]
        seen += indices
    assert sorted(seen) == list(range(len(samples)))


@given(LENGTHS, st.integers(1, 5), st.integers(0, 3))
def test_training_batches_pad_only_where_the_mask_says(lengths: list[int], size: int, epoch: int) -> None:
    samples = samples_of(lengths, labelled=True)
    stream = TokenStream(samples, size, seed=1, device=torch.device("cpu"))
    batches = list(stream.epoch(epoch))
    assert len(batches) == stream.steps
    seen = []
    for inputs, labels in batches:
        assert labels is not None
        for row, mask, label in zip(
            inputs["input_ids"], inputs["attention_mask"], labels.tolist(), strict=True
        ):
            assert tuple(row[mask.bool()].tolist()) == samples.rows[label]
            assert not bool(row[~mask.bool()].any())
            seen.append(label)
    assert len(set(seen)) == len(seen)

    rest = list(stream.epoch(epoch, start=1))
    assert [labels.tolist() for _, labels in rest] == [labels.tolist() for _, labels in batches[1:]]  # type: ignore[union-attr]
