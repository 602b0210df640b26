"""How many inputs are under way at a time: sizes counted by hand, and results that do not depend on the cut."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress import runtime
from ttcompress.calibrate import room
from ttcompress.calibrate.room import Room, numbers_of, room_for

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = torch.randn(384, 24, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 5))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def test_what_waits_for_the_way_back_is_counted() -> None:
    found = room_for(mlp(), [VECTORS[:8]])
    # The input, both outputs of Tanh and what goes into them; outputs of layers: 48 four times, and 5.
    assert found is not None
    assert found.with_gradients == 4 * (4 * 48 + 5)
    assert found.without == room.IN_PASSING * 4 * 48
    assert found.numbers == 24


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_what_is_counted_stays(fails: bool) -> None:
    """The pass leaves a graph with tensors of every layer, which nobody goes back through."""
    model, seen = mlp(), []
    model[3].register_forward_hook(lambda module, given, output: seen.append(weakref.ref(output)))
    if fails:
        model[4].register_forward_hook(lambda module, given, output: output.view(7, -1))
    assert (room_for(model, [VECTORS[:8]]) is None) == fails
    gc.collect()
    assert [each() for each in seen] == [None]


def test_the_largest_input_is_measured() -> None:
    found = room_for(
        nn.Sequential(nn.Linear(8, 8)), [torch.randn(2, 3, 8), torch.randn(2, 9, 8), torch.randn(2, 1, 8)]
    )
    assert found is not None
    assert found.numbers == 72


def test_networks_that_take_no_few_inputs_are_not_cut() -> None:
    class Fixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).reshape(32, 5)

    assert room_for(Fixed(24, 5), [VECTORS[:32]]) is None


@pytest.mark.parametrize("size", [1, 2, 7, 32, 33])
@pytest.mark.parametrize("most", [1, 3, 32, 100])
def test_pieces_are_the_batch_in_order(size: int, most: int) -> None:
    batch = {"x": torch.arange(size)[:, None] * torch.ones(size, 4), "more": (torch.arange(size),)}
    at = Room(with_gradients=10, without=1, numbers=4, budget=10 * most)
    pieces = at.pieces(batch)
    assert torch.equal(torch.cat([each["more"][0] for each in pieces]), torch.arange(size))
    sizes = [len(each["x"]) for each in pieces]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert len(at.pieces(batch, gradients=False)) == -(-size // (10 * most))


def test_longer_inputs_come_in_smaller_pieces() -> None:
    at = Room(with_gradients=10, without=10, numbers=6, budget=160)
    assert [at.most(torch.ones(50, length)) for length in (1, 6, 12, 24, 240)] == [16, 16, 4, 1, 1]
    assert numbers_of({"a": torch.ones(3, 2), "b": torch.ones(3, 5, 2)}) == 10


@pytest.mark.parametrize("build", [mlp, convolutions])
def test_results_hardly_depend_on_the_cut(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics but for the random projections, sweeps, errors and refinement: of the same images in the same batches."""
    inputs = VECTORS if build is mlp else IMAGES
    options: dict[str, Any] = {
        "ratio": 1.5,
        "include": ["*"],
        "calib": inputs,
        "batch_size": 32,
        "effort": "default",
    }
    monkeypatch.setattr("ttcompress.calibrate.stages.EFFORTS", {"default": ttcompress_effort(20)})
    whole, wanted = ttcompress.compress(build(), **options)
    assert wanted.calibration is not None
    assert "at_a_time" not in wanted.calibration

    monkeypatch.setattr(
        room, "BUDGET", 5 * (room_for(build(), [inputs[:8]]) or Room(1, 1, 1, 1)).with_gradients
    )
    cut, found = ttcompress.compress(build(), **options)
    again, _ = ttcompress.compress(build(), **options)
    assert found.calibration is not None
    assert found.calibration["at_a_time"] == 5
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in cut.state_dict().items())

    # Whether a stage is kept may hang on little, what comes out in the end does not.
    least = [
        min(each["error"] for each in (report.calibration or {})["stages"]) for report in (found, wanted)
    ]
    assert least[0] == pytest.approx(least[1], rel=0.25)
    x = inputs[:20]
    close = (cut.eval()(x) - whole.eval()(x)).norm() / whole(x).norm()
    assert float(close.detach()) < 0.1


def ttcompress_effort(steps: int) -> Any:
    from ttcompress.calibrate.stages import Effort

    return Effort(1, steps, 0)


def test_gradients_of_pieces_add_up_to_those_of_the_batch() -> None:
    from ttcompress.calibrate.natural_gradient import gradients_of_error
    from ttcompress.networks.answers import plain_answer

    one, target = mlp().double(), torch.randn(32, 5).double()
    other, x = deepcopy(one), VECTORS[:32].double()
    whole, _ = gradients_of_error(one, plain_answer, [(x, target)])
    ends = [0, 7, 20, 32]
    pieces = [(x[a:b], target[a:b]) for a, b in pairwise(ends)]
    parts, outputs = gradients_of_error(other, plain_answer, pieces)
    assert parts == pytest.approx(whole)
    torch.testing.assert_close(torch.cat(outputs), one(x).detach())
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


# --------------------------------------------------------------------------------------------------------------- thrift


@pytest.fixture
def heap(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is set of the heap."""
    settings: list[tuple[int, int]] = []
    monkeypatch.setattr(runtime, "_set_heap", lambda *given: settings.append(given))
    return settings


def test_memory_is_given_back_at_once_where_layers_are_large(heap: list[tuple[int, int]]) -> None:
    with room.thrift([room.MOMENT_BYTES]):
        assert not heap
    with room.thrift([room.MOMENT_BYTES, 1]):
        assert len(heap) == 1


def test_memory_is_given_back_at_once_until_the_outermost_ends(heap: list[tuple[int, int]]) -> None:
    with runtime.freed_at_once():
        with pytest.raises(KeyError), runtime.freed_at_once():
            raise KeyError
        assert len(set(heap)) == 1
    assert len(set(heap)) == 2
    with runtime.freed_at_once():
        assert heap[-1] == heap[0]
    assert heap[-1] != heap[0]
