"""Tables in TT form: rows and gradients as of the dense table, whatever the modes, without ever making it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttcompress import TTEmbedding, tensorize_shape
from ttcompress.errors import PlanError, ShapeError
from ttcompress.layers import embedding as module_of_layer
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.spec import layer_spec
from ttcompress.tt import lookup
from ttcompress.tt.shapes import Mode, Tensorization

SHAPES = [(100, 16), (97, 12), (30, 30), (1, 4), (5, 1), (64, 3)]
"""Rows and dimensions: some factor, some are padded, some are a single mode."""
IDS = torch.tensor([[3, 0, 4], [4, 3, 3]])


def table(rows: int = 97, dim: int = 12, **options: Any) -> nn.Embedding:
    torch.manual_seed(rows)
    return nn.Embedding(rows, dim, **options).double()


def in_numpy(layer: TTEmbedding, row: int) -> list[float]:
    """A row as G_1[:, j_1] ... G_d[:, j_d], index by index."""
    sizes = layer.tensorization.in_modes
    digits: list[int] = []
    for size in reversed(sizes):
        digits.insert(0, row % size)
        row //= size
    whole = torch.ones(1, 1, dtype=torch.float64)
    for core, digit in zip(layer.cores, digits, strict=True):
        step = torch.tensordot(whole, core[:, :, digit, 0].double(), dims=1)
        whole = step.reshape(-1, core.shape[-1])
    return whole[: layer.embedding_dim, 0].tolist()


@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
@pytest.mark.parametrize(("rows", "dim"), SHAPES)
def test_full_rank_gives_every_row(rows: int, dim: int, weight_format: str) -> None:
    dense = table(rows, dim)
    layer = TTEmbedding.from_dense(dense, weight_format)
    ids = torch.arange(rows)
    torch.testing.assert_close(layer(ids), dense(ids))
    torch.testing.assert_close(layer.weight, dense.weight)
    assert layer(IDS[:0]).shape == (0, 3, dim)


@pytest.mark.parametrize(
    "modes",
    [
        (Mode(2, 5, 1), Mode(3, 4, 1), Mode(2, 5, 1)), (Mode(1, 100, 1), Mode(12, 1, 1)), (Mode(12, 1, 1), Mode(1, 100, 1)),
        (Mode(3, 1, 1), Mode(1, 10, 1), Mode(4, 1, 1), Mode(1, 10, 1)), (Mode(1, 10, 1), Mode(12, 1, 1), Mode(1, 10, 1)), (Mode(12, 100, 1),),
    ],
)  # fmt: skip
@pytest.mark.parametrize("execution", ["contract", "dense"])
def test_rows_by_any_modes_are_those_of_the_definition(modes: tuple[Mode, ...], execution: str) -> None:
    torch.manual_seed(1)
    layer = TTEmbedding(layer_spec(table()), Tensorization("matrix", modes), 3, dtype=torch.float64)  # type: ignore[arg-type]
    layer.execution = execution  # type: ignore[assignment]
    ids = torch.tensor([0, 96, 41, 7, 41])
    expected = torch.tensor([in_numpy(layer, int(row)) for row in ids], dtype=torch.float64)
    torch.testing.assert_close(layer(ids), expected)


def test_the_table_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Tensor:
        raise AssertionError("the table was made")

    monkeypatch.setattr(module_of_layer, "dense_weight", refused)
    layer = TTEmbedding.from_dense(table(), max_rank=3).eval()
    for count in (1, 97, 5_000):
        assert layer(torch.arange(count) % 97).shape == (count, 12)
        with torch.no_grad():
            layer(torch.arange(count) % 97)
    assert layer.cached_tensors() == []


@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
def test_many_indices_go_in_parts(monkeypatch: pytest.MonkeyPatch, weight_format: str) -> None:
    layer = TTEmbedding.from_dense(table(), weight_format, max_rank=4)
    ids = torch.randint(97, (50,))
    monkeypatch.setattr(lookup, "MOST_ELEMENTS", 100)
    in_parts = copy.deepcopy(layer)
    in_parts._lookup = lookup.lookup_plan([core.shape for core in layer.cores], 97)
    assert in_parts._lookup.most < len(ids)
    torch.testing.assert_close(in_parts(ids), layer(ids))


@pytest.mark.parametrize("kind", ["matrix", "lowrank", "dense"])
@pytest.mark.parametrize("row", [-1, 97, 98, 99, 10**9])
def test_indices_out_of_range_raise_as_in_torch(row: int, kind: str) -> None:
    # 97 rows are padded to 98 as a matrix: 97 is inside of the modes.
    layer = TTEmbedding.from_dense(table(), "matrix" if kind == "dense" else kind)
    layer.execution = kind if kind == "dense" else "auto"  # type: ignore[assignment]
    for each in (layer, table()):
        with pytest.raises(IndexError, match="out of range"):
            each(torch.tensor([3, row]))


def test_only_whole_numbers_are_indices() -> None:
    layer = TTEmbedding.from_dense(table())
    assert layer(IDS.int()).equal(layer(IDS))
    for wrong in (torch.ones(2), torch.ones(2, dtype=torch.uint8), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ShapeError, match="whole numbers of 32 or 64 bits"):
            layer(wrong)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"padding_idx": -1}, {"scale_grad_by_freq": True},
                                     {"padding_idx": 3, "scale_grad_by_freq": True}])  # fmt: skip
@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
@pytest.mark.parametrize("execution", ["contract", "dense"])
def test_gradients_are_those_of_the_table(
    options: dict[str, Any], weight_format: str, execution: str
) -> None:
    """What torch gives the rows of the table, taken back to the cores through the table that they make."""
    dense = table(**options)
    layer = TTEmbedding.from_dense(dense, weight_format)
    layer.execution = execution  # type: ignore[assignment]
    upstream = torch.randn(2, 3, 12, dtype=torch.float64)
    (dense(IDS) * upstream).sum().backward()
    assert dense.weight.grad is not None
    expected = torch.autograd.grad(layer.weight, [*layer.cores], dense.weight.grad)

    (layer(IDS) * upstream).sum().backward()
    for core, gradient in zip(layer.cores, expected, strict=True):
        assert core.grad is not None
        torch.testing.assert_close(core.grad, gradient)


def test_padding_sends_no_gradient_and_its_own_part_stays() -> None:
    dense = table(padding_idx=4)
    layer = TTEmbedding.from_dense(dense, "lowrank")
    assert not bool(layer(torch.tensor([4])).abs().max() > 1e-9)
    layer(IDS).square().sum().backward()
    own = layer.cores[0].grad
    assert own is not None
    assert not bool(own[0, 0, 4].any())
    assert bool(own[0, 0, 3].any())


def test_attributes_are_those_of_torch() -> None:
    dense = table(padding_idx=-2, scale_grad_by_freq=True)
    layer = TTEmbedding.from_dense(dense)
    for name in (*("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type"),
                 *("scale_grad_by_freq", "sparse", "training")):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name), name


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_cores_of_their_own(copied: Callable[[Any], Any]) -> None:
    layer = TTEmbedding.from_dense(table())
    twin = copied(layer)
    assert twin(IDS).equal(layer(IDS))
    with torch.no_grad():
        twin.cores[0].zero_()
    assert not twin(IDS).equal(layer(IDS))


def test_types_and_autocast_are_those_of_a_table() -> None:
    layer = TTEmbedding.from_dense(table().float(), max_rank=3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert copy.deepcopy(layer).to(dtype)(IDS).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(IDS).equal(layer.float()(IDS))
        assert layer(IDS).dtype == torch.float32


def test_random_rows_have_the_spread_of_torchs() -> None:
    spec = layer_spec(nn.Embedding(4096, 64))
    for weight_format in ("matrix", "lowrank"):
        layer = TTEmbedding(spec, tensorize_shape(weight_format, (64, 4096)), 8)  # type: ignore[arg-type]
        assert float(layer.weight.detach().std()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
def test_exported_for_any_number_of_indices(weight_format: str) -> None:
    layer = TTEmbedding.from_dense(table(), weight_format, max_rank=3).eval()
    count = torch.export.Dim("count", min=2, max=64)
    program = torch.export.export(layer, (IDS,), dynamic_shapes={"input": {0: count}})
    more = torch.randint(97, (7, 3))
    torch.testing.assert_close(program.module()(more), layer(more))


def test_an_output_layer_runs_by_the_cores_of_the_table() -> None:
    dense = table()
    head = nn.Linear(12, 97).double()
    head.weight = dense.weight
    for weight_format in ("matrix", "lowrank"):
        layer = TTEmbedding.from_dense(dense, weight_format)
        tied = TTLinear.sharing(head, layer)
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(tied(x), head(x))
        torch.testing.assert_close(tied.weight, head.weight)
        assert tied.cores is layer.cores

        back = TTEmbedding.sharing(dense, TTLinear.from_dense(head, weight_format))
        torch.testing.assert_close(back(IDS), dense(IDS))


def test_other_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="another kind"):
        TTEmbedding.from_dense(nn.Linear(4, 4))


def test_rows_have_the_type_of_the_table_whatever_that_of_the_cores() -> None:
    dense = table().float()
    cores = [core.half() for core in TTEmbedding.from_dense(dense, "lowrank").cores]
    layer = TTEmbedding.from_cores(dense, tensorize_shape("lowrank", (12, 97)), cores)
    assert layer.cores[0].dtype == torch.float16
    wide = [core.float() for core in cores]
    expected = TTEmbedding.from_cores(dense, layer.tensorization, wide)(IDS)
    assert torch.equal(layer(IDS), expected)
    layer.execution = "dense"  # type: ignore[assignment]
    torch.testing.assert_close(layer(IDS), expected)
    assert copy.deepcopy(layer).to(torch.float64)(IDS).dtype == torch.float64
