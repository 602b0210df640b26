"""Plans: what is chosen, what stays and why, and that every number adds up."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import floor, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ttcompress.errors import PlanError, ShapeError
from ttcompress.networks.surgery import apply_plan
from ttcompress.planning.plan_file import adopt_plan, is_made_by, read_plan, write_plan
from ttcompress.planning.planner import make_plan
from ttcompress.planning.selection import find_layers, matches
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.records.plan import CompressionPlan, LayerPlan

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Two convolutions, a grouped one, batch norm and two fully-connected layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.Conv2d(16, 24, 3, bias=False),
            nn.Conv2d(24, 24, 3, groups=2),
        )
        self.body = nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.features(x).mean((2, 3))))  # type: ignore[no-any-return]


def decaying(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights whose singular values fall off, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            for axis, size in enumerate(parameter.shape if parameter.dim() > 1 else ()):
                shape = [-1 if axis == k else 1 for k in range(parameter.dim())]
                values *= (0.9 ** torch.arange(size)).reshape(shape)
            parameter.copy_(values)
    return model


def net() -> nn.Module:
    return decaying(Net())


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kept(plan: CompressionPlan) -> dict[str, str]:
    return {each.name: each.reason for each in plan.kept}


def replaced(plan: CompressionPlan) -> list[str]:
    return [layer.fqn for layer in plan.layers]


def check_totals(model: nn.Module, plan: CompressionPlan) -> None:
    """Every parameter is listed once, and applying the plan gives the count it promises."""
    names = [each.name for each in plan.kept] + [layer.weight_name for layer in plan.layers]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert plan.params_before == counted(model)
    assert all(layer.params_after < layer.params_before for layer in plan.layers)
    apply_plan(model, plan)
    assert plan.params_after == counted(model)
    assert plan.compression == plan.params_before / plan.params_after


def test_by_default_the_first_convolution_and_the_last_linear_stay() -> None:
    plan = make_plan(net(), Recipe(ranks=2, conv_ranks=3))
    assert replaced(plan) == ["features.2", "features.3", "body.0", "body.1"]
    reasons = kept(plan)
    assert reasons["features.0.weight"].startswith("first convolution")
    assert reasons["head.weight"].startswith("last Linear")
    assert reasons["features.1.weight"] == "BatchNorm2d"
    assert reasons["head.bias"] == "bias"
    assert [layer.tensorization.format for layer in plan.layers] == ["chain", "chain", "matrix", "matrix"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("*",), (), ["features.0", "features.2", "features.3", "body.0", "body.1", "head"]),
        (("body*",), (), ["body.0", "body.1"]),
        (("body.*", "head"), ("*.0",), ["body.1", "head"]),
        (("b*1",), (), ["body.1"]),
        (("re:.*[02]",), (), ["features.0", "features.2", "body.0"]),
        (("re:body",), (), None),
        (("re:body.1",), (), ["body.1"]),
        ((), ("body.?",), ["features.2", "features.3"]),
        ((), ("re:features.*",), ["body.0", "body.1"]),
        ((), ("head",), ["features.2", "features.3", "body.0", "body.1"]),
    ],
)
def test_include_replaces_the_candidates_and_exclude_is_subtracted_last(
    include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str] | None
) -> None:
    recipe = Recipe(ranks=1, conv_ranks=1, include=include, exclude=exclude)
    if expected is None:
        with pytest.raises(PlanError, match="matches no weight"):
            make_plan(net(), recipe)
        return
    chosen = [layer.fqn for layer in find_layers(net(), include, exclude, by_hand=True) if not layer.kept]
    assert chosen == expected
    assert set(replaced(make_plan(net(), recipe))) <= set(expected)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "near"), [("bdy.0", "body.0"), ("*feature.2*", "features.2"), ("haed", "head")]
)
def test_a_pattern_that_matches_nothing_names_near_layers(option: str, pattern: str, near: str) -> None:
    with pytest.raises(
        PlanError, match=rf"{re.escape(repr(pattern))} matches no .*near ones: .*{re.escape(near)}"
    ):
        make_plan(net(), Recipe(ranks=2, **{option: (pattern,)}))


@pytest.mark.parametrize(
    ("pattern", "fqn", "expected"), [("a*c", "a.b.c", True), ("A*", "a.b", False), ("re:a", "ab", False)]
)
def test_patterns(pattern: str, fqn: str, expected: bool) -> None:
    assert matches(pattern, fqn) is expected


def test_a_broken_regular_expression() -> None:
    with pytest.raises(PlanError, match="not a regular expression"):
        make_plan(net(), Recipe(ranks=2, include=("re:(",)))


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 24, 3))


def test_depthwise_convolutions_are_an_error_only_when_named() -> None:
    assert replaced(make_plan(depthwise(), Recipe(conv_ranks=2, include=("*",)))) == ["0", "2"]
    with pytest.raises(PlanError, match=r"1 cannot be compressed \(depthwise \(groups=24\)"):
        make_plan(depthwise(), Recipe(conv_ranks=2, include=("1",)))


def attention() -> nn.Module:
    return decaying(
        nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), nn.Linear(32, 4))
    )


def test_attention_takes_tt_form_and_both_of_its_paths_run() -> None:
    model = attention().eval()
    plan = make_plan(model, Recipe(ranks=2))
    attended = ["0.self_attn.in_proj_weight", "0.self_attn.out_proj"]
    assert replaced(plan) == [*attended, "0.linear1", "0.linear2"]
    check_totals(model, plan)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        fast, slow = model.eval()(x), model.train()(x)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.first = nn.Linear(32, 32)
        self.middle = nn.Linear(32, 32, bias=False)
        self.second = self.first if how == "module" else nn.Linear(32, 32)
        self.out = nn.Linear(32, 40, bias=False)
        if how == "weight":
            self.second.weight = self.first.weight
        if how == "embedding":
            self.out.weight = self.embed.weight


@pytest.mark.parametrize(
    ("how", "listed"),
    [
        ("module", ["embed", "first", "middle", "out"]),
        ("weight", ["embed", "first", "middle", "out"]),
        ("embedding", ["embed", "first", "middle", "second"]),
    ],
)
def test_shared_weights_are_decomposed_and_counted_once(how: str, listed: list[str]) -> None:
    model = decaying(Tied(how))
    plan = make_plan(model, Recipe(ranks=2, include=("*",)))
    assert replaced(plan) == listed
    check_totals(model, plan)
    assert torch.equal(model.second.weight, model.first.weight) == (how != "embedding")
    assert torch.equal(model.out.weight, model.embed.weight) == (how == "embedding")


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_stay(norm: Callable[[nn.Module], nn.Module]) -> None:
    layers = [norm(nn.Linear(32, 32)) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(32, 32), nn.Linear(32, 4))
    plan = make_plan(model, Recipe(ranks=2))
    assert replaced(plan) == ["3"]
    assert {layer.kept for layer in find_layers(model)[:3]} == {"weight is computed by a parametrization"}
    check_totals(model, plan)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_goes_on_with_its_own_forward() -> None:
    model = decaying(nn.Sequential(Scaled(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)))
    plan = make_plan(model, Recipe(ranks=2))
    assert replaced(plan) == ["0", "1"]
    apply_plan(model, plan)
    assert isinstance(model[0], Scaled)
    x = torch.randn(3, 32)
    torch.testing.assert_close(model[0](x), 2 * nn.functional.linear(x, model[0].weight, model[0].bias))


def test_a_network_that_is_one_layer_stays() -> None:
    with pytest.raises(
        PlanError, match=r"no layer is left to compress \(the network: it is the whole network"
    ):
        make_plan(nn.Linear(64, 64), Recipe(ranks=2))
    with pytest.raises(PlanError, match=r"only layers that cannot be compressed: .*it is the whole network"):
        make_plan(nn.Linear(64, 64), Recipe(ranks=2, include=("*",)))


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (nn.Sequential(nn.BatchNorm2d(3)), Recipe(ranks=2)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8)), Recipe(ranks=2)),
        (net(), Recipe(ranks=2, exclude=("*",))),
    ],
    ids=["no layers", "only the ends", "all excluded"],
)
def test_nothing_to_compress(model: nn.Module, recipe: Recipe) -> None:
    with pytest.raises(PlanError, match="no layer is left to compress"):
        make_plan(model, recipe)


def test_a_pattern_of_layers_that_cannot_be_compressed() -> None:
    recipe = Recipe(conv_ranks=2, include=("re:1|.*x",))
    with pytest.raises(
        PlanError, match=r"matches only layers that cannot be compressed: 1: depthwise \(groups=24\)"
    ):
        make_plan(depthwise(), recipe)


RECIPES = [
    Recipe(ranks=2),
    Recipe(conv_ranks=3),
    Recipe(ranks=2, conv_ranks=(3, 4)),
    Recipe(ranks=1000, conv_ranks=1000),
    Recipe(ranks=3, format="lowrank"),
    Recipe(eps=0.3),
    Recipe(eps=0.05),
    Recipe(eps=1e-6),
    Recipe(ratio=1.5),
    Recipe(ratio=2.0),
    Recipe(params=6000),
    Recipe(ratio=1.3, layers=(LayerRule("body.1", ranks=2),)),
    Recipe(eps=0.2, layers=(LayerRule("features.2", format="naive"), LayerRule("body.*", format="lowrank"))),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: json.dumps(recipe.to_json()))
def test_every_parameter_is_listed_once_and_applying_gives_the_promised_count(recipe: Recipe) -> None:
    model = net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plan = make_plan(model, recipe)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    check_totals(model, plan)


def test_ranks_by_hand_need_no_weights() -> None:
    with torch.device("meta"):
        model = Net()
    plan, real = (
        make_plan(model, Recipe(ranks=2, conv_ranks=3)),
        make_plan(net(), Recipe(ranks=2, conv_ranks=3)),
    )
    assert plan == real
    with pytest.raises(PlanError, match="need the weights"):
        make_plan(model, Recipe(eps=0.1))


def test_ranks_that_save_nothing_leave_the_layer_dense() -> None:
    plan = make_plan(net(), Recipe(ranks=1000, include=("body.1",)))
    assert plan.layers == ()
    assert "would not be smaller" in kept(plan)["body.1.weight"]


def test_infeasible_ranks_are_clipped_with_a_note() -> None:
    (layer,) = make_plan(net(), Recipe(conv_ranks=(3, 1000), include=("features.2",))).layers
    assert layer.tt_ranks == (1, 3, 24, 1)
    assert "3,1000 clipped to the feasible 3,24" in layer.note


@pytest.mark.parametrize("eps", [0.5, 0.2, 0.05])
def test_eps_is_kept_by_every_layer(eps: float) -> None:
    model = net()
    plan = apply_plan(model, make_plan(model, Recipe(eps=eps)))
    assert plan.layers
    for layer in plan.layers:
        assert layer.relative_error is not None
        assert layer.predicted_error is not None
        assert layer.relative_error <= layer.predicted_error + 1e-7
        assert layer.predicted_error <= eps


@pytest.mark.parametrize("ratio", [1.01, 1.25, 1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_ratio_is_met_within_two_percent(ratio: float, seed: int) -> None:
    model = decaying(
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Linear(64, 96), nn.Linear(96, 10)), seed
    )
    plan = make_plan(model, Recipe(ratio=ratio))
    assert ratio <= plan.compression <= 1.02 * ratio
    assert not any("rank choice" in note for note in plan.notes)
    check_totals(model, plan)


def menu(rows: int, columns: int) -> set[int]:
    return {rank * (rows + columns) for rank in range(1, min(rows, columns) + 1)} | {rows * columns}


@pytest.mark.parametrize("ratio", [1.1, 1.3, 1.5, 1.9, 2.2, 2.6, 2.8, 3.4])
def test_a_ratio_that_no_ranks_meet_gives_the_nearest_above_and_says_so(ratio: float) -> None:
    """Two low-rank layers by brute force: the most parameters that still fit, noted where that is 2 % off."""
    model = decaying(nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 3)))
    plan = make_plan(model, Recipe(ratio=ratio, format="lowrank", exclude=("2",)))
    fixed = 12 + 20 + 63
    totals = [fixed + a + b for a, b in product(menu(12, 16), menu(20, 12))]
    best = max(total for total in totals if counted(model) / total >= ratio)
    if counted(model) / best > 1.02 * ratio:
        assert plan.params_after == best
        assert "no rank choice lies within 2 %" in plan.notes[0]
    else:
        assert ratio <= plan.compression <= 1.02 * ratio
        assert plan.notes == ()


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_a_parameter_budget_is_never_exceeded(share: float) -> None:
    model = net()
    most = floor(share * counted(model))
    plan = make_plan(model, Recipe(params=most))
    assert most / 1.02 <= plan.params_after <= most


def test_ranks_by_hand_count_towards_the_budget() -> None:
    model = net()
    plan = make_plan(model, Recipe(ratio=1.5, layers=(LayerRule("body.1", format="lowrank", ranks=1),)))
    by_name = {layer.fqn: layer for layer in plan.layers}
    assert by_name["body.1"].params_after == 96
    assert 1.5 <= plan.compression <= 1.53


FAR = [
    lambda: decaying(nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30), nn.Linear(30, 7))),
    net,
    lambda: decaying(
        nn.Sequential(nn.Linear(7, 20, bias=False), nn.Linear(20, 20, bias=False), nn.Linear(20, 1))
    ),
    lambda: decaying(nn.Sequential(nn.Linear(1024, 1021, bias=False), nn.Linear(10, 1, bias=False))),
]


def asked_for_too_much(model: nn.Module, **budget: Any) -> tuple[float, int]:
    with pytest.raises(PlanError, match="out of reach") as caught:
        make_plan(model, Recipe(**budget))
    found = re.search(r"can give is ([\d.,]+)x \(([\d,]+) parameters\)", str(caught.value))
    assert found
    return float(found[1].replace(",", "")), int(found[2].replace(",", ""))


@pytest.mark.parametrize("make", FAR)
def test_out_of_reach_names_a_budget_that_can_be_reached(make: Callable[[], nn.Module]) -> None:
    model = make()
    ratio, params = asked_for_too_much(model, ratio=1e9)
    assert asked_for_too_much(model, params=1) == (ratio, params)
    assert make_plan(model, Recipe(ratio=ratio)).compression >= ratio
    assert make_plan(model, Recipe(params=params)).params_after == params
    asked_for_too_much(model, params=params - 1)
    asked_for_too_much(model, ratio=ratio * 1.11 + 1)


@pytest.mark.parametrize(("rows", "columns"), [(20, 20), (48, 16), (60, 12), (33, 22), (36, 18), (99, 11)])
def test_a_reachable_ratio_of_one_decimal_is_reachable_exactly(rows: int, columns: int) -> None:
    """rows * columns / (rows + columns) and its like must not be lost to rounding of floats."""
    rest = nn.Linear(1, 1, bias=False)
    model = decaying(nn.Sequential(nn.Linear(columns, rows, bias=False), rest))
    dense, least = rows * columns + 1, rows + columns + 1
    for extra in range(100):
        total, left = dense + extra, least + extra
        if 10 * total % left:
            continue
        model.register_parameter("extra", nn.Parameter(torch.zeros(extra)))
        ratio = float(f"{total / left:.1f}")
        plan = make_plan(model, Recipe(ratio=ratio, format="lowrank"))
        assert (plan.params_after, plan.compression) == (left, ratio)


@pytest.mark.parametrize("above", [0, 1, 10**9])
def test_a_budget_that_asks_for_nothing(above: int) -> None:
    model = net()
    with pytest.raises(PlanError, match="asks for nothing"):
        make_plan(model, Recipe(params=counted(model) + above))
    assert make_plan(model, Recipe(params=counted(model) - 1)).params_after < counted(model)


def test_rules_name_their_own_layers_formats_and_ranks() -> None:
    rules = (
        LayerRule("features.2", format="naive", ranks=(3, 9, 16)),
        LayerRule("body.*", format="lowrank", ranks=5),
        LayerRule("body.1", in_modes=(6, 8), out_modes=(8, 6), ranks=2),
    )
    plan = make_plan(net(), Recipe(layers=rules))
    by_name = {layer.fqn: layer for layer in plan.layers}
    assert replaced(plan) == ["features.2", "body.0", "body.1"]
    assert by_name["features.2"].tensorization.format == "naive"
    assert by_name["features.2"].tt_ranks == (1, 3, 9, 16, 1)
    assert by_name["body.0"].params_after == 5 * (24 + 48)
    assert by_name["body.1"].tensorization.in_modes == (6, 8)
    assert by_name["body.1"].tensorization.out_modes == (8, 6)
    assert by_name["body.1"].params_after == 2 * 2 * 48


def test_a_rule_that_matches_nothing() -> None:
    with pytest.raises(PlanError, match=r"'bod' matches no .*body\.0"):
        make_plan(net(), Recipe(layers=(LayerRule("bod", ranks=2),)))


def test_a_rule_for_a_layer_that_stays_dense_is_not_passed_over_in_silence() -> None:
    with pytest.raises(PlanError, match=r"'head' matches only layers that stay dense \(head: last Linear"):
        make_plan(net(), Recipe(ratio=1.5, layers=(LayerRule("head", ranks=2),)))


def test_eps_below_what_the_weights_can_carry() -> None:
    with pytest.raises(PlanError, match="at least 1e-06 for the float32 weights"):
        make_plan(net(), Recipe(eps=1e-7))
    assert make_plan(decaying(net().double()), Recipe(eps=1e-7)).params_after > 0


def test_modes_by_hand_fit_one_layer() -> None:
    modes: dict[str, Any] = {"in_modes": (6, 8), "out_modes": (6, 8)}
    (layer,) = make_plan(net(), Recipe(ranks=2, include=("body.1",), **modes)).layers
    assert layer.tensorization.in_modes == (6, 8)
    with pytest.raises(PlanError, match="fit one layer, 2 are selected"):
        make_plan(net(), Recipe(ranks=2, include=("body.*",), **modes))
    with pytest.raises(ShapeError, match=r"body\.0 \(48, 24\): in_modes 6,8 multiply to 48"):
        make_plan(net(), Recipe(ranks=2, include=("body.0",), **modes))


def test_ranks_that_do_not_fit_name_the_layer() -> None:
    with pytest.raises(ShapeError, match=r"features\.2: 3 modes take 2 inner TT-ranks"):
        make_plan(net(), Recipe(conv_ranks=(2, 2, 2)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(bad: float) -> None:
    model = net()
    model.body[1].weight.data[3, 4] = bad  # type: ignore[index, union-attr]
    with pytest.raises(ShapeError, match=r"body\.1: .*NaN or Inf"):
        make_plan(model, Recipe(eps=0.1))
    with pytest.raises(ShapeError, match=r"body\.1: .*NaN or Inf"):
        apply_plan(model, make_plan(model, Recipe(ranks=2)))


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    data = json.loads(path.read_text())
    entry = next(entry for entry in data["layers"] if entry["fqn"] == "body.1")
    edit(entry)
    data["layers"] = [each for each in data["layers"] if each is entry or each["fqn"] != entry["fqn"]]
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    write_plan(tmp_path / "plan.json", make_plan(net(), Recipe(eps=0.2)))
    return tmp_path / "plan.json"


def test_a_plan_comes_back_as_it_was_written(plan_file: Path) -> None:
    plan, back = make_plan(net(), Recipe(eps=0.2)), read_plan(plan_file)
    assert back.layers == plan.layers
    assert sorted(back.kept, key=str) == sorted(plan.kept, key=str)
    assert (back.params_before, back.params_after) == (plan.params_before, plan.params_after)
    assert json.loads(plan_file.read_text())["params_after"] == plan.params_after


def test_an_edited_plan_is_recounted_and_its_old_errors_are_forgotten(plan_file: Path) -> None:
    model = net()
    inner = len(read_plan(plan_file).layers[-1].tensorization.modes) - 1
    plan = adopt_plan(
        model, Recipe(), read_plan(edited(plan_file, lambda entry: entry.update(tt_ranks=[1] * inner)))
    )
    (layer,) = (layer for layer in plan.layers if layer.fqn == "body.1")
    assert set(layer.tt_ranks) == {1}
    assert layer.params_after == sum(prod(mode) for mode in layer.tensorization.modes)
    assert layer.predicted_error is None
    check_totals(model, plan)


def test_ranks_edited_beyond_the_feasible_are_clipped(plan_file: Path) -> None:
    modes = {"out_modes": [1, 48], "in_modes": [48, 1], "window_modes": [1, 1], "format": "lowrank"}
    plan = read_plan(edited(plan_file, lambda entry: entry.update(modes, tt_ranks=[1, 99, 1])))
    with pytest.raises(PlanError, match=r"body\.1: 4,608 parameters in TT form, 2,304 dense"):
        adopt_plan(net(), Recipe(), plan)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (
            lambda entry: entry.update(tt_ranks=[1, 2, 2, 2, 2, 2, 2, 1]),
            PlanError,
            r"layers\[\d\]: .* inner TT-ranks",
        ),
        (
            lambda entry: entry.update(tt_ranks=[0]),
            PlanError,
            r"tt_ranks\[0\] must be a whole number from 1, not 0",
        ),
        (
            lambda entry: entry.update(out_modes=[2, 2], in_modes=[2, 2], window_modes=[1, 1]),
            PlanError,
            r"body\.1: out_modes",
        ),
        (lambda entry: entry.pop("spec"), PlanError, r"layers\[\d\]\.spec is missing"),
        (lambda entry: entry.update(in_modes=[48]), PlanError, "differ in length"),
        (lambda entry: entry.update(format="tucker"), PlanError, "unknown format"),
        (lambda entry: entry.update(fqn="body.7"), PlanError, r"body\.7.* matches no"),
        (lambda entry: entry.update(fqn="features.3"), PlanError, "another shape or geometry"),
        (lambda entry: entry.update(fqn="body.0"), PlanError, "does not fit this network"),
    ],
)
def test_a_plan_edited_wrongly(
    plan_file: Path, edit: Callable[[dict[str, Any]], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply_plan(net(), adopt_plan(net(), Recipe(), read_plan(edited(plan_file, edit))))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "ttcompress-plan/2"}'])
def test_files_that_are_no_plans(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match=r"not a (readable )?plan"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="missing"):
        read_plan(tmp_path / "missing.json")


def test_a_plan_beside_another_target(plan_file: Path) -> None:
    with pytest.raises(PlanError, match="--plan states everything"):
        adopt_plan(net(), Recipe(eps=0.1), read_plan(plan_file))


def test_a_plan_made_for_another_network(plan_file: Path) -> None:
    other = Net()
    other.head = nn.Linear(48, 11)
    with pytest.raises(PlanError, match=r"the plan lists .* parameters, the network has"):
        apply_plan(other, adopt_plan(other, Recipe(), read_plan(plan_file)))


def test_a_plan_takes_the_type_of_the_weights_at_hand(plan_file: Path) -> None:
    """As one that was made without weights, for a network in half precision."""
    plan = adopt_plan(net().half(), Recipe(), read_plan(plan_file))
    assert {layer.weight_dtype for layer in plan.layers} == {"float16"}


def test_a_plan_is_known_again_in_what_was_done(plan_file: Path) -> None:
    """With its TT-ranks clipped; one lower rank is another plan."""
    given = read_plan(plan_file)
    wide = given.with_layers(
        [replace(layer, tt_ranks=(1, *[999] * (len(layer.tt_ranks) - 2), 1)) for layer in given.layers]
    )
    low = given.with_layers([replace(layer, tt_ranks=(1,) * len(layer.tt_ranks)) for layer in given.layers])
    done = adopt_plan(net(), Recipe(), given)
    assert is_made_by(done, given)
    assert not is_made_by(done, low)
    assert not is_made_by(done, given.with_layers(given.layers[1:]))
    assert is_made_by(
        wide.with_layers([replace(layer, tt_ranks=feasible(layer)) for layer in wide.layers]), wide
    )


def feasible(layer: LayerPlan) -> tuple[int, ...]:
    """The largest TT-ranks of a layer: at each cut the smaller side."""
    sizes = layer.tensorization.sizes
    return tuple(min(prod(sizes[:cut]), prod(sizes[cut:])) for cut in range(len(sizes) + 1))


def test_layers_with_hooks_stay_the_objects_that_they_are() -> None:
    """Another layer would not run them."""
    model = net()
    hooked = model.body[1]
    hooked.register_forward_hook(lambda module, given, output: 2 * output)
    plan = make_plan(model, Recipe(ranks=2))
    assert {layer.fqn: layer.spec.kind for layer in plan.layers}["body.1"] == "weight"
    apply_plan(model, plan)
    assert model.body[1] is hooked
    x = torch.randn(3, 48)
    torch.testing.assert_close(hooked(x), 2 * nn.functional.linear(x, hooked.weight, hooked.bias))
