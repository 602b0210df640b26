"""What plans say of themselves: warnings, what cannot be compressed and why, and what would help."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import ttcompress
from ttcompress.errors import PlanError
from ttcompress.planning.doubts import find_normed_layers
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.common import WARNING
from ttcompress.records.plan import CompressionPlan

pytestmark = pytest.mark.usefixtures("one_thread")


def warnings_of(plan: CompressionPlan) -> list[str]:
    return [note for note in plan.notes if note.startswith(WARNING)]


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


class Recurrent(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.norm, self.core, self.out = nn.LayerNorm((500, 32)), core, nn.Linear(32, 64)


# ----------------------------------------------------------------------------------------------- what cannot be reached


@pytest.mark.parametrize(
    ("core", "kind", "count"),
    [
        (nn.Conv2d(512, 512, 3, groups=512), "Conv2d with groups", 5_120),
        (parametrizations.weight_norm(nn.Linear(32, 64)), "Linear whose weight is computed", 2_176),
        (spectral_norm(nn.Linear(32, 64)), "Linear whose weight is computed", 2_112),
    ],
)
def test_what_holds_the_parameters_is_said_in_plans_and_errors(
    core: nn.Module, kind: str, count: int
) -> None:
    net = Recurrent(core)
    (note,) = ttcompress.plan(net, ranks=2, include=["out"]).notes
    assert "% of the parameters cannot be compressed here: LayerNorm 32,000" in note
    assert f"{kind} {count:,}" in note
    for options in ({"ratio": 40, "include": ["*"]}, {"ratio": 2, "exclude": ["*"]}):
        with pytest.raises(PlanError, match=f"{kind} {count:,}"):
            ttcompress.plan(net, **options)  # type: ignore[arg-type]


def test_a_network_that_can_be_compressed_is_not_lectured() -> None:
    assert ttcompress.plan(mlp(64, 64, 64, 10), ratio=1.3).notes == ()


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (parametrizations.spectral_norm, "Linear, weight is computed by a parametrization"),
        (parametrizations.weight_norm, "Linear, weight is computed by a parametrization"),
        (parametrizations.orthogonal, "Linear, weight is computed by a parametrization"),
        (spectral_norm, "Linear"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "Linear"),
        (lambda layer: prune.random_structured(layer, "weight", 0.25, dim=0), "Linear"),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_layer_whose_weight_is_computed_stays_dense_under_its_own_name(
    wrap: Callable[[nn.Module], nn.Module], reason: str, calibrated: bool
) -> None:
    net = mlp(32, 48, 48, 10)
    wrap(net[0])
    net(torch.ones(2, 32))  # Old ones leave a tensor with a history behind.
    options: dict[str, Any] = {"calib": torch.randn(64, 32), "effort": "default"} if calibrated else {}
    small, report = ttcompress.compress(net, ratio=1.2, include=["1", "2"], **options)
    kept = {
        each.reason for each in report.plan.kept if each.name.startswith("0.") and "bias" not in each.name
    }
    assert kept == {reason}
    assert small.eval()(torch.ones(2, 32)).isfinite().all()
    with pytest.raises(PlanError, match="0 cannot be compressed \\(weight is computed"):
        ttcompress.plan(net, ratio=1.2, include=["0"])


def test_every_layer_that_cannot_be_chosen_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), parametrizations.weight_norm(nn.Linear(8, 8))
    )
    with pytest.raises(PlanError, match=r"0: depthwise .*; 2: weight is computed by a parametrization"):
        ttcompress.plan(net, ratio=2)
    with pytest.raises(PlanError, match=r"include \* matches only layers that cannot be compressed: 0: de"):
        ttcompress.plan(net, ratio=2, include=["*"])
    with pytest.raises(
        PlanError, match=r"'1' matches no weight that could be compressed, only 1 \(Flatten\)"
    ):
        ttcompress.plan(net, ratio=2, include=["1"])
    with pytest.raises(PlanError, match="has no weight of two dimensions"):
        ttcompress.plan(nn.Sequential(nn.LayerNorm(8)), ratio=2)


# ------------------------------------------------------------------------------------------------------------- include


def test_plus_adds_to_the_default() -> None:
    net = mlp(64, 64, 64, 32)

    def chosen(**options: Any) -> list[str]:
        return [layer.fqn for layer in ttcompress.plan(net, ranks=2, **options).layers]

    assert chosen() == ["0", "1"]
    assert chosen(include=["+2"]) == ["0", "1", "2"]
    assert chosen(include=["+re:[2]"], exclude=["0"]) == ["1", "2"]
    assert chosen(include=["0", "+2"]) == ["0", "2"]
    with pytest.raises(PlanError, match="pattern 'nine' matches no"):
        chosen(include=["+nine"])


def test_out_of_reach_says_what_including_more_would_give() -> None:
    net = mlp(640, 640, 32)
    with pytest.raises(
        PlanError, match=r"is [\d.]+x \(.*include \+1 would let the parameters reach"
    ) as caught:
        ttcompress.plan(net, ratio=25)
    reach = float(str(caught.value).rsplit("reach ", 1)[1].removesuffix("x"))
    assert reach <= ttcompress.plan(net, ratio=reach, include=["+1"]).compression
    named = float(str(caught.value).split("can give is ")[1].split("x")[0])
    assert ttcompress.plan(net, ratio=named).compression >= named


class Backwards(nn.Module):
    """Runs its layers in the order opposite to that of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.middle, self.first = nn.Linear(400, 10), nn.Linear(400, 400), nn.Linear(16, 400)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.first(x)).relu())
        return out


