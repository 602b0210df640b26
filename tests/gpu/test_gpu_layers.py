"""Every layer in every format and way to run, against float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttcompress.layers.base import TTLayer
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.rebuilt import TTWeight, rebuild
from ttcompress.layers.spec import has_inputs_first, layer_spec, viewed
from ttcompress.records.layers import WeightSpec
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.gpu

FLOAT32, TF32 = "float32", "tf32"
TYPES = {FLOAT32: torch.float32, TF32: torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCES = {FLOAT32: 3e-5, TF32: 5e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""Norm of the difference over the norm: several products after each other, each rounded to 24, 11, 11 and 8 bits."""


@dataclass(frozen=True)
class Case:
    """A dense layer, the shape of an input, and the formats that it may have."""

    make: Callable[[], Any]
    shape: tuple[int, ...]
    formats: tuple[str, ...] = ("matrix", "chain", "naive", "lowrank")


BOTH = ("matrix", "lowrank")
CASES = {
    "linear": Case(lambda: nn.Linear(60, 48), (5, 60), BOTH),
    "linear, padded": Case(lambda: nn.Linear(37, 41, bias=False), (3, 2, 37), BOTH),
    "embedding": Case(lambda: nn.Embedding(60, 24, padding_idx=3), (7,), BOTH),
    "conv1d": Case(lambda: nn.Conv1d(12, 16, 5, padding=2), (2, 12, 20)),
    "conv2d": Case(lambda: nn.Conv2d(12, 16, 3, padding=1), (2, 12, 9, 8)),
    "conv2d, strides": Case(lambda: nn.Conv2d(12, 16, 3, (2, 1), "valid", (1, 2), bias=False), (2, 12, 9, 8)),
    "conv2d, reflected": Case(
        lambda: nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect"), (2, 8, 9, 8)
    ),
    "conv2d, groups": Case(lambda: nn.Conv2d(16, 24, 3, padding=1, groups=4), (2, 16, 9, 8)),
    "conv2d, 1x1": Case(lambda: nn.Conv2d(16, 24, 1), (2, 16, 9, 8), BOTH),
    "conv3d": Case(lambda: nn.Conv3d(8, 12, 3, padding=1), (2, 8, 4, 5, 6)),
    "conv_transpose1d": Case(lambda: nn.ConvTranspose1d(12, 8, 4, 2, 1), (2, 12, 10)),
    "conv_transpose2d": Case(lambda: nn.ConvTranspose2d(12, 8, 4, 2, 1), (2, 12, 6, 5)),
    "conv_transpose3d": Case(lambda: nn.ConvTranspose3d(8, 6, 2, 2), (2, 8, 3, 4, 3)),
}
FORMS = [(name, form) for name, case in CASES.items() for form in case.formats]
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "GRU": (lambda: nn.GRU(16, 12, batch_first=True), (3, 5, 16)),
    "LSTM": (lambda: nn.LSTM(16, 12, 2, bidirectional=True), (5, 3, 16)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True), (3, 5, 16)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 6, 6)),
    "bilinear": (lambda: nn.Bilinear(16, 16, 6), (4, 16)),
}
"""Modules that compute their weights from cores."""


