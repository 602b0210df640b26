"""The predicted curve against plans: it is what they would come to."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.planning.planner import Planner
from ttcompress.planning.prediction import POINTS, drawn_layer
from ttcompress.recipe import Recipe
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.decompose import frobenius_norm, squared_spectra

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 96), nn.Linear(96, 48), nn.Linear(48, 4))
    for layer, decay in zip(net, (1.0, 2.0, 0.3, 1.0), strict=True):
        u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)  # type: ignore[operator]
        layer.weight.data = u @ torch.diag(s * torch.arange(1, len(s) + 1) ** -decay) @ v  # type: ignore[union-attr]
    return net


def relative_error(net: nn.Module, plans: tuple[LayerPlan, ...], names: list[str]) -> float:
    """By the bounds of a plan, over all weights that could be replaced."""
    norms = {name: frobenius_norm(net.get_submodule(name).weight) for name in names}  # type: ignore[arg-type]
    missed = sum((float(plan.predicted_error or 0) * norms[plan.fqn]) ** 2 for plan in plans)
    return float((missed / sum(norm**2 for norm in norms.values())) ** 0.5)


def test_plans_lie_on_the_curve() -> None:
    net = network()
    planner = Planner(net, Recipe(ratio=2.0))
    for ratio in (1.3, 2.0, 3.5, 6.0):
        plan = planner.plan(Recipe(ratio=ratio))
        prediction = planner.prediction(plan)
        assert prediction is not None
        points = prediction["points"]
        error = relative_error(net, plan.layers, list(planner.specs))
        # A plan that is smaller than a point has no less error: points are the best of their size.
        assert error >= 0.98 * max(e for x, e in points if x <= plan.compression)


def test_the_curve_rises_from_nothing_in_some_thirty_points() -> None:
    planner = Planner(network(), Recipe(ratio=2.0))
    prediction = planner.prediction(planner.plan(Recipe(ratio=2.0)))
    assert prediction is not None
    points = prediction["points"]
    assert 10 < len(points) <= POINTS
    assert points == sorted(points)
    assert [error for _, error in points] == sorted(error for _, error in points)
    assert points[0] == [1.0, 0.0]
    assert points[-1][0] == pytest.approx(planner.most(), rel=1e-3)


def test_shares_are_those_of_the_errors_and_add_up() -> None:
    net = network()
    planner = Planner(net, Recipe(ratio=3.0))
    plan = planner.plan(Recipe(ratio=3.0))
    shares = (planner.prediction(plan) or {})["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    squared = {
        layer.fqn: (float(layer.predicted_error or 0) * frobenius_norm(net.get_submodule(layer.fqn).weight))
        ** 2  # type: ignore[arg-type]
        for layer in plan.layers
    }
    for fqn, error in squared.items():
        assert shares[fqn] == pytest.approx(error / sum(squared.values()), rel=1e-3)


def test_without_spectra_there_is_no_curve() -> None:
    planner = Planner(network(), Recipe(ranks=3))
    assert planner.prediction(planner.plan(Recipe(ranks=3))) is None


def test_a_file_keeps_the_curve_where_it_takes_two_percent_at_most() -> None:
    _, large = ttcompress.compress(nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))), ratio=2)
    assert large.prediction is not None
    assert ttcompress.Report.from_json(large.to_json()).prediction == large.prediction
    _, small = ttcompress.compress(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2)), ratio=2)
    assert small.prediction is None
    for report in (large, small):
        size = len(json.dumps(report.prediction)) if report.prediction else 0
        assert size <= 0.03 * report.bytes_after


def test_equal_runs_predict_equally() -> None:
    nets = [nn.Sequential(*(nn.Linear(256, 256) for _ in range(3))) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    first, second = (ttcompress.compress(net, ratio=2)[1] for net in nets)
    assert first.prediction == second.prediction


@pytest.mark.parametrize("size", [5, 300])
def test_drawn_singular_values_are_those_of_the_cut(size: int) -> None:
    weight: Tensor = torch.randn(size, size, dtype=torch.float64)
    _, report = ttcompress.compress(
        nn.Sequential(nn.Linear(size, size), nn.Linear(size, 2)), ranks=2, format="lowrank"
    )
    (plan,) = report.layers
    (cut,) = drawn_layer(plan, squared_spectra(weight, plan.tensorization))["cuts"]
    exact = torch.linalg.svdvals(weight)
    assert (cut["rank"], cut["size"]) == (2, size)
    assert {1, 2, size} <= set(cut["places"])
    assert len(cut["places"]) <= 50
    for place, value in zip(cut["places"], cut["values"], strict=True):
        assert value == pytest.approx(float(exact[place - 1] / exact[0]), rel=1e-3)
