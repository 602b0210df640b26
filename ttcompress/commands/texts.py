"""What a network that reads text learns from and is measured by: texts, in its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.commands.metric import Metric, accuracy_of
from ttcompress.data.text import Texts, names_texts, open_texts
from ttcompress.data.tokens import TokenSamples, one_by_one, packed
from ttcompress.errors import DataError
from ttcompress.measure.embeddings import cosines, embedded, pair_cosines, same_neighbour
from ttcompress.measure.intervals import (
    Interval,
    correlation_interval,
    interval_around,
    spearman,
    spearman_influences,
)
from ttcompress.measure.perplexity import Surprise, surprise
from ttcompress.networks.answers import answer_of
from ttcompress.networks.reader import Reader, Task
from ttcompress.records.common import Json, Progress
from ttcompress.runtime import chosen_device
from ttcompress.settings import Settings

COSINE = "mean cosine to the dense vectors"
SAME = "same nearest neighbour, %"
USUAL_CONTEXT = 512
"""Tokens of a sample of a causal language model, where it takes as many and nobody says otherwise."""


def require_reader(reader: Reader | None, reference: str) -> Reader:
    """How the network reads text.

    Raises:
        DataError: it does not.
    """
    if reader is None:
        raise DataError(
            f"{reference}: this network reads no text that the tool knows of: a folder of the transformers library "
            "with its tokenizer does"
        )
    return reader


def seq_len(reader: Reader, settings: Settings) -> int:
    """Tokens of the longest sample.

    Raises:
        DataError: longer than the network takes.
    """
    asked = settings.recipe.seq_len
    if asked is None:
        usual = USUAL_CONTEXT if reader.task is Task.CAUSAL else reader.usual
        return min(reader.longest, usual)
    if asked > reader.longest:
        raise DataError(
            f"--seq-len {asked}: the network takes sequences of at most {reader.longest:,} tokens"
        )
    return asked


def token_samples(texts: Texts, reader: Reader, settings: Settings) -> TokenSamples:
    """Texts as the network reads them: packed for one that goes on with a text, else one by one."""
    most = seq_len(reader, settings)
    if reader.task is Task.CAUSAL:
        return packed(texts.name, texts.documents, reader.tokenize, most)
    return one_by_one(texts.name, texts.texts, reader.tokenize, most, texts.labels)


def text_calibration(reference: str, reader: Reader | None, settings: Settings) -> Calibration:
    """Calibration on the texts of a reference, each once, without labels or scores."""
    reads = require_reader(reader, reference)
    texts = open_texts(reference)
    unique = replace(texts, texts=tuple(dict.fromkeys(texts.texts)), labels=None)
    samples = token_samples(unique, reads, settings)

    batches = partial(_batches, samples, settings.batch_size)
    drawn = draw_calibration(texts.name, len(samples), settings.recipe.calib_images, settings.seed, batches)
    return replace(drawn, answer=answer_of(reads), unit="samples" if reads.task is Task.CAUSAL else "texts")


def _batches(samples: TokenSamples, size: int, indices: Sequence[int]) -> Any:
    return samples.batches(indices, size)


def text_metric(
    reference: str,
    reader: Reader | None,
    settings: Settings,
    progress: Progress | None,
    limit: int | None = None,
) -> Metric:
    """What a network is measured by on texts: perplexity, the likeness of vectors, or accuracy."""
    reads = require_reader(reader, reference)
    texts = open_texts(reference)
    if limit is not None:
        texts = _first(texts, limit)
    return metric_on(token_samples(texts, reads, settings), texts.scores, reads, settings, progress)


def metric_on(
    samples: TokenSamples,
    scores: Sequence[float] | None,
    reader: Reader,
    settings: Settings,
    progress: Progress | None,
) -> Metric:
    """The same on samples of tokens, neighbours of which are pairs where there are scores of them."""
    device = chosen_device(settings.device)
    if reader.task is Task.CAUSAL:
        return _perplexity(samples, settings, device, progress)
    if reader.task is Task.CLASSIFIER:
        return _accuracy(samples, settings, device, progress)
    return _likeness(samples, scores, reader, settings, device, progress)


def _first(texts: Texts, limit: int) -> Texts:
    """The first texts, or pairs."""
    count = 2 * limit if texts.scores else limit
    return replace(
        texts,
        texts=texts.texts[:count],
        labels=texts.labels and texts.labels[:count],
        scores=texts.scores and texts.scores[:limit],
    )


def _perplexity(
    samples: TokenSamples, settings: Settings, device: torch.device, progress: Progress | None
) -> Metric:
    def measure(model: nn.Module) -> Surprise:
        batches = samples.batches(range(len(samples)), settings.batch_size)
        return surprise(model.to(device), batches, device, _of(progress, len(samples)))

    def summary(dense: Surprise, compressed: Surprise) -> Json:
        return {
            "metric": "perplexity",
            "lower_is_better": True,
            "dense": dense.perplexity,
            "compressed": compressed.perplexity,
            "n": compressed.num_tokens,
            "unit": "tokens",
            "interval": list(compressed.interval),
            "dense_interval": list(dense.interval),
            "lost_interval": _listed(compressed.rise_interval(dense)),
            "data": samples.name,
        }

    return Metric(measure, summary)


def _accuracy(
    samples: TokenSamples, settings: Settings, device: torch.device, progress: Progress | None
) -> Metric:
    if samples.labels is None:
        raise DataError(
            f"{samples.name} has no labels, which accuracy needs: lines of JSON with text and label"
        )
    labels = torch.tensor(samples.labels)

    def batches() -> Any:
        for indices, inputs in samples.indexed_batches(range(len(samples)), settings.batch_size):
            yield inputs, labels[indices]

    return accuracy_of(batches, samples.name, device, _of(progress, len(samples)))


def _likeness(
    samples: TokenSamples,
    scores: Sequence[float] | None,
    reader: Reader,
    settings: Settings,
    device: torch.device,
    progress: Progress | None,
) -> Metric:
    def measure(model: nn.Module) -> Tensor:
        batches = samples.indexed_batches(range(len(samples)), settings.batch_size)
        return embedded(
            model.to(device), batches, len(samples), reader.pooling, device, _of(progress, len(samples))
        )

    def alike(dense: Tensor, compressed: Tensor) -> Json:
        return {
            COSINE: float(cosines(dense, compressed).mean()),
            SAME: same_neighbour(dense, compressed),
        }

    def cosine(dense: Tensor, compressed: Tensor) -> Json:
        found = cosines(dense, compressed)
        mean = float(found.mean())
        return {
            "metric": COSINE,
            "dense": 1.0,
            "compressed": mean,
            "n": len(dense),
            "unit": "texts",
            "interval": _listed(interval_around(mean, found)),
            "lost_interval": _listed(interval_around(1 - mean, found)),
            "data": samples.name,
            "beside": {SAME: same_neighbour(dense, compressed)},
        }

    def correlation(dense: Tensor, compressed: Tensor) -> Json:
        found = _correlations(scores or (), dense, compressed)
        return {**found, "data": samples.name, "beside": alike(dense, compressed)}

    return Metric(measure, cosine if scores is None else correlation)


def _correlations(scores: Sequence[float], dense: Tensor, compressed: Tensor) -> Json:
    alike = [pair_cosines(vectors) for vectors in (dense, compressed)]
    theirs, ours = (spearman(each, scores) for each in alike)
    their_influences, our_influences = (spearman_influences(each, scores) for each in alike)
    return {
        "metric": "Spearman x 100",
        "dense": 100 * theirs,
        "compressed": 100 * ours,
        "n": len(scores),
        "unit": "pairs",
        "interval": _in_percent(correlation_interval(ours, len(scores))),
        "dense_interval": _in_percent(correlation_interval(theirs, len(scores))),
        "lost_interval": _listed(
            interval_around(100 * (theirs - ours), 100 * (their_influences - our_influences))
        ),
    }


def _in_percent(interval: Interval) -> list[float]:
    return [100 * end for end in interval]


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _of(progress: Progress | None, total: int) -> Progress | None:
    """The same progress with the total, which a loop over batches does not know."""
    if progress is None:
        return None
    tell: Callable[[str, int, int], None] = progress
    return lambda what, done, _: tell(what, done, total)


def example_tokens(reference: str, reader: Reader | None, settings: Settings) -> Mapping[str, Tensor]:
    """One sample of a reference, to count, time and prove with."""
    reads = require_reader(reader, reference)
    texts = open_texts(reference)
    few = replace(texts, texts=texts.texts[:1], labels=None, documents=texts.documents[:1])
    return next(token_samples(few, reads, settings).batches([0], 1))


def all_texts(references: Sequence[str]) -> bool:
    """Whether data references are of texts.

    Raises:
        DataError: some are and some are not.
    """
    found = [names_texts(each) for each in references]
    if any(found) and not all(found):
        other = references[found.index(False)]
        raise DataError(f"{other}: a network reads texts or images, not both: name texts here too")
    return any(found)
