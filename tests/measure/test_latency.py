"""The search for a latency on made-up clocks, and choices of ways to run; what is really timed has no say here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ttcompress
from ttcompress.errors import DataError, PlanError
from ttcompress.measure import latency, timing
from ttcompress.measure.latency import TimedNetwork, within_latency
from ttcompress.measure.timing import Timings
from ttcompress.networks.running import Example
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json
from ttcompress.records.plan import CompressionPlan

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.Flatten(),
        nn.Linear(32 * 16, 40),
        nn.Linear(40, 5),
    )


def plan_of(**options: Any) -> CompressionPlan:
    return make_plan(network(), Recipe(**options))


class Clock:
    """A bed on which a plan for a ratio of r runs speed(r) times as fast, by what `off` says of the n-th reading."""

    def __init__(self, speed: Any, off: Any = lambda reading, share: 0.0) -> None:
        self.speed, self.off, self.readings = speed, off, 0

    def latency(self, plan: CompressionPlan, share: float) -> Json:
        self.readings += 1
        ratio = self.speed(float(plan.notes[0])) + self.off(self.readings, share)
        return {"dense": 1.0, "compressed": 1 / ratio, "ratio": ratio, "device": "clock"}


def plan_at(ratio: float) -> CompressionPlan:
    return CompressionPlan((), plan_of(ranks=2).kept, (str(ratio),))


def test_the_mildest_plan_that_is_fast_enough() -> None:
    clock = Clock(lambda ratio: ratio**0.5)
    found = within_latency(2.0, plan_at, 20.0, clock)  # type: ignore[arg-type]
    assert 4.0 <= float(found.notes[0]) <= 4.0 * latency.SEARCH_STEP**2
    assert found.latency is not None
    assert found.latency["asked"] == 2.0 <= found.latency["ratio"]
    assert clock.readings < 40


def test_short_readings_that_are_too_good_are_not_believed() -> None:
    clock = Clock(lambda ratio: ratio**0.5, lambda _, share: 0.2 if share < 1 else 0.0)
    found = within_latency(2.0, plan_at, 20.0, clock)  # type: ignore[arg-type]
    assert float(found.notes[0]) >= 4.0
    assert found.latency is not None
    assert found.latency["ratio"] >= 2.0


def test_a_latency_out_of_reach_names_the_most_that_was_measured() -> None:
    with pytest.raises(PlanError, match=r"out of reach: the most that was measured is 1\.50x"):
        within_latency(2.0, plan_at, 20.0, Clock(lambda ratio: min(1.5, ratio)))  # type: ignore[arg-type]


def test_a_network_that_no_tt_form_makes_faster() -> None:
    small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(PlanError, match="no TT form of a layer is faster"):
        ttcompress.compress(small, latency_ratio=1.5, input_size=(3, 8, 8))


def test_ways_to_run_are_fixed_where_one_wins_at_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(ranks=2, conv_ranks=3)
    bed = TimedNetwork(network(), Example((3, 8, 8)), torch.device("cpu"))
    # Factored over dense: conv2 at batch 1, linear at batch 1, then both at batch 32.
    ratios = iter([0.5, 2.0, 0.6, 0.9])
    monkeypatch.setattr(latency, "by_turns", lambda *given: Timings([1.0], [next(ratios)]))
    tuned = bed.tuned(plan)
    assert {layer.fqn: layer.execution for layer in tuned.layers} == {"2": "chain", "4": "auto"}
    ratios = iter([1.01, 2.0, 1.01, 1.5])
    tuned = bed.tuned(plan)
    assert {layer.fqn: layer.execution for layer in tuned.layers} == {"2": "auto", "4": "dense"}


def test_the_bed_leaves_the_network_alone_and_needs_no_values() -> None:
    plan = plan_of(ranks=2, conv_ranks=3)
    with torch.device("meta"):
        empty = network()
    for model in (network(), empty):
        bed = TimedNetwork(model, Example((3, 8, 8)), torch.device("cpu"))
        measured = bed.latency(plan, 1.0)
        assert measured["dense"] > 0 < measured["compressed"]
        assert bed.tuned(plan).params_after == plan.params_after
        assert isinstance(model[4], nn.Linear)
    with pytest.raises(DataError, match="does not take"):
        TimedNetwork(network(), Example((3, 9, 9)), torch.device("cpu"))


def test_a_network_whose_layers_are_far_too_wide_meets_its_latency() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(6)), nn.Linear(1024, 10))
    model, report = ttcompress.compress(wide, latency_ratio=1.2, input_size=(1024,), format="lowrank")
    assert report.plan.latency is not None
    assert report.plan.latency["ratio"] >= 1.2
    assert report.recipe["latency_ratio"] == 1.2
    assert not report.plan.notes
    assert isinstance(model[1], ttcompress.TTLinear)