def tt_of(name: str, form: str) -> TTLayer:
    """A TT layer at about half of its ranks."""
    torch.manual_seed(0)
    dense = CASES[name].make()
    spec = layer_spec(dense)
    view = tensorize_shape(form, spec.view_shape, groups=spec.groups)
    ranks = [max(1, most // 2) for most in view.max_ranks()]
    return tt_layer(spec).from_dense(dense, view, ranks[1:-1] if len(ranks) > len(view.sizes) else ranks)


def input_of(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    shape = CASES[name].shape
    if name == "embedding":
        return torch.randint(60, shape)
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm; NaN is never near."""
    assert found.shape == wanted.shape
    difference = (found.detach().cpu().double() - wanted.detach().cpu().double()).norm()
    return float(difference / wanted.detach().cpu().double().norm())


def use_precision(precision: str) -> torch.dtype:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == TF32
    return TYPES[precision]


def reference(layer: nn.Module) -> nn.Module:
    """The same in float64 on the CPU."""
    twin = copy.deepcopy(layer).double()
    if isinstance(twin, TTLayer):
        twin.execution = "dense"
    return twin


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_outputs_in_every_way_to_run(name: str, form: str, precision: str, device: torch.device) -> None:
    layer = tt_of(name, form)
    wanted = reference(layer)(input_of(name))
    dtype = use_precision(precision)
    moved = copy.deepcopy(layer).to(device, dtype).eval()
    x = input_of(name, dtype).to(device)

    for execution in moved.executions:
        moved.execution = execution
        with torch.inference_mode():
            found, again = moved(x), moved(x)
        assert (found.dtype, found.device) == (dtype, device)
        assert apart(found, wanted) < TOLERANCES[precision], execution
        assert apart(again, wanted) < TOLERANCES[precision], execution
        if x.dim() == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                assert apart(moved(last), wanted) < TOLERANCES[precision], execution


@pytest.mark.parametrize("precision", [FLOAT32, "bfloat16"])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_gradients_in_every_way_to_run(name: str, form: str, precision: str, device: torch.device) -> None:
    """In float32, and under autocast."""
    layer = tt_of(name, form).train()
    twin = reference(layer)
    slope = torch.randn(twin(input_of(name)).shape, dtype=torch.float64)
    (twin(input_of(name)) * slope).sum().backward()

    for execution in layer.executions:
        moved = copy.deepcopy(layer).to(device).train()
        moved.execution = execution
        x = input_of(name, torch.float32).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            y = moved(x)
        (y.float() * slope.to(device).float()).sum().backward()

        for core, wanted in zip(moved.parameters(), twin.parameters(), strict=True):
            assert core.grad is not None
            assert core.grad.device == device
            assert apart(core.grad, wanted.grad) < 3 * TOLERANCES[precision], execution


@pytest.mark.parametrize("precision", [FLOAT32, "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_weights_that_modules_compute(name: str, precision: str, device: torch.device) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(2)
    model = make()
    for module in [*model.modules()]:
        for parameter, weight in [*module.named_parameters(recurse=False)]:
            if weight.dim() > 1:
                spec = WeightSpec(tuple(weight.shape), parameter, has_inputs_first(module))
                view = tensorize_shape("lowrank", spec.view_shape)
                cores = decompose_weight(viewed(weight.detach(), spec), view, 6).cores
                rebuild(module, parameter, TTWeight(spec, view, cores))

    x = torch.randn(shape, dtype=torch.float64)
    given = (x, x.flip(0)) if name == "bilinear" else (x,)
    wanted = first(copy.deepcopy(model).double()(*given))
    dtype = use_precision(precision)
    moved = copy.deepcopy(model).to(device, dtype)
    found = first(moved(*(each.to(device, dtype) for each in given)))
    assert found.device == device
    assert apart(found, wanted) < TOLERANCES[precision]
    found.float().sum().backward()
    assert all(core.grad is not None for core in moved.parameters())

    moved.eval()
    with torch.no_grad():
        assert (
            apart(first(moved(*(each.to(device, dtype) for each in given))), wanted) < TOLERANCES[precision]
        )


def first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def test_cores_that_change_are_seen_by_the_next_call(device: torch.device) -> None:
    layer = tt_of("conv2d", "chain").to(device).eval()
    x = input_of("conv2d", torch.float32).to(device)
    with torch.no_grad():
        before = layer(x)
        layer.cores[0].mul_(2)
        bias = layer.bias[:, None, None]
        assert apart(layer(x) - bias, 2 * (before - bias)) < 1e-5


# --------------------------------------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_layer_is_captured_whole(name: str, form: str, gpu: torch.device) -> None:
    """Nothing in a call waits for the GPU or comes from the CPU: a graph of it computes the same of another input."""
    layer = tt_of(name, form).to(gpu).eval()
    x = input_of(name, torch.float32).to(gpu)
    other = x.flip(0).clone()

    for execution in layer.executions:
        layer.execution = execution
        with torch.no_grad():
            wanted = layer(other)
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                layer(x)
            torch.cuda.current_stream().wait_stream(aside)

            graph, held = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                found = layer(held)
            held.copy_(other)
            graph.replay()
        assert apart(found, wanted) < 1e-6, execution


class Net(nn.Sequential):
    """TT layers as networks have them."""

    def __init__(self) -> None:
        super().__init__(
            tt_of("conv2d", "chain"),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            tt_of("conv2d, 1x1", "matrix"),
            nn.Flatten(),
            nn.Linear(24 * 72, 60),
            nn.ReLU(),
            tt_of("linear", "matrix"),
        )


def test_compiled_with_cuda_graphs(gpu: torch.device) -> None:
    model = Net().to(gpu).eval()
    compiled = torch.compile(model, mode="reduce-overhead")
    for seed in range(4):
        x = torch.randn(2, 12, 9, 8, generator=torch.Generator().manual_seed(seed)).to(gpu)
        with torch.inference_mode():
            assert apart(compiled(x).clone(), model(x)) < 1e-4


def test_trained_with_cuda_graphs(gpu: torch.device) -> None:
    """Steps through compiled graphs go where steps without them go."""
    start = Net().to(gpu).train()
    losses: dict[str, list[float]] = {"eager": [], "compiled": []}
    for way, found in losses.items():
        model = copy.deepcopy(start)
        forward = torch.compile(model, mode="reduce-overhead") if way == "compiled" else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(4, 12, 9, 8, generator=generator).to(gpu)
            optimizer.zero_grad(set_to_none=True)
            torch.compiler.cudagraph_mark_step_begin()
            loss = forward(x).square().mean()
            loss.backward()
            optimizer.step()
            found.append(float(loss))
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)
