"""Networks that return structures: their names by hand, and results that equal those of the same network as a tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.errors import DataError
from ttcompress.networks.running import batch_size, call
from ttcompress.networks.structures import (
    ChosenOutputs,
    chosen_outputs,
    logits_of,
    named_parts,
    tensors_by_name,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 64
IMAGES = torch.randn(COUNT, 24, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 5, (COUNT,), generator=torch.Generator().manual_seed(1))
OPTIONS: dict[str, Any] = {"ratio": 1.5, "include": ["*"], "device": "cpu", "effort": "fast"}


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Record:
    boxes: Tensor
    rest: Any = None


class Opaque:
    def __init__(self, inner: Any) -> None:
        self.inner = inner


class Net(nn.Module):
    """Logits and features of an MLP, in the form that a function makes of them."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.head = nn.Linear(48, 5)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        return self.form(self.head(features), features)


ones = torch.ones


def test_every_tensor_has_a_name() -> None:
    output = OrderedDict(
        a=ones(2),
        b=[ones(3), (None, Pair(ones(4), ones(5)))],
        c=Record(ones(6), {"x.y": ones(7)}),
        d=Opaque(ones(8)),
    )
    found = {name: len(each) for name, each in tensors_by_name(output).items()}
    assert found == {"a": 2, "b.0": 3, "b.1.1.left": 4, "b.1.1.right": 5, "c.boxes": 6, "c.rest.x.y": 7}
    assert list(tensors_by_name(ones(1))) == [""]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a"], {"a": 2}),
        (["b"], {"b.0": 3, "b.1.left": 4, "b.1.right": 5}),
        (["b.1.right", "a"], {"b.1.right": 5, "a": 2}),
        (["c.x.y"], {"c.x.y": 7}),
        (["d.inner"], {"d.inner": 8}),
        (["d.inner", "d"], None),
        (["b.2"], None),
        (["whole"], None),
    ],
)
def test_names_stand_for_parts(names: list[str], found: dict[str, int] | None) -> None:
    output = {
        "a": ones(2),
        "b": (ones(3), Pair(ones(4), ones(5))),
        "c": {"x.y": ones(7)},
        "d": Opaque(ones(8)),
        "whole": torch.ones(2, dtype=torch.int64),
    }
    if found is None:
        with pytest.raises(
            DataError, match=r"--outputs: there is no .*; the network returns a dict of a \(2,\)"
        ):
            named_parts(output, names)
    else:
        assert {name: len(each) for name, each in named_parts(output, names).items()} == found


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (ones(4, 3), ()),
        ({"logits": ones(4, 3), "pooled": ones(4, 9)}, ()),
        ((ones(4, 3), ones(4, 3, 5, 5), torch.ones(4, 2, dtype=torch.int64)), ()),
        ((ones(4, 9), ones(4, 3)), ("1",)),
        ({"a": {"b": ones(4, 3)}, "c": ones(4, 9)}, ("a",)),
    ],
)
def test_logits_are_found(output: Any, names: tuple[str, ...]) -> None:
    assert logits_of(output, names).shape == (4, 3)


@pytest.mark.parametrize(
    ("output", "names", "why"),
    [
        ((ones(4, 9), ones(4, 3)), (), r"more than one of its tensors .* name it with --outputs; .* 0 \(4, 9\), 1 \(4, 3\)"),
        ((ones(4, 9, 2),), (), "none of its tensors"),
        (ones(4), (), r"the network returns \(4,\)"),
        (ones(4, 3), ("logits",), "returns one tensor, which has no parts"),
        (3, (), "the network returns int"),
    ],
)  # fmt: skip
def test_what_could_be_several_things_is_no_logits(output: Any, names: tuple[str, ...], why: str) -> None:
    with pytest.raises(DataError, match=why):
        logits_of(output, names)


FORMS: dict[str, Any] = {
    "tuple": lambda logits, _: (logits,),
    "dict": lambda logits, _: {"logits": logits, "loss": None},
    "nested": lambda logits, _: {"out": [Record(logits)]},
    "whole numbers beside": lambda logits, _: (logits, logits.argmax(1)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_tensor_in_a_structure_counts_as_if_it_came_alone(form: Any) -> None:
    options = {**OPTIONS, "effort": "default", "calib": IMAGES, "data": [(IMAGES, LABELS)]}
    alone, wanted = ttcompress.compress(Net(lambda logits, _: logits), **options)
    within, found = ttcompress.compress(Net(form), **options)
    assert found.calibration == wanted.calibration
    assert found.accuracy == wanted.accuracy
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in within.state_dict().items())


def test_named_outputs_count_and_others_do_not() -> None:
    options = {**OPTIONS, "calib": IMAGES, "data": [(IMAGES, LABELS)]}
    alone, wanted = ttcompress.compress(Net(lambda logits, _: logits), **options)
    both, found = ttcompress.compress(
        Net(lambda logits, features: (features, {"classes": logits})), outputs=["1.classes"], **options
    )
    assert found.calibration == wanted.calibration
    assert found.accuracy == wanted.accuracy
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in both.state_dict().items())


