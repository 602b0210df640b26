"""Convolutions of all dimensions, transposed ones too, against torch's own."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ttcompress
from ttcompress.errors import PlanError, ShapeError
from ttcompress.layers.conv import CONV_LAYERS, TTConv, TTConv1d, TTConvTranspose
from ttcompress.layers.plain import described, from_description, plain_forms
from ttcompress.layers.spec import CONVOLUTIONS, empty_layer, layer_spec, viewed
from ttcompress.records.layers import CONV_KINDS, ConvSpec
from ttcompress.tt.cost import MULTIPLY_ADDS, Calls, LayerCosts
from ttcompress.tt.decompose import decompose_weight, squared_spectra
from ttcompress.tt.quantize import as_stored, dequantize, quantize
from ttcompress.tt.shapes import FORMATS, feasible_ranks, tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = [kind for kind in CONV_KINDS if "transpose" not in kind]
TRANSPOSED = [kind for kind in CONV_KINDS if "transpose" in kind]


def dimensions(kind: str) -> int:
    return int(kind[-2])


@st.composite
def cases(draw: st.DrawFn, kinds: list[str] = CONV_KINDS) -> tuple[Any, Tensor]:  # type: ignore[assignment]
    """A dense convolution of any kind and geometry, and an input for it."""
    kind = draw(st.sampled_from(kinds))
    dims = dimensions(kind)

    def sizes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(least, most)) for _ in range(dims))

    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(0, 2)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": padding}
    if kind in TRANSPOSED:
        most = [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, each)) for each in most)
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        options["padding"] = draw(st.sampled_from([padding, "same", "valid"]))
        if options["padding"] == "same":
            options["stride"] = (1,) * dims

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    options["groups"] = groups
    torch.manual_seed(draw(st.integers(0, 99)))
    dense = CONVOLUTIONS[kind](*channels, kernel, bias=draw(st.booleans()), **options)
    batch = (2,) if draw(st.booleans()) else ()
    # Large enough for every window, and for the padding of transposed ones, which is cut away.
    return dense, torch.randn(*batch, channels[0], *sizes(5, 7))


def most_of(dense: nn.Module, x: Tensor) -> float:
    """The largest sum of products without their signs: what round-off goes with."""
    spec = layer_spec(dense)  # type: ignore[arg-type]
    absolute = empty_layer(spec).to_empty(device="cpu")
    for own, other in zip(absolute.parameters(), dense.parameters(), strict=True):
        own.data.copy_(other.data.abs())
    return float(absolute(x.abs()).detach().max())


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(FORMATS))
def test_full_rank_is_the_dense_layer_in_every_geometry(case: tuple[Any, Tensor], name: str) -> None:
    dense, x = case
    layer = CONV_LAYERS[layer_spec(dense).kind].from_dense(dense, name)
    wanted = dense(x)

    for execution in layer.executions:
        layer.execution = execution
        torch.testing.assert_close(layer(x), wanted, atol=1e-5 * most_of(dense, x), rtol=0)
        layer.eval()
        with torch.no_grad():
            torch.testing.assert_close(layer(x), wanted, atol=1e-5 * most_of(dense, x), rtol=0)


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from(FORMATS), st.integers(1, 3))
def test_gradients_are_those_through_the_weight(case: tuple[Any, Tensor], name: str, rank: int) -> None:
    dense, x = case
    dense, x = dense.double(), x.double().requires_grad_()
    layer = CONV_LAYERS[layer_spec(dense).kind].from_dense(dense, name, rank)

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        wave = torch.arange(y.numel(), dtype=y.dtype).view_as(y).sin()
        return torch.autograd.grad((y * wave).sum(), [x, *layer.parameters()])

    # The dense layer of torch run with the weight that the cores stand for.
    parameters = {"weight": layer.weight} | ({} if layer.bias is None else {"bias": layer.bias})
    wanted = gradients(torch.func.functional_call(dense, parameters, (x,)))
    for execution in layer.executions:
        layer.execution = execution
        for found, exact in zip(gradients(layer(x)), wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases(TRANSPOSED), st.data())
def test_an_output_size_is_taken_as_torch_does(case: tuple[Any, Tensor], data: st.DataObject) -> None:
    dense, x = case
    layer = CONV_LAYERS[layer_spec(dense).kind].from_dense(dense)
    dims = dimensions(layer.kind)
    usual = dense(x).shape[-dims:]
    size = [wanted + data.draw(st.integers(-3, 3)) for wanted in usual]
    asked = data.draw(st.sampled_from([size, [*x.shape[:-dims], *size]]))

    try:
        wanted = dense(x, output_size=asked)
    except ValueError:
        with pytest.raises(ShapeError, match="output_size must lie between"):
            layer(x, output_size=asked)
        return
    for execution in layer.executions:
        layer.execution = execution
        torch.testing.assert_close(layer(x, asked), wanted, atol=1e-5 * most_of(dense, x), rtol=0)


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(FORMATS), st.lists(st.integers(1, 5), min_size=8, max_size=8))
@torch.no_grad()
def test_costs_are_the_multiply_adds_that_torch_counts(
    case: tuple[Any, Tensor], name: str, ranks: list[int]
) -> None:
    dense, x = case
    if x.dim() == dimensions(layer_spec(dense).kind) + 1:
        x = x[None]
    spec = layer_spec(dense)
    tensorization = tensorize_shape(name, spec.view_shape, groups=spec.groups)
    asked = tensorization.expand_ranks(ranks[: len(tensorization.modes) - 1])
    layer = CONV_LAYERS[spec.kind](spec, tensorization, feasible_ranks(tensorization.sizes, asked)).eval()
    layer.execution = layer.executions[1]

    y = dense(x)
    calls = Calls(x.numel() // x.shape[1], y.numel() // y.shape[1])
    costs = LayerCosts(spec.view_shape, calls, MULTIPLY_ADDS, spec.transposed, spec.groups)
    assert costs.dense().multiply_adds == counted(dense, x)
    assert costs.by_cores(tensorization, layer.tt_ranks).multiply_adds == counted(layer, x)


def counted(module: nn.Module, x: Tensor) -> int:
    module(x)
    with FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops()) // 2


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(FORMATS))
def test_the_weight_is_what_the_cores_stand_for(case: tuple[Any, Tensor], name: str) -> None:
    """By NumPy, as docs/format.md has it."""
    dense, _ = case
    layer = CONV_LAYERS[layer_spec(dense).kind].from_dense(dense, name, max_rank=2)
    groups = dense.groups
    cores = [core.detach().double().numpy() for core in layer.cores]
    if groups == 1:
        cores = [core[None] for core in cores]
    assert {core.ndim for core in cores} == {6}

    found = []
    for block in zip(*cores, strict=True):
        whole = block[0]
        for core in block[1:]:
            whole = np.einsum("amnwq,qopvs->amonpwvs", whole, core)
            a, m, o, n, p, w, v, s = whole.shape
            whole = whole.reshape(a, m * o, n * p, w * v, s)
        out, inp = dense.out_channels // groups, dense.in_channels // groups
        view = whole[0, :out, :inp, :, 0].reshape(out, inp, *dense.kernel_size)
        found.append(view.swapaxes(0, 1) if layer.spec.transposed else view)

    assert layer.weight.shape == dense.weight.shape
    np.testing.assert_allclose(layer.weight.detach().numpy(), np.concatenate(found), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(FORMATS), st.floats(0.05, 0.9))
def test_groups_share_their_ranks_and_keep_to_eps(case: tuple[Any, Tensor], name: str, eps: float) -> None:
    dense, _ = case
    spec = layer_spec(dense)
    view = tensorize_shape(name, spec.view_shape, groups=spec.groups)
    result = decompose_weight(viewed(dense.weight.detach(), spec), view, eps=eps)

    layer = CONV_LAYERS[spec.kind].from_cores(dense, view, result.cores)
    missed = float((layer.weight - dense.weight).norm() / dense.weight.norm())
    assert missed == pytest.approx(result.relative_error, rel=1e-3, abs=1e-6)
    assert missed <= eps * 1.001
    stored = [tuple(core.shape) for core in layer.cores]
    assert stored == view.stored_shapes(result.tt_ranks)
    assert sum(core.numel() for core in layer.cores) == view.num_params(result.tt_ranks)


@pytest.mark.parametrize("name", FORMATS)
def test_spectra_of_groups_bound_the_error_at_every_rank(name: str) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(12, 18, 3, groups=3)
    spec = layer_spec(dense)
    view = tensorize_shape(name, spec.view_shape, groups=3)
    blocks = viewed(dense.weight.detach(), spec)
    spectra = squared_spectra(blocks, view)
    for rank in range(1, 7):
        ranks = feasible_ranks(view.sizes, view.expand_ranks(rank))
        result = decompose_weight(blocks, view, ranks)
        tails = [float(cut[kept:].sum()) for cut, kept in zip(spectra, ranks[1:-1], strict=True)]
        assert max(tails) - 1e-6 <= result.relative_error**2 <= sum(tails) + 1e-6


def test_eight_bits_have_scales_for_each_group() -> None:
    torch.manual_seed(0)
    dense = nn.Conv1d(6, 9, 3, groups=3)
    # One group is a thousand times the size of the others.
    dense.weight.data[:3] *= 1000
    layer = TTConv1d.from_dense(dense)
    stored = as_stored(list(layer.cores), torch.int8)
    for core in stored:
        codes, scales = quantize(core)
        assert scales.shape == (3, core.shape[-1])
        assert torch.equal(dequantize(codes, scales), core)
    again = TTConv1d.from_cores(dense, layer.tensorization, stored).weight
    for found, wanted in zip(again.chunk(3), dense.weight.chunk(3), strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_the_attributes_are_those_of_the_dense_layer(kind: str) -> None:
    dense = CONVOLUTIONS[kind](6, 4, 3, stride=2, padding=1, dilation=2, bias=False)
    layer = CONV_LAYERS[kind].from_dense(dense)
    assert layer.spec == layer_spec(dense)
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode", "groups",
        "output_padding", "transposed",
    ):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name), name
    assert type(empty_layer(layer.spec)) is CONVOLUTIONS[kind]
    assert layer_spec(empty_layer(layer.spec)) == layer.spec
    assert getattr(ttcompress, type(layer).__name__) is type(layer)


@pytest.mark.parametrize("kind", CONV_KINDS)
@pytest.mark.parametrize(
    "shape", [(1,), (5,), (2, 5), (2, 7), (7, 2, 9), (1, 2, 6, 5, 5, 5), (6, 5, 5, 5, 5, 5)]
)
def test_inputs_of_another_shape(kind: str, shape: tuple[int, ...]) -> None:
    layer = CONV_LAYERS[kind].from_dense(CONVOLUTIONS[kind](6, 4, 3))
    with pytest.raises(ShapeError, match=r"takes \(\[batch,\] 6, "):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_a_layer_of_another_kind_is_refused(kind: str) -> None:
    for other in CONV_KINDS:
        if other != kind:
            with pytest.raises(PlanError, match="stands for layers of another kind"):
                CONV_LAYERS[kind].from_dense(CONVOLUTIONS[other](6, 4, 3))


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_what_is_left_out_of_a_spec_is_torchs_default(kind: str) -> None:
    dims = dimensions(kind)
    spec = ConvSpec(6, 4, (3,) * dims, transposed=kind in TRANSPOSED)
    assert spec == layer_spec(CONVOLUTIONS[kind](6, 4, 3))
    assert spec.kind == kind


@pytest.mark.parametrize(("kind", "memory_format"), [
    ("conv2d", torch.channels_last), ("conv_transpose2d", torch.channels_last),
    ("conv3d", torch.channels_last_3d), ("conv_transpose3d", torch.channels_last_3d),
])  # fmt: skip
@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_memory_formats_of_images_and_volumes(
    kind: str, memory_format: torch.memory_format, name: str
) -> None:
    torch.manual_seed(0)
    dense = CONVOLUTIONS[kind](6, 5, 3, padding=1)
    layer = CONV_LAYERS[kind].from_dense(dense, name).eval()
    x = torch.randn(2, 6, *(5, 4, 6)[: dimensions(kind)])
    wanted = dense(x)
    for execution in layer.executions:
        layer.execution = execution
        for _ in range(2):
            y = layer(x.contiguous(memory_format=memory_format))
            torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        # Without the batch axis, and with axes in an order that has no name.
        torch.testing.assert_close(layer(x[0]), wanted[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x.mT.contiguous().mT), wanted, atol=1e-5, rtol=1e-5)


def test_every_kind_has_a_layer() -> None:
    assert set(CONV_LAYERS) == set(CONVOLUTIONS) == set(CONV_KINDS)
    assert [kind for kind, layer in CONV_LAYERS.items() if issubclass(layer, TTConvTranspose)] == TRANSPOSED
    assert all(re.fullmatch(r"TTConv(Transpose)?[123]d", layer.__name__) for layer in CONV_LAYERS.values())
    assert all(issubclass(layer, TTConv) for layer in CONV_LAYERS.values())


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(FORMATS), st.integers(1, 3))
@torch.no_grad()
def test_stock_layers_compute_the_same(case: tuple[Any, Tensor], name: str, rank: int) -> None:
    dense, x = case
    layer = CONV_LAYERS[layer_spec(dense).kind].from_dense(dense, name, rank).eval()
    wanted = layer(x)
    for form in plain_forms(layer):
        built = form.build(layer, torch.float32)
        stock = [module for module in built.modules() if not isinstance(module, nn.Sequential)]
        assert {type(module) for module in stock} <= set(CONVOLUTIONS.values())
        torch.testing.assert_close(built(x), wanted, atol=1e-5 * most_of(dense, x), rtol=1e-5)

        # As a file describes them.
        again = from_description(described(built)).to_empty(device="cpu")
        again.load_state_dict(built.state_dict())
        assert torch.equal(again(x), built(x))
