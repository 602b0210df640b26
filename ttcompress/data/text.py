"""Texts to calibrate, measure and train on: plain files, lines of JSON, pairs of sentences with a score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttcompress.errors import DataError, shortlist

KINDS = ("text", "stsb")
"""Kinds of references that are texts."""
JSON_LINES = ".jsonl"
WILD = set("*?[")
"""What makes a name a pattern."""
STSB_SCORE, STSB_FIRST, STSB_SECOND = 4, 5, 6
"""Columns of the STS benchmark's files, from 0 (Cer et al. 2017)."""


@dataclass(frozen=True)
class Texts:
    """Texts in a fixed order, from files.

    Attributes:
        name: the reference without directories.
        texts: what is read; of pairs, the first of each and the second in turns.
        documents: the same, whole, for networks that go on with a text: a file of plain text is one document.
        labels: the class of each text, where all have one.
        scores: how alike the texts of each pair are, where they are pairs.
    """

    name: str
    texts: tuple[str, ...]
    documents: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    scores: tuple[float, ...] | None = None

    @property
    def digest(self) -> str:
        """A sha256 of all that is in it."""
        parts = [self.texts, self.documents, self.labels, self.scores]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def names_texts(reference: str) -> bool:
    """Whether a data reference is one of texts.

    >>> names_texts("text:corpus.txt"), names_texts("cifar10:data")
    (True, False)
    """
    return reference.partition(":")[0] in KINDS


def open_texts(reference: str) -> Texts:
    """Open `text:FILE`, `text:PATTERN` of several, or `stsb:FILE`.

    A plain file has a text a line, without the empty ones; `.jsonl` has an object a line with `text`, and `label` where
    texts have classes; `stsb` has a pair of sentences a line, tab-separated, with a score.

    Raises:
        DataError: no such file, another encoding than UTF-8, nothing in it, or lines of another form.
    """
    kind, _, pattern = reference.partition(":")
    if not pattern:
        raise DataError(f"{reference!r} names no place: write {kind}:FILE")
    files = _files(pattern)
    name = f"{kind}:{files[0].name}" if len(files) == 1 else f"{kind}:{Path(pattern).name}"
    if kind == "stsb":
        return _pairs(name, files)

    found = [_texts_of(file) for file in files]
    texts = [text for file in found for text in file.texts]
    documents = [text for file in found for text in file.documents]
    labels = [label for file in found for label in file.labels or ()]
    if not texts:
        raise DataError(f"{reference}: holds no text")
    if labels and len(labels) < len(texts):
        raise DataError(f"{reference}: some texts have a label and some have none")
    return Texts(name, tuple(texts), tuple(documents), tuple(labels) or None)


def _files(pattern: str) -> list[Path]:
    """The file of this name, or else those that a pattern stands for, sorted by name."""
    file = Path(pattern).expanduser()
    if file.exists():
        if not file.is_file():
            raise DataError(f"{file} is no ordinary file: name a file of text, or several as {file}/*.txt")
        return [file]

    fixed = [part for part in file.parts if not WILD & set(part)]
    root, wild = Path(*fixed[: len(fixed)]), file.parts[len(fixed) :]
    files = sorted(each for each in root.glob("/".join(wild)) if each.is_file()) if wild else []
    if not files:
        raise DataError(f"no file {file}")
    return files


def _read(file: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start:,}): convert it first") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error


def _texts_of(file: Path) -> Texts:
    content = _read(file)
    if file.suffix != JSON_LINES:
        lines = [line.strip() for line in content.splitlines()]
        texts = [line for line in lines if line]
        return Texts(file.name, tuple(texts), (content,) if texts else ())

    entries = list(_entries(file, content))
    texts = [entry["text"] for entry in entries]
    labels = [entry["label"] for entry in entries if "label" in entry]
    return Texts(file.name, tuple(texts), tuple(texts), tuple(labels))


def _entries(file: Path, content: str) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, each with a text, and a class where it has one."""
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: no JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise DataError(f"{file}, line {number}: has to be an object with 'text', a string")
        label = entry.get("label", 0)
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise DataError(f"{file}, line {number}: label must be a whole number from 0 on, not {label!r}")
        if entry["text"].strip():
            yield entry


def _pairs(name: str, files: Sequence[Path]) -> Texts:
    texts: list[str] = []
    scores: list[float] = []
    for file in files:
        for number, line in enumerate(_read(file).split("\n"), 1):
            if not line.strip():
                continue
            # Quotes are text there.
            cells = line.rstrip("\r").split("\t")
            scores.append(_score(file, number, cells))
            texts += [cells[STSB_FIRST], cells[STSB_SECOND]]
    if not texts:
        raise DataError(f"{shortlist(files)}: holds no pairs")
    return Texts(name, tuple(texts), tuple(texts), scores=tuple(scores))


def _score(file: Path, number: int, cells: Sequence[str]) -> float:
    wanted = "tab-separated, a score in column 5, sentences in 6 and 7"
    if len(cells) <= STSB_SECOND or not cells[STSB_FIRST].strip() or not cells[STSB_SECOND].strip():
        raise DataError(f"{file}, line {number}: not a pair of the STS benchmark ({wanted})")
    try:
        score = float(cells[STSB_SCORE])
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:
        raise DataError(f"{file}, line {number}: {cells[STSB_SCORE]!r} is no score from 0 to 5 ({wanted})")
    return score
