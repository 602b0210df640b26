"""Networks that take several inputs, by order or by name, and tokens: the same wherever one tensor is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.errors import DataError, PlanError
from ttcompress.measure.latency import TimedNetwork
from ttcompress.measure.multiply_adds import usage_of
from ttcompress.networks.running import Example, batch_size, call, map_tensors, placed, tensors_of

COUNT = 96
pytestmark = pytest.mark.usefixtures("one_thread")


class Packed(nn.Module):
    """What Pair computes, from one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(24, 48), nn.Linear(24, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x[:, :24], x[:, 24:])

    def both(self, left: Tensor, right: Tensor) -> Tensor:
        joined: Tensor = self.out(torch.relu(self.left(left) + self.right(right)))
        return joined


class Pair(Packed):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return self.both(left, right)


class Tagger(nn.Module):
    """Tokens with a mask, of which a shared table of positions is a third input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.hidden, self.out = nn.Linear(24, 48), nn.Linear(48, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        words = self.hidden(self.table(ids)).relu()
        if mask is not None:
            words = words * mask[..., None]
        found: Tensor = self.out(words.mean(1))
        return found


def pair(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return kind()


torch.manual_seed(0)
LEFT, RIGHT = torch.randn(COUNT, 24), torch.randn(COUNT, 24)
LABELS = torch.randint(0, 5, (COUNT,))
IDS, MASK = torch.randint(0, 50, (COUNT, 7)), (torch.rand(COUNT, 7) > 0.3).float()
OPTIONS: dict[str, Any] = {"ratio": 1.5, "include": ["*"], "batch_size": 32, "device": "cpu"}


def in_batches(inputs: Any) -> list[Any]:
    return [
        (map_tensors(lambda each, at=at: each[at : at + 32], inputs), LABELS[at : at + 32])
        for at in (0, 32, 64)
    ]  # type: ignore[misc]


@pytest.mark.parametrize("inputs", [(LEFT, RIGHT), [LEFT, RIGHT], {"right": RIGHT, "left": LEFT}])
def test_two_inputs_are_compressed_and_measured_as_one_tensor_of_both(inputs: Any) -> None:
    effort = {"effort": "fast"}
    packed = in_batches(torch.cat([LEFT, RIGHT], 1))
    one, wanted = ttcompress.compress(pair(Packed), calib=packed, data=packed, **OPTIONS, **effort)
    batches = in_batches(inputs)
    several, report = ttcompress.compress(pair(Pair), calib=batches, data=batches, **OPTIONS, **effort)
    assert report.accuracy == wanted.accuracy
    assert report.calibration == wanted.calibration
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in several.state_dict().items())
    assert ttcompress.evaluate(several, batches) == ttcompress.evaluate(one, packed)


def test_one_mapping_is_calibration_by_itself_and_a_tuple_of_tensors_begins_with_its_inputs() -> None:
    _, report = ttcompress.compress(
        pair(Pair), calib={"left": LEFT, "right": RIGHT}, effort="default", **OPTIONS
    )
    assert report.calibration is not None
    assert report.calibration["images"] + report.calibration["held_out"] == COUNT
    first, _ = ttcompress.compress(pair(Packed), calib=torch.cat([LEFT, RIGHT], 1), **OPTIONS)
    again, _ = ttcompress.compress(pair(Packed), calib=[(torch.cat([LEFT, RIGHT], 1), LABELS)], **OPTIONS)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("inputs", [(IDS, MASK), {"ids": IDS, "mask": MASK}, {"ids": IDS}, IDS])
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_tokens_stay_whole_numbers_in_every_stage(inputs: Any, effort: str) -> None:
    batches = in_batches(inputs)
    _, report = ttcompress.compress(
        pair(Tagger).double(), calib=batches, data=batches, effort=effort, **OPTIONS
    )
    assert report.calibration is not None
    assert report.calibration["stages"][0]["stage"] == "weights"


@pytest.mark.parametrize(
    ("calib", "wanted"),
    [
        ([], "holds no inputs"),
        ([((LEFT, RIGHT[:5]), LABELS)], r"96 inputs, but also a tensor \(5, 24\)"),
        ([((LEFT, torch.tensor(3.0)), LABELS)], "zero-dimensional tensor"),
        ({"left": LEFT, "right": RIGHT * float("nan")}, "NaN or Inf"),
        ([LEFT, LEFT[:, :5]], "do not fit together"),
        ([{"left": LEFT}, {"right": LEFT}], "do not fit together: KeyError: 'left'"),
        ([((LEFT, RIGHT),), ((LEFT,),)], "do not fit together"),
        (["a.png"], "this one has a str"),
        (7, "cannot be read: 'int' object is not iterable"),
    ],
)
def test_what_is_no_calibration_is_refused_in_one_line(calib: Any, wanted: str) -> None:
    with pytest.raises(DataError, match=wanted):
        ttcompress.compress(pair(Pair), calib=calib, **OPTIONS)


@pytest.mark.parametrize("given", [(LEFT, RIGHT), {"left": LEFT[:1], "right": RIGHT[:1]}])
def test_counting_and_timing_take_an_example(given: Any) -> None:
    products = 24 * 48 * 2 + 48 * 5
    assert usage_of(pair(Pair), Example(inputs=given)).multiply_adds == products
    plan = ttcompress.plan(pair(Pair), macs_ratio=1.5, include=["*"], example=given)
    assert plan.multiply_adds is not None
    assert plan.multiply_adds[0] == products
    bed = TimedNetwork(pair(Pair), Example(inputs=given), torch.device("cpu"))
    assert bed.latency(plan, 0.01)["dense"] > 0
    assert len(bed.tuned(plan).layers) == len(plan.layers)


def test_calibration_is_an_example_too_and_without_any_the_way_out_is_said() -> None:
    plan = ttcompress.plan(pair(Pair), macs_ratio=1.5, include=["*"], calib=in_batches((LEFT, RIGHT)))
    assert plan.multiply_adds is not None
    with pytest.raises(PlanError, match=r"input_size, such as 3,224,224, or an example of inputs with calib"):
        ttcompress.plan(pair(Pair), macs_ratio=1.5)
    with pytest.raises(DataError, match="argument: 'right'"):
        ttcompress.plan(pair(Pair), macs_ratio=1.5, input_size=(24,))


class Rejecting(Tagger):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        raise ValueError("three languages are needed")


def test_made_up_inputs_of_a_table_are_tokens() -> None:
    model = pair(Tagger)
    assert usage_of(model, Example((7,))).multiply_adds == 7 * 24 * 48 + 48 * 5
    assert (
        TimedNetwork(model, Example((7,)), torch.device("cpu")).tuned(ttcompress.plan(model, ranks=2)).layers
    )
    with pytest.raises(DataError, match=r"three languages are needed; an example of its inputs says more"):
        usage_of(Rejecting(), Example((7,)))


@pytest.mark.parametrize("shape", [(10**12, 10**12), (2**62,), (3, 10**7, 10**7)])
def test_inputs_that_no_machine_has_memory_for_are_not_made(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="more than this machine has memory for"):
        usage_of(pair(Packed), Example(shape))
    with pytest.raises(DataError, match="more than this machine has memory for"):
        TimedNetwork(pair(Packed), Example(shape), torch.device("cpu"))


def _raises(error: Exception) -> Callable[..., Tensor]:
    def forward(*inputs: Tensor) -> Tensor:
        raise error

    return forward


@pytest.mark.parametrize("error", [KeyError("mask"), AttributeError("no shape"), NotImplementedError()])
def test_errors_of_a_users_network_have_a_cause_wherever_it_runs(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "forward", _raises(error))
    x = torch.cat([LEFT, RIGHT], 1)
    ways: list[Callable[[], object]] = [
        lambda: ttcompress.compress(pair(Packed), calib=x, **OPTIONS),
        lambda: ttcompress.compress(pair(Packed), data=[(x, LABELS)], **OPTIONS),
        lambda: ttcompress.evaluate(pair(Packed), [(x, LABELS)]),
        lambda: ttcompress.plan(pair(Packed), macs_ratio=2, input_size=(48,)),
        lambda: ttcompress.plan(pair(Packed), latency_ratio=2, input_size=(48,)),
        lambda: ttcompress.plan(pair(Packed), ranks=2, tune=True, input_size=(48,)),
    ]
    for way in ways:
        with pytest.raises(DataError, match="does not take") as caught:
            way()
        assert caught.value.__cause__ is error


class Fussy(Packed):
    """A network that swallows all errors of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except Exception:
            return x[:, :5]


def test_a_network_that_catches_errors_is_swept_all_the_same() -> None:
    x = torch.cat([LEFT, RIGHT], 1)
    wanted, _ = ttcompress.compress(pair(Packed), calib=x, effort="fast", **OPTIONS)
    small, _ = ttcompress.compress(pair(Fussy), calib=x, effort="fast", **OPTIONS)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in small.state_dict().items())


def test_what_is_no_tensor_is_handed_on() -> None:
    batch = {"ids": IDS, "mask": None, "more": [LEFT, 3]}
    assert batch_size(batch) == COUNT
    moved = placed(batch, "cpu", torch.float64)
    assert moved["ids"].dtype == torch.int64
    assert moved["more"][0].dtype == torch.float64
    assert moved["mask"] is None
    assert [each.shape for each in tensors_of(batch)] == [IDS.shape, LEFT.shape]
    with pytest.raises(DataError, match="whose first dimension counts them, not dict"):
        batch_size({"mask": None})
    model = pair(Tagger)
    assert torch.equal(call(model, {"ids": IDS, "mask": None}), call(copy.deepcopy(model), (IDS, None)))
