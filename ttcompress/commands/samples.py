"""The images on which a compressed network differs most from the dense one, for a page."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ttcompress.data.sets import Images
from ttcompress.measure.accuracy import Predictions
from ttcompress.records.common import Json
from ttcompress.records.extras import MOST_SAMPLES, Extras
from ttcompress.records.report import Preprocessing

LEAST_SHIFT = 0.01
"""Of the confidence in the same answer, below which a sample has not changed."""
SMALL = 64
"""Pixels a side up to which a picture is exact; larger ones are made smaller."""
LARGEST = 160


def add_changed_samples(
    extras: Extras,
    images: Images,
    preprocessing: Preprocessing,
    dense: Predictions,
    compressed: Predictions,
) -> None:
    """Those with another answer, first where both networks were surest of theirs, then those of another confidence.

    None where the images came in another order the second time.
    """
    if not torch.equal(dense.labels, compressed.labels):
        return
    changed = dense.classes[:, 0] != compressed.classes[:, 0]
    sureness = dense.confidences + compressed.confidences
    shift = (dense.confidences - compressed.confidences).abs()
    # All with another answer come before all others: a sum of two confidences is at most 2.
    weight = torch.where(changed, 2 + sureness, shift)
    order = weight.argsort(descending=True, stable=True)[:MOST_SAMPLES]
    chosen = order[weight[order] >= LEAST_SHIFT].tolist()

    extras.samples = [_sample(index, dense, compressed, images.class_names) for index in chosen]
    part = images.chosen(chosen)
    batches = [batch for batch, _ in part.batches(preprocessing, max(1, len(chosen)))] if chosen else []
    extras.images = [_data_uri(image, preprocessing) for batch in batches for image in batch]


def _sample(index: int, dense: Predictions, compressed: Predictions, names: tuple[str, ...]) -> Json:
    sides = {"dense": dense, "compressed": compressed}
    label = int(dense.labels[index])
    return {
        "index": index,
        "label": label,
        **({"name": names[label]} if label < len(names) else {}),
        **{side: _answer(predictions, index, names) for side, predictions in sides.items()},
    }


def _answer(predictions: Predictions, index: int, names: tuple[str, ...]) -> Json:
    answer = int(predictions.classes[index, 0])
    return {
        "answer": answer,
        **({"name": names[answer]} if answer < len(names) else {}),
        "confidence": round(100 * float(predictions.confidences[index]), 2),
    }


def _data_uri(image: Tensor, preprocessing: Preprocessing) -> str:
    """An image as a page holds it: exact where it is small."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)

    kind, how = "png", dict[str, Any](optimize=True)
    if max(picture.size) > SMALL:
        picture.thumbnail((LARGEST, LARGEST))
        kind, how = "jpeg", {"quality": 80}
    file = BytesIO()
    picture.save(file, kind, **how)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
