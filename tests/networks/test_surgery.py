"""Applying a plan: the weights that were promised, in the right places, and nothing else touched."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ttcompress.errors import PlanError, ShapeError
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.surgery import apply_plan, check_plan, insert_empty
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.tt.shapes import FORMATS, feasible_ranks, tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 10, (3, 2), 2, 1, bias=False), nn.ReLU()),
        nn.Conv2d(10, 12, 1, padding_mode="circular", padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 37),
        nn.Linear(37, 5),
    )


def plan_at_full_rank(model: nn.Sequential, linear: str, conv: str) -> CompressionPlan:
    """Every layer at its largest ranks, which no planner would choose since it saves nothing."""
    layers = []
    for layer in make_plan(model, Recipe(ranks=1, conv_ranks=1, include=("*",))).layers:
        tensorization = tensorize_shape(
            linear if layer.spec.kind == "linear" else conv, layer.spec.weight_shape
        )
        ranks = tensorization.max_ranks()
        layers.append(LayerPlan(layer.fqn, layer.spec, tensorization, ranks, layer.weight_dtype))
    names = {f"{layer.fqn}.weight" for layer in layers}
    kept = [KeptParameter(name, p.numel(), "") for name, p in model.named_parameters() if name not in names]
    return CompressionPlan(tuple(layers), tuple(kept))


@pytest.mark.parametrize("conv", FORMATS)
@pytest.mark.parametrize("linear", ["matrix", "lowrank"])
def test_the_network_at_full_rank_is_the_dense_one(linear: str, conv: str) -> None:
    model = net().eval()
    x = torch.randn(4, 3, 9, 10)
    wanted = model(x)
    plan = plan_at_full_rank(model, linear, conv)
    assert len(plan.layers) >= 4
    done = apply_plan(model, plan)
    assert all(layer.relative_error is not None and layer.relative_error < 1e-6 for layer in done.layers)
    assert not any(isinstance(model.get_submodule(layer.fqn), nn.Linear | nn.Conv2d) for layer in done.layers)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(ranks=3, conv_ranks=2),
        Recipe(eps=0.4, include=("*",)),
        Recipe(ratio=1.5),
        Recipe(ratio=2, format="lowrank"),
    ],
    ids=lambda recipe: str(recipe.to_json()),
)
@pytest.mark.parametrize("dtype", [None, "float16", "float64", "int8"])
def test_counts_and_errors_are_what_the_plan_says(recipe: Recipe, dtype: str | None) -> None:
    model = net()
    source = deepcopy(model)
    plan = make_plan(model, recipe)
    plan = plan.with_layers([replace(layer, core_dtype=dtype) for layer in plan.layers])
    done = apply_plan(model, plan)
    assert done.layers
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == plan.params_after == done.params_after
    )
    for layer in done.layers:
        new = model.get_submodule(layer.fqn)
        assert isinstance(new, TTLinear | TTConv2d)
        held = {"float16": torch.float16, "float64": torch.float64}.get(dtype or "", torch.float32)
        assert {core.dtype for core in new.cores} == {held}
        exact = source.get_submodule(layer.fqn).weight.detach().double().numpy()  # type: ignore[operator]
        found = deepcopy(new).double().weight.detach().numpy()
        missed = np.linalg.norm(exact - found) / np.linalg.norm(exact)
        assert layer.relative_error == pytest.approx(missed, rel=1e-6)
        if layer.predicted_error is not None:
            assert missed <= layer.predicted_error + {"float16": 2e-3, "int8": 3e-2}.get(dtype or "", 1e-6)


def test_everything_else_stays_the_same_object() -> None:
    model = net()
    source = deepcopy(model)
    before = dict(model.named_modules())
    plan = apply_plan(model, make_plan(model, Recipe(ranks=2)))
    changed = {layer.fqn for layer in plan.layers}
    assert changed == {"5"}
    for name, module in model.named_modules():
        if not any(name == fqn or name.startswith(f"{fqn}.") for fqn in changed):
            assert module is before[name]
    for name, parameter in model.named_parameters():
        if name in dict(source.named_parameters()):
            assert torch.equal(parameter, source.get_parameter(name))


def test_the_dense_layer_is_not_changed_by_training_the_new_one() -> None:
    model = net()
    dense, weight, bias = model[5], model[5].weight.detach().clone(), model[5].bias.detach().clone()
    apply_plan(model, make_plan(model, Recipe(ranks=2, include=("5",))))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, 3, 9, 10)).square().sum().backward()
    optimizer.step()
    assert isinstance(model[5], TTLinear)
    assert torch.equal(dense.weight, weight)
    assert torch.equal(dense.bias, bias)


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_network_takes_the_state_of_the_compressed_one(training: bool) -> None:
    model = net().train(training)
    plan = apply_plan(model, make_plan(model, Recipe(ranks=3, conv_ranks=2, include=("*",))))
    empty = net().train(training)
    insert_empty(empty, plan.layers, {})
    assert all(core.is_meta for layer in plan.layers for core in empty.get_submodule(layer.fqn).cores)
    empty.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 3, 9, 10)
    assert torch.equal(empty(x), model(x))
    assert {module.training for module in empty.modules()} == {training}


def changed_head(model: nn.Sequential) -> None:
    model[6] = nn.Linear(37, 6)


def changed_stride(model: nn.Sequential) -> None:
    model[1][0].stride = (1, 1)  # type: ignore[index, union-attr]


def no_linear(model: nn.Sequential) -> None:
    model[5] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_head, "the plan lists .* parameters, the network has"),
        (changed_stride, r"1\.0 has another shape or geometry"),
        (no_linear, "5 is no Linear, Embedding or convolution"),
    ],
)
def test_a_plan_for_another_network_changes_nothing(change, message: str) -> None:  # type: ignore[no-untyped-def]
    plan = make_plan(net(), Recipe(ranks=2, conv_ranks=2))
    model = net()
    change(model)
    before = list(model.modules())
    with pytest.raises(PlanError, match=message):
        apply_plan(model, plan)
    assert list(model.modules()) == before


def test_all_that_is_wrong_is_named_at_once() -> None:
    plan = make_plan(net(), Recipe(ranks=2, conv_ranks=2))
    model = net()
    changed_stride(model)
    no_linear(model)
    with pytest.raises(PlanError, match=r"1\.0 has another shape or geometry; 5 is no Linear"):
        check_plan(model, plan)


def test_a_decomposition_that_fails_leaves_the_model_as_it_was() -> None:
    model = net()
    before = [id(module) for module in model.modules()]
    plan = make_plan(model, Recipe(ranks=1, conv_ranks=1))
    with torch.no_grad():
        model[5].weight[0, 0] = float("nan")
    with pytest.raises(ShapeError, match=r"5: .*NaN"):
        apply_plan(model, plan)
    assert [id(module) for module in model.modules()] == before


def test_infeasible_ranks_are_no_trap() -> None:
    """What the planner writes is feasible, so that the decomposition has no rank to clip."""
    plan = make_plan(net(), Recipe(ranks=1000, conv_ranks=1000, include=("*",)))
    for layer in plan.layers:
        assert feasible_ranks(layer.tensorization.sizes, layer.tt_ranks) == layer.tt_ranks


def test_progress_counts_layers() -> None:
    model, calls = net(), []
    plan = make_plan(model, Recipe(ranks=2, conv_ranks=2))
    apply_plan(model, plan, progress=lambda *call: calls.append(call))
    assert calls == [(f"decomposing {layer.fqn}", k, len(plan.layers)) for k, layer in enumerate(plan.layers)]
