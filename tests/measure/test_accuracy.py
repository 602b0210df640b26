"""Accuracy, interval and agreement against tables, other formulas and plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from ttcompress.errors import DataError
from ttcompress.measure.accuracy import Batches, compare, predict
from ttcompress.measure.intervals import paired_interval, wilson_interval

RNG = np.random.default_rng(0)


class Given(nn.Module):
    """A classifier whose images are its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def batches(logits: NDArray[np.float64], labels: NDArray[np.int64], size: int = 7) -> Batches:
    x, y = torch.from_numpy(logits), torch.from_numpy(labels)
    return list(zip(x.split(size), y.split(size), strict=True))


def made_up(n: int, classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return RNG.normal(size=(n, classes)), RNG.integers(0, classes, n)


def top_k(logits: NDArray[np.float64], labels: NDArray[np.int64], k: int) -> float:
    order = np.argsort(-logits, axis=1)[:, :k]
    return 100 * float(np.mean([label in row for label, row in zip(labels, order, strict=True)]))


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 6, 10, 1000])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_top1_and_top5_against_numpy(classes: int, size: int) -> None:
    logits, labels = made_up(100, classes)
    accuracy = predict(Given(), batches(logits, labels, size)).accuracy()
    assert accuracy.n == 100
    assert accuracy.top1 == pytest.approx(top_k(logits, labels, 1), abs=1e-12)
    assert accuracy.top5 == pytest.approx(top_k(logits, labels, 5), abs=1e-12)
    assert accuracy.interval == wilson_interval(round(accuracy.top1), 100)
    if classes <= 5:
        assert accuracy.top5 == 100


@pytest.mark.parametrize("classes", [2, 10])
def test_agreement_against_numpy(classes: int) -> None:
    dense, labels = made_up(200, classes)
    compressed = dense + RNG.normal(size=dense.shape) * 0.5
    pair = [predict(Given(), batches(each, labels)) for each in (dense, compressed)]
    comparison = compare(*pair, "made up")
    same = 100 * float(np.mean(dense.argmax(1) == compressed.argmax(1)))
    assert 0 < same < 100
    before, after = (each.argmax(1) == labels for each in (dense, compressed))
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    assert lost != won
    assert comparison.lost_interval == paired_interval(lost, won, 200)
    assert comparison.agreement == pytest.approx(same, abs=1e-12)
    assert comparison.dense.top1 == pytest.approx(top_k(dense, labels, 1), abs=1e-12)
    assert comparison.compressed.top1 == pytest.approx(top_k(compressed, labels, 1), abs=1e-12)


def test_comparison_json_tells_dense_from_compressed() -> None:
    labels = np.arange(10)
    right, wrong = np.eye(10), -np.eye(10)
    dense, compressed = (predict(Given(), batches(each, labels)) for each in (right, wrong))
    data = compare(dense, compressed, "made up").to_json()
    assert data == {
        "dense": 100.0,
        "compressed": 0.0,
        "dense_top5": 100.0,
        "compressed_top5": 0.0,
        "n": 10,
        "interval": list(wilson_interval(0, 10)),
        "dense_interval": list(wilson_interval(10, 10)),
        "lost_interval": list(paired_interval(10, 0, 10)),
        "agreement": data["agreement"],
        "data": "made up",
    }
    assert 0 <= data["agreement"] <= 20


def test_order_of_batches_does_not_matter() -> None:
    logits, labels = made_up(50, 10)
    whole = predict(Given(), batches(logits, labels, 50)).accuracy()
    shuffled = RNG.permutation(50)
    assert predict(Given(), batches(logits[shuffled], labels[shuffled], 3)).accuracy() == whole


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_mode_is_put_back_and_evaluation_runs_in_eval_mode(training: bool, fails: bool) -> None:
    seen: list[bool] = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.training)
            return x / 0 if fails else x

    net = Net().train(training)
    if fails:
        with pytest.raises(DataError):
            predict(net, batches(*made_up(5, 3)))
    else:
        predict(net, batches(*made_up(5, 3)))
    assert seen == [False]
    assert net.training is training