def test_the_last_linear_is_the_last_that_runs_where_an_input_is_at_hand() -> None:
    def left_out(**options: Any) -> list[str]:
        kept = ttcompress.plan(Backwards(), **options).kept
        return [each.name for each in kept if each.reason.startswith("last Linear")]

    assert left_out(ratio=1.3) == ["first.weight"]
    assert left_out(ratio=1.3, calib=torch.randn(64, 16)) == ["head.weight"]
    assert left_out(macs_ratio=1.3, input_size=(16,)) == ["head.weight"]
    assert left_out(ratio=1.3, example=torch.randn(1, 16)) == ["head.weight"]
    # What it does not take says nothing.
    assert left_out(ratio=1.3, example=torch.randn(1, 5)) == ["first.weight"]


# ------------------------------------------------------------------------------------------------------------ warnings


def normed(width: int = 32, depth: int = 4, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3)]
    for number in range(depth):
        conv = nn.Conv2d(width, width, 3, bias=False)
        conv.weight.data *= scale if number % 2 else 1.0
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def test_layers_under_a_batch_norm_are_those_that_it_follows() -> None:
    assert find_normed_layers(normed(depth=2)) == ["1", "4"]
    apart = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Linear(8, 4), nn.BatchNorm1d(4)
    )
    assert find_normed_layers(apart) == ["3"]
    assert find_normed_layers(mlp(8, 8)) == []


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
def test_much_lost_under_batch_norms_is_warned_of_and_little_is_not(scale: float) -> None:
    net = normed(scale=scale)
    much = warnings_of(ttcompress.plan(net, ratio=3))
    assert any("a batch norm follows" in note and "--calib" in note for note in much)
    assert warnings_of(ttcompress.plan(net, eps=0.3)) == []
    assert warnings_of(ttcompress.compress(net, ratio=3)[1].plan) != []


@pytest.mark.parametrize(
    ("build", "ratio"),
    [(lambda: mlp(64, 64, 64, 64, 10), 6), (normed, 30), (lambda: mlp(96, 64, 96, 10), 25)],
)
def test_a_layer_that_keeps_under_a_fifth_of_its_norm_is_warned_of(
    build: Callable[[], nn.Module], ratio: int
) -> None:
    plan = ttcompress.plan(build(), ratio=ratio, include=["*"])
    worst = [layer.fqn for layer in plan.layers if (layer.predicted_error or 0) > 0.98]
    faded = [note for note in warnings_of(plan) if "under a fifth" in note]
    assert bool(worst) == bool(faded)
    assert worst
    assert worst[0] in faded[0]
    assert "compress less" in faded[0]
    assert all((layer.predicted_error or 0) <= 1 for layer in plan.layers)


def test_what_is_left_out_by_default_is_offered_and_a_plan_is_warned_of_once() -> None:
    net = mlp(256, 256, 256, 24)
    plan = ttcompress.plan(net, ratio=17)
    assert any("--include +2 (6,144 of" in note for note in warnings_of(plan))
    done = ttcompress.compress(net, plan=plan)[1].plan
    assert len(warnings_of(done)) == len(warnings_of(plan)) == 1


# ---------------------------------------------------------------------------------------------------- TT-ranks by hand


@pytest.mark.parametrize(("rows", "columns", "rank"), [(256, 256, 4), (512, 128, 3), (128, 384, 6)])
def test_ranks_by_hand_that_lose_everything_name_the_format_that_does_not(
    rows: int, columns: int, rank: int
) -> None:
    torch.manual_seed(rank)
    layer = nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, rank) @ torch.randn(rank, columns)
    net = nn.Sequential(layer, nn.ReLU())
    poor = ttcompress.compress(net, ranks=rank, include=["0"])[1].plan.layers[0]
    assert poor.relative_error is not None
    assert poor.relative_error > 0.9
    assert f"format lowrank with TT-ranks {rank} would miss at most 0.0000" in poor.note
    good = ttcompress.compress(net, ranks=rank, format="lowrank", include=["0"])[1].plan.layers[0]
    assert good.note == ""
    assert f"{good.params_after:,} parameters" in poor.note


def test_noise_has_no_better_format_and_searched_ranks_have_no_note() -> None:
    noise = mlp(64, 64, 10)
    assert [layer.note for layer in ttcompress.compress(noise, ranks=1)[1].plan.layers] == [""]
    assert make_plan(noise, Recipe(ratio=1.2)).layers[0].note == ""