def test_each_of_several_tensors_counts_by_its_own_power() -> None:
    """Their squared errors are shares, so that a factor of one of them changes nothing."""
    model = Net(lambda logits, features: (logits, features))
    loud = Net(lambda logits, features: (1000 * logits, features))
    answers = [chosen_outputs(each, IMAGES.split(16)) for each in (model, loud)]
    assert all(isinstance(answer, ChosenOutputs) for answer in answers)
    with torch.no_grad():
        found = answers[0](model, IMAGES)  # type: ignore[misc]
        other = answers[1](loud, IMAGES)  # type: ignore[misc]
        logits, features = call(model, IMAGES)
    torch.testing.assert_close(found, other)

    assert found.shape == (COUNT, 1, 5 + 48)
    power = found.square().sum(dim=(0, 1))
    torch.testing.assert_close(power[:5].sum() / COUNT, torch.tensor(1.0))
    torch.testing.assert_close(power[5:].sum() / COUNT, torch.tensor(1.0))
    torch.testing.assert_close(found[:, 0, :5] * logits.square().sum(1).mean().sqrt(), logits)
    torch.testing.assert_close(found[:, 0, 5:] * features.square().sum(1).mean().sqrt(), features)


def test_tensors_of_any_shape_are_rows_of_their_inputs() -> None:
    shapes = [(6,), (6, 5, 2), (3, 6, 4), (), (7,)]
    parts = {str(number): torch.randn(shape) for number, shape in enumerate(shapes)}
    answer = ChosenOutputs(dict.fromkeys(parts, 2.0))

    class Given(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return parts

    rows = answer(Given(), ones(6, 3))
    assert batch_size(rows) == 6
    assert rows.shape[:2] == (6, 1)
    total = sum(each.square().sum() for each in parts.values())
    torch.testing.assert_close(4 * rows.square().sum(), torch.as_tensor(total))


@pytest.mark.parametrize(
    "form", [lambda x, y: (x, y), lambda x, y: {"a": x, "b": [y, {"c": y[:, None] * 3}]}]
)
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_networks_with_several_outputs_are_calibrated(form: Any, effort: str) -> None:
    model = Net(form)
    _, report = ttcompress.compress(model, calib=IMAGES, **{**OPTIONS, "effort": effort})
    assert report.calibration is not None
    stages = [each["error"] for each in report.calibration["stages"] if each["kept"]]
    assert stages == sorted(stages, reverse=True)
    assert 0 < stages[-1] < 1


@pytest.mark.parametrize(
    ("form", "outputs", "why"),
    [
        (lambda x, y: x.argmax(1), [], "NaN or Inf|gradients|floating"),
        (lambda x, y: (x.argmax(1), 3), [], "nothing that could be compared"),
        (lambda x, y: (x, y / 0), [], "1, which the network returns, is NaN or Inf: name what counts with outputs"),
        (lambda x, y: (x, y), ["boxes"], r"outputs: there is no 'boxes' .* a tuple of 0 \(64, 5\), 1 \(64, 48\)"),
        (lambda x, y: x, ["0"], "the network returns one tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(form: Any, outputs: list[str], why: str) -> None:
    net = Net(form)
    calib = torch.cat([IMAGES] * 8)
    with pytest.raises(DataError, match=why):
        ttcompress.compress(net, calib=calib, outputs=outputs, **{**OPTIONS, "batch_size": 64})


def test_logits_of_a_structure_are_trained() -> None:
    batches = [(IMAGES, LABELS)]
    wanted = ttcompress.finetune(Net(lambda logits, _: logits), batches, epochs=2, lr=0.05, val=batches)

    def by_name(logits: Tensor, features: Tensor) -> Any:
        return {"hidden": features, "logits": logits}

    assert ttcompress.finetune(Net(by_name), batches, epochs=2, lr=0.05, val=batches) == wanted
    taught = ttcompress.finetune(Net(by_name), [IMAGES], teacher=Net(by_name), epochs=1)
    assert taught[-1]["epoch"] == 1