def test_batch_norm_statistics_and_gradients_stay_out_of_it() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    predictions = predict(net, batches(*made_up(20, 4)[:1], RNG.integers(0, 3, 20)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not predictions.classes.requires_grad


def test_progress_counts_images() -> None:
    seen: list[int] = []
    predict(Given(), batches(*made_up(20, 3), size=8), progress=lambda what, done, total: seen.append(done))
    assert seen == [8, 16, 20]


def message(model: nn.Module, data: Batches) -> str:
    with pytest.raises(DataError) as error:
        predict(model, data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("label", [3, 4, 1000, -1, -100])
def test_labels_beyond_the_classes(label: int) -> None:
    logits, labels = made_up(20, 3)
    labels[11] = label
    text = message(Given(), batches(logits, labels))
    assert f"label {label}," in text
    assert "3 classes" in text


@pytest.mark.parametrize("shape", [(20, 3), (20, 1), (19,), (1,), ()], ids=str)
def test_labels_that_are_not_one_number_an_image(shape: tuple[int, ...]) -> None:
    """One-hot labels would otherwise be broadcast to a number that looks like an accuracy."""
    data = [(torch.randn(20, 3), torch.zeros(shape, dtype=torch.long))]
    assert "one class number an image" in message(Given(), data)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32), (3, 300), (4, 32, 32)], ids=str)
def test_images_of_the_wrong_size(shape: tuple[int, ...]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    text = message(net, [(torch.randn(2, *shape), torch.zeros(2, dtype=torch.long))])
    assert str(shape) in text


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: (x, x), "tuple"),
        (lambda x: {"classes": x[:, 0]}, "dict"),
        (lambda x: x[:, 0], "(20,)"),
        (lambda x: x[:, :, None], "(20, 3, 1)"),
        (lambda x: x * float("nan"), "NaN or Inf"),
        (lambda x: x / 0, "NaN or Inf"),
    ],
    ids=["tuple", "dict", "1-d", "3-d", "nan", "inf"],
)
def test_what_are_no_logits(function: Callable[[Tensor], object], wanted: str) -> None:
    assert wanted in message(Function(function), batches(*made_up(20, 3), size=20))


def test_no_images_and_no_labels() -> None:
    assert "no image" in message(Given(), [])
    assert "no image" in message(Given(), [(torch.empty(0, 3), torch.empty(0, dtype=torch.long))])
    assert "needs labels" in message(Given(), [(torch.randn(2, 3), None)])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_the_batch_size(error: Exception) -> None:
    def exhaust(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(DataError, match=r"out of memory; a smaller --batch-size") as caught:
        predict(Function(exhaust), batches(*made_up(2, 3)))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("pixel_values"), "KeyError: 'pixel_values'"),
        (AttributeError("no attribute shape"), "AttributeError: no attribute shape"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (NotImplementedError("no such mode\nsecond line"), "no such mode"),
        (StopIteration("spent"), "StopIteration: spent"),
    ],
)
def test_whatever_the_network_raises_is_one_line_with_its_cause(error: Exception, line: str) -> None:
    def fail(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(DataError) as caught:
        predict(Function(fail), batches(*made_up(2, 3)))
    assert str(caught.value) == f"the network does not take images of shape (3,): {line}"
    assert caught.value.__cause__ is error


def test_an_interrupt_is_no_error_of_the_network() -> None:
    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(Function(interrupt), batches(*made_up(2, 3)))


def test_what_a_loader_raises_and_what_is_no_batch() -> None:
    def broken() -> Iterator[Any]:
        yield torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
        raise OSError("picture.png is truncated")

    assert message(Given(), broken()) == "the data cannot be read: OSError: picture.png is truncated"
    x, labels = torch.randn(2, 3), torch.zeros(2, dtype=torch.long)
    assert "not a tuple of 3" in message(Given(), [(x, labels, labels)])  # type: ignore[list-item]
    assert "not a dict of 1" in message(Given(), [{"x": x}])  # type: ignore[list-item]
    assert "not a Tensor" in message(Given(), [x])  # type: ignore[list-item]
    assert "not a list" in message(Given(), [(x, [0, 1])])  # type: ignore[list-item]
    assert "cannot be read" in message(Given(), 7)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_top5_is_never_below_top1(n: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    accuracy = predict(
        Given(), batches(rng.normal(size=(n, classes)), rng.integers(0, classes, n))
    ).accuracy()
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.top1 + 1e-12
    assert accuracy.top1 - 1e-12 <= high <= 100
    assert accuracy.top1 <= accuracy.top5 <= 100


def test_images_in_another_order_are_not_compared_one_by_one() -> None:
    """As from a DataLoader that shuffles: both accuracies are right, and agreement is not known."""
    logits, labels = made_up(40, 10)
    order = RNG.permutation(40)
    one, other = (
        predict(Given(), batches(logits, labels)),
        predict(Given(), batches(logits[order], labels[order])),
    )
    comparison = compare(one, other, "data")
    assert comparison.dense == comparison.compressed
    assert comparison.to_json()["agreement"] is None
    assert compare(one, one, "data").agreement == 100
