"""Accuracy of a classifier, and agreement of two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.errors import DataError
from ttcompress.measure.intervals import paired_interval, wilson_interval
from ttcompress.networks.running import NetworkInput, blaming, call, finite, input_dtype, placed
from ttcompress.networks.structures import logits_of
from ttcompress.records.common import Progress
from ttcompress.records.report import Accuracy, Comparison

Batches = Iterable[tuple[NetworkInput, Tensor | None]]


@dataclass(frozen=True)
class Predictions:
    """The (up to) five most likely classes of each image, best first (n, k), the labels (n), and how likely the first is.

    `confidences` (n) are from 0 to 1.
    """

    classes: Tensor
    labels: Tensor
    confidences: Tensor

    @property
    def is_right(self) -> Tensor:
        """Whether the most likely class is the label (n)."""
        return self.classes[:, 0] == self.labels

    def accuracy(self) -> Accuracy:
        """Top-1 and top-5 in percent; the interval belongs to top-1."""
        hits = self.classes == self.labels[:, None]
        n, right = len(self.labels), int(self.is_right.sum())
        return Accuracy(100 * right / n, 100 * int(hits.sum()) / n, n, wilson_interval(right, n))


def predict(
    model: nn.Module,
    batches: Batches,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    outputs: Sequence[str] = (),
) -> Predictions:
    """Run a classifier over labelled batches of (inputs, labels), in eval mode; its own mode is put back after.

    `outputs` are the parts of its output that may be the logits, as of `logits_of`.

    Raises:
        DataError: no image, no labels, labels that are no classes, images the network does not take, NaN logits.
    """
    was_training, dtype = model.training, input_dtype(model)
    model.eval()
    classes: list[Tensor] = []
    labels: list[Tensor] = []
    confidences: list[Tensor] = []
    try:
        for inputs, target in labelled(batches):
            logits = _logits(model, placed(inputs, device, dtype), outputs)
            _check_labels(target, logits)
            classes.append(logits.topk(min(5, logits.shape[1])).indices.cpu())
            labels.append(target.cpu())
            confidences.append(logits.float().softmax(1).amax(1).cpu())
            if progress:
                progress("evaluating", sum(map(len, labels)), 0)
    finally:
        model.train(was_training)
    if not sum(map(len, labels)):
        raise DataError("the data holds no image")
    return Predictions(torch.cat(classes), torch.cat(labels), torch.cat(confidences))


def labelled(batches: Batches) -> Iterator[tuple[NetworkInput, Tensor]]:
    """The batches of a loader, which may be a user's own.

    Raises:
        DataError: an error of the loader, or a batch that is no (inputs, labels).
    """
    with blaming("the data cannot be read"):
        loader = iter(batches)
    while True:
        with blaming("the data cannot be read"):
            batch = next(loader, None)
        if batch is None:
            return
        yield _inputs_and_labels(batch)


def _inputs_and_labels(batch: Any) -> tuple[NetworkInput, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        holds = f" of {len(batch)}" if isinstance(batch, tuple | list | Mapping) else ""
        raise DataError(f"a batch of labelled data is (inputs, labels), not a {type(batch).__name__}{holds}")
    inputs, labels = batch
    if labels is None:
        raise DataError("accuracy needs labels; this data has none")
    if not isinstance(labels, Tensor):
        raise DataError(f"the labels of a batch are a tensor of class numbers, not a {type(labels).__name__}")
    return inputs, labels


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1]:
        raise DataError(
            f"labels {tuple(labels.shape)} for logits {tuple(logits.shape)}: one class number an image"
        )
    for label in set(labels.tolist()):
        if not 0 <= label < logits.shape[1]:
            raise DataError(f"the data has label {label}, the network {logits.shape[1]} classes")


@torch.inference_mode()
def _logits(model: nn.Module, inputs: NetworkInput, outputs: Sequence[str]) -> Tensor:
    return finite(logits_of(call(model, inputs), outputs))


def compare(dense: Predictions, compressed: Predictions, data: str) -> Comparison:
    """Both accuracies, what was lost, and the share of images on which the first choices agree; `data` names the images.

    That share and the interval of what was lost are not known where the images came in another order the second time,
    as their labels tell.
    """
    agreement = lost_interval = None
    if torch.equal(dense.labels, compressed.labels):
        agreement = 100 * int((dense.classes[:, 0] == compressed.classes[:, 0]).sum()) / len(dense.labels)
        before, after = dense.is_right, compressed.is_right
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        lost_interval = paired_interval(lost, won, len(before))
    return Comparison(dense.accuracy(), compressed.accuracy(), agreement, data, lost_interval)
