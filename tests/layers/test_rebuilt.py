"""Parameters that modules compute from TT-cores: the same results, in every way in which modules are used."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ttcompress.errors import PlanError
from ttcompress.layers.rebuilt import TTWeight, rebuild, rebuilt_in, restore
from ttcompress.layers.spec import has_inputs_first, viewed
from ttcompress.records.layers import WeightSpec
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def attending(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(16, 4, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


ROWS = tokens(3, 5, 16)
KEYS = tokens(3, 7, 12)
VALUES = tokens(3, 7, 20)
MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Any]]] = {
    "LSTM": (lambda: nn.LSTM(16, 6, 2, bidirectional=True, batch_first=True), (ROWS,), {}),
    "LSTM with projection": (lambda: nn.LSTM(16, 6, proj_size=4), (ROWS,), {}),
    "GRU without bias": (lambda: nn.GRU(16, 6, bias=False), (ROWS,), {}),
    "RNN": (lambda: nn.RNN(16, 6, 2), (ROWS,), {}),
    "GRUCell": (lambda: nn.GRUCell(16, 6), (ROWS[0],), {}),
    "attention": (attending(batch_first=True), (ROWS, ROWS, ROWS), {}),
    "attention, sequence first": (attending(bias=False), (ROWS, ROWS, ROWS), {"need_weights": False}),
    "attention to another": (attending(kdim=12, vdim=20, batch_first=True), (ROWS, KEYS, VALUES), {}),
    "attention with added keys": (
        attending(add_bias_kv=True, add_zero_attn=True, batch_first=True),
        (ROWS, ROWS, ROWS),
        {"key_padding_mask": MASK, "average_attn_weights": False},
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True),
        (ROWS,),
        {"src_key_padding_mask": MASK},
    ),
    "transformer": (
        lambda: nn.Transformer(16, 4, 2, 1, 24, dropout=0.0, batch_first=True),
        (ROWS, tokens(3, 4, 16)),
        {},
    ),
    "subclass": (lambda: Scaled(16, 8), (ROWS,), {}),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 6), (ROWS, ROWS.flip(0)), {}),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (tokens(2, 8, 6, 6),), {}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), (tokens(2, 8, 6, 6),), {}),
    "table": (lambda: nn.Embedding(30, 16, padding_idx=2), (torch.tensor([[2, 29], [0, 7]]),), {}),
    "bag": (lambda: nn.EmbeddingBag(30, 16), (torch.tensor([[2, 29], [0, 7]]),), {}),
}


def compressible(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in [*model.modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if sum(size > 1 for size in parameter.shape) > 1:
                yield module, name, parameter


def rebuild_all(model: nn.Module, format: str = "matrix", max_rank: int | None = None) -> nn.Module:
    for module, name, parameter in compressible(model):
        spec = WeightSpec(tuple(parameter.shape), name, has_inputs_first(module))
        view = tensorize_shape(format, spec.view_shape)
        cores = decompose_weight(viewed(parameter.detach(), spec), view, max_rank).cores
        rebuild(module, name, TTWeight(spec, view, cores).train(module.training))
    return model


def built(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODULES[name][0]()


def answer(name: str, model: nn.Module) -> list[Tensor]:
    _, given, named = MODULES[name]
    return flat(model(*given, **named))


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for each in output or () for tensor in flat(each)]


def check_close(found: list[Tensor], wanted: list[Tensor], atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol, check_dtype=False)


@pytest.mark.parametrize("format", ["matrix", "lowrank"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_full_rank_gives_the_same_outputs_and_gradients(name: str, training: bool, format: str) -> None:
    dense = built(name).train(training)
    model = rebuild_all(copy.deepcopy(dense), format)
    assert sum(1 for _ in compressible(dense)) == sum(len(rebuilt_in(each)) for each in model.modules())
    check_close(answer(name, model), answer(name, dense))
    with torch.no_grad():
        check_close(answer(name, model), answer(name, dense))

    # The gradient of a core is that of the weight, contracted with all other cores: here by a second way.
    sum(each.sum() for each in answer(name, dense)).backward()  # type: ignore[union-attr]
    sum(each.sum() for each in answer(name, model)).backward()  # type: ignore[union-attr]
    pairs = zip(
        dense.modules(), [each for each in model.modules() if not isinstance(each, TTWeight)], strict=True
    )
    for before, after in pairs:
        for own_name, weight in rebuilt_in(after).items():
            grads = [core.grad for core in weight.cores]
            wanted = torch.autograd.grad(weight.weight, weight.cores, before._parameters[own_name].grad)
            check_close(grads, list(wanted), 1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_copies_pickles_states_and_types(name: str) -> None:
    model = rebuild_all(built(name), max_rank=2).eval()
    wanted = answer(name, model)

    check_close(answer(name, copy.deepcopy(model)), wanted, 0)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    check_close(answer(name, loaded), wanted, 0)
    assert type(loaded) is type(model)

    other = rebuild_all(MODULES[name][0](), max_rank=2).eval()
    other.load_state_dict(model.state_dict())
    check_close(answer(name, other), wanted, 0)
    assert all(parameter.dtype == torch.float64 for parameter in copy.deepcopy(model).double().parameters())
    check_close(answer(name, copy.deepcopy(model).double().float()), wanted, 1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_a_changed_core_is_seen(name: str) -> None:
    model = rebuild_all(built(name)).eval()
    with torch.no_grad():
        before = answer(name, model)
        check_close(answer(name, model), before, 0)
        weight = next(each for each in model.modules() if isinstance(each, TTWeight))
        weight.cores[0].data.mul_(2)
        after = answer(name, model)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "bag"])
def test_autocast_takes_the_weight_in_full_precision(name: str) -> None:
    dense = built(name).eval()
    model = rebuild_all(copy.deepcopy(dense))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        check_close(answer(name, model), answer(name, dense), 5e-2)


@pytest.mark.parametrize("name", MODULES)
def test_what_was_rebuilt_can_be_restored(name: str) -> None:
    dense = built(name).eval()
    model = rebuild_all(copy.deepcopy(dense))
    for module in [*model.modules()]:
        for own_name, weight in rebuilt_in(module).items():
            restore(module, own_name, weight.dense())
    assert [type(each) for each in model.modules()] == [type(each) for each in dense.modules()]
    assert model.state_dict().keys() == dense.state_dict().keys()
    check_close(answer(name, model), answer(name, dense))


@pytest.mark.parametrize("name", ["attention", "encoder layer", "subclass", "transposed", "table", "LSTM"])
def test_compiled_and_exported(name: str) -> None:
    _, given, named = MODULES[name]
    model = rebuild_all(built(name), max_rank=3).eval()
    with torch.no_grad():
        wanted = answer(name, model)
        compiled = torch.compile(model, backend="aot_eager")
        check_close(flat(compiled(*given, **named)), wanted)
        program = torch.export.export(model, given, named)
        check_close(flat(program.module()(*given, **named)), wanted)


def test_two_modules_may_share_one_weight() -> None:
    first, second = nn.Linear(12, 12), Scaled(12, 12)
    second.weight = first.weight
    spec = WeightSpec((12, 12))
    view = tensorize_shape("lowrank", spec.view_shape)
    weight = TTWeight(spec, view, decompose_weight(first.weight.detach(), view, 3).cores)
    for module in (first, second):
        rebuild(module, "weight", weight)
    both = copy.deepcopy(nn.Sequential(first, second))
    assert both[0].cores is both[1].cores
    assert torch.equal(both[0].weight, first.weight)
    assert len(list(both.parameters())) == 2 + 2


@given(st.data())
def test_any_shape_in_any_format(data: st.DataObject) -> None:
    """Full rank against the tensor itself, float64."""
    shape = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=5), "shape")
    spec = WeightSpec(tuple(shape), transposed=data.draw(st.booleans(), "transposed"))
    view = tensorize_shape(
        data.draw(st.sampled_from(["matrix", "chain", "naive", "lowrank"])), spec.view_shape
    )
    tensor = torch.randn(shape, dtype=torch.float64)
    weight = TTWeight(spec, view, decompose_weight(viewed(tensor, spec), view).cores)
    assert weight.weight.shape == tensor.shape
    torch.testing.assert_close(weight.weight.detach(), tensor, rtol=0, atol=1e-10)


def test_a_module_with_cores_of_its_own_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.cores = nn.Linear(1, 1)
    spec = WeightSpec((4, 4))
    view = tensorize_shape("lowrank", (4, 4))
    weight = TTWeight(spec, view, decompose_weight(layer.weight.detach(), view).cores)
    with pytest.raises(PlanError, match="a Linear has something called cores already"):
        rebuild(layer, "weight", weight)
