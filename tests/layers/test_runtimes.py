"""Whole compressed networks under torch.compile and torch.export; test_layers.py has the single layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import ttcompress
from ttcompress.networks.zoo import ZOO, Mlp

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS: list[tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (lambda: Mlp(width0=784, width1=512, width2=256, width3=10), (784,), {"ranks": 8}),
    # All formats are in it.
    (ZOO["resnet20"], (3, 32, 32), {"ratio": 2}),
]
every_network = pytest.mark.parametrize(("make", "shape", "options"), NETWORKS, ids=["mlp", "resnet20"])


def compressed(make: Callable[[], nn.Module], options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return ttcompress.compress(make(), **options)[0].eval()


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@every_network
@torch.no_grad()
def test_compile_takes_few_graphs_for_all_batches(
    make: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    """One for a batch of one, one for any, and few more where the choice between cores and dense changes."""
    torch.compiler.reset()
    graphs = CompileCounter()
    model = compressed(make, options)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for batch in (1, 2, 3, 5, 8, 16, 64, 100):
        x = torch.randn(batch, *shape)
        assert difference(compiled(x), model(x)) < 1e-5
    assert 2 <= graphs.frame_count <= 4


@every_network
@torch.no_grad()
def test_export_takes_any_batch(
    make: Callable[[], nn.Module], shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    model = compressed(make, options)
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=any_batch).module()
    for batch in (1, 3, 17):
        x = torch.randn(batch, *shape)
        assert difference(program(x), model(x)) < 1e-5
