"""Costs from shapes alone, against what torch counts while the layers run."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.spec import layer_spec
from ttcompress.tt.contract import contract_groups
from ttcompress.tt.cost import (
    MULTIPLY_ADDS,
    TIME,
    Calls,
    ContractionPlan,
    Cost,
    LayerCosts,
    Unit,
)
from ttcompress.tt.shapes import FORMATS, Tensorization, feasible_ranks, tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")
DENSE = [
    nn.Linear(24, 36),
    nn.Linear(30, 7),
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(8, 12, (3, 2), stride=(2, 1)),
    nn.Conv2d(16, 4, 1),
    nn.Conv2d(4, 9, 3, dilation=2, padding="same", padding_mode="reflect", bias=False),
]


def counted(module: nn.Module, x: Tensor) -> int:
    with torch.no_grad():
        module(x)
        with FlopCounterMode(display=False) as counter:
            module(x)
    return int(counter.get_total_flops()) // 2


def inputs(dense: nn.Module) -> tuple[Tensor, Calls]:
    if isinstance(dense, nn.Linear):
        return torch.zeros(5, dense.in_features), Calls(5, 5)
    assert isinstance(dense, nn.Conv2d)
    x = torch.zeros(2, dense.in_channels, 11, 9)
    with torch.no_grad():
        y = dense(x)
    return x, Calls(2 * 11 * 9, y.numel() // y.shape[1])


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, TTLinear | TTConv2d]:
    dense = draw(st.sampled_from(DENSE))
    weight_format = draw(st.sampled_from(["matrix", "lowrank"] if isinstance(dense, nn.Linear) else FORMATS))
    tensorization = tensorize_shape(weight_format, tuple(dense.weight.shape))  # type: ignore[arg-type]
    asked = [draw(st.integers(1, 6)) for _ in tensorization.modes[1:]]
    ranks = feasible_ranks(tensorization.sizes, tensorization.expand_ranks(asked))
    kind = TTLinear if isinstance(dense, nn.Linear) else TTConv2d
    layer = kind(layer_spec(dense), tensorization, ranks).eval()  # type: ignore[arg-type]
    layer.execution = layer.executions[1]
    return dense, layer


@settings(max_examples=120, deadline=None)
@given(layers())
def test_multiply_adds_are_those_that_torch_counts(pair: tuple[nn.Module, TTLinear | TTConv2d]) -> None:
    dense, layer = pair
    x, calls = inputs(dense)
    costs = LayerCosts(layer.spec.weight_shape, calls, MULTIPLY_ADDS)
    assert costs.dense().multiply_adds == counted(dense, x)
    assert costs.by_cores(layer.tensorization, layer.tt_ranks).multiply_adds == counted(layer, x)


def by_core(costs: LayerCosts, tensorization: Tensorization, ranks: tuple[int, ...]) -> Cost:
    cores = [costs.core(tensorization, k, *ranks[k : k + 2]) for k in range(len(tensorization.modes))]
    return sum(cores, Cost(0, 0))


@settings(max_examples=120, deadline=None)
@given(layers())
def test_the_cores_of_a_chain_add_up_to_it(pair: tuple[nn.Module, TTLinear | TTConv2d]) -> None:
    dense, layer = pair
    _, calls = inputs(dense)
    for unit in (MULTIPLY_ADDS, TIME):
        costs = LayerCosts(layer.spec.weight_shape, calls, unit)
        parts = by_core(costs, layer.tensorization, layer.tt_ranks)
        whole = costs.by_cores(layer.tensorization, layer.tt_ranks)
        if "chain" in layer.executions:
            images = calls.pixels * layer.spec.weight_shape[1] + calls.out_pixels * layer.spec.weight_shape[0]
            assert parts == (whole.multiply_adds, whole.elements - images)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_the_cores_of_a_matrix_add_up_to_a_sweep_without_merging(
    pair: tuple[nn.Module, TTLinear | TTConv2d],
) -> None:
    dense, layer = pair
    if isinstance(dense, nn.Conv2d):
        return
    x, calls = inputs(dense)
    parts = by_core(
        LayerCosts(layer.spec.weight_shape, calls, MULTIPLY_ADDS), layer.tensorization, layer.tt_ranks
    )
    plan = ContractionPlan(tuple(range(len(layer.cores) + 1)), True, Cost(0, 0), Cost(0, 0), 0)
    padded = torch.zeros(len(x), prod(layer.tensorization.in_modes))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        contract_groups(list(layer.cores), padded, plan)
    assert parts.multiply_adds == counter.get_total_flops() // 2


class Begun(TorchDispatchMode):
    """Counts products and convolutions."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "bmm", "addmm", "mv", "dot", "convolution")
        return func(*args, **(kwargs or {}))


@settings(max_examples=120, deadline=None)
@given(layers(), st.booleans())
def test_on_a_gpu_each_product_counts(pair: tuple[nn.Module, TTLinear | TTConv2d], runs_dense: bool) -> None:
    """In training, where what is made of the cores is made in every call."""
    dense, layer = pair
    x, calls = inputs(dense)
    layer.train()
    if runs_dense:
        layer.execution = "dense"
    with torch.no_grad(), Begun() as begun:
        layer(x)

    form = layer.tensorization, layer.tt_ranks
    plan = layer._choice.plan(trains=False)

    def cost(each: LayerCosts) -> Cost:
        return each.rebuilt(*form) if runs_dense else each.by_cores(*form, cached=False, plan=plan)

    assert kernels(layer, calls, cost) == begun.count


def kernels(layer: TTLinear | TTConv2d, calls: Calls, cost: Callable[[LayerCosts], Cost]) -> float:
    """How often a kernel is begun, by what the cost becomes when that counts much."""
    much = 10**15
    without, with_kernels = (
        cost(LayerCosts(layer.spec.view_shape, calls, Unit(1, 1, each, each))) for each in (0, much)
    )
    assert without.elements == with_kernels.elements
    return (with_kernels.multiply_adds - without.multiply_adds) / much
