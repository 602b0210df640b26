"""What a network is fitted to and measured by where its inputs are arrays by name, or tensors in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.commands.metric import Metric, accuracy_of
from ttcompress.data.named_arrays import batches_in_length, open_named_arrays
from ttcompress.errors import DataError
from ttcompress.networks.input_names import by_input_names
from ttcompress.networks.running import NetworkInput, batch_size, map_tensors
from ttcompress.records.common import Progress
from ttcompress.runtime import chosen_device
from ttcompress.settings import Settings


def calibration_on(name: str, inputs: NetworkInput, settings: Settings) -> Calibration:
    """Calibration on some of these samples."""
    batches = batches_in_length(inputs, _rows, settings.batch_size)

    def drawn(indices: Sequence[int]) -> Iterator[Any]:
        return (batch for _, batch in batches(indices))

    return draw_calibration(name, batch_size(inputs), settings.recipe.calib_images, settings.seed, drawn)


def _rows(inputs: NetworkInput, indices: Tensor) -> Any:
    return map_tensors(itemgetter(indices), inputs)


def named_calibration(reference: str, model: nn.Module, settings: Settings) -> Calibration:
    """Calibration on the arrays of an npz file."""
    arrays = open_named_arrays(reference)
    return calibration_on(arrays.name, by_input_names(model, arrays.inputs, arrays.name), settings)


def named_metric(
    reference: str, model: nn.Module, settings: Settings, progress: Progress | None, limit: int | None = None
) -> Metric:
    """Accuracy on the arrays of an npz file with labels, of the first `limit` of them.

    Raises:
        DataError: there are no labels.
    """
    arrays = open_named_arrays(reference)
    labels = arrays.labels
    if labels is None:
        raise DataError(f"{arrays.name} has no array 'labels', which accuracy needs")

    inputs = by_input_names(model, arrays.inputs, arrays.name)
    batches = batches_in_length(inputs, _rows, settings.batch_size)
    count = min(limit or len(arrays), len(arrays))

    def labelled() -> Iterator[tuple[NetworkInput, Tensor]]:
        for chosen, batch in batches(range(count)):
            yield batch, labels[chosen]

    def known_total(what: str, done: int, total: int) -> None:
        if progress:
            progress(what, done, count)

    return accuracy_of(labelled, arrays.name, chosen_device(settings.device), known_total, settings.outputs)


def named_example(reference: str, model: nn.Module) -> NetworkInput:
    """One sample, to count, time and prove with."""
    arrays = open_named_arrays(reference)
    inputs = by_input_names(model, arrays.inputs, arrays.name)
    _, batch = next(batches_in_length(inputs, _rows, 1)([0]))
    return batch  # type: ignore[no-any-return]
