"""TT layers against the dense layers they replace, in every format, geometry and execution."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from itertools import product
from math import prod
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ttcompress.errors import ShapeError
from ttcompress.layers import base, cache
from ttcompress.layers import execution as choosing
from ttcompress.layers.conv import (
    TTConv1d,
    TTConv2d,
    TTConv3d,
    TTConvTranspose1d,
    TTConvTranspose2d,
    TTConvTranspose3d,
)
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.spec import layer_spec
from ttcompress.networks.surgery import dense_layer
from ttcompress.records.layers import ConvSpec, LinearSpec
from ttcompress.tt.cost import Calls
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import FORMATS, Mode, Tensorization, tensorize_shape

STRIDES = [1, (2, 1), 3]
PADDINGS: list[Any] = [0, 1, (2, 1), "same", "valid"]
DILATIONS = [1, 2, (1, 2)]
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
KERNELS = [(1, 1), (3, 3), (1, 3), (4, 2)]


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Same shape and type, and no entry off by more than `tolerance` of the largest one."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def runs(layer: TTLinear | TTConv2d, x: Tensor) -> dict[str, Tensor]:
    outputs = {}
    for name in ("dense", layer.executions[1], "auto"):
        layer.execution = name
        outputs[name] = layer(x)
    return outputs


def dense_oracle(layer: TTLinear | TTConv2d) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The dense weight by NumPy in float64, from the stored cores."""
    count, operands = len(layer.cores), []
    for k, core in enumerate(layer.cores):
        operands += [core.detach().double().numpy(), [k, 10 + k, 20 + k, 30 + k, k + 1]]
    order = [0, *(base + k for base in (10, 20, 30) for k in range(count)), count]
    sizes = [prod(core.shape[axis] for core in layer.cores) for axis in (1, 2, 3)]
    shape = layer.spec.weight_shape
    whole = np.einsum(*operands, order, optimize=True).reshape(sizes)
    return np.asarray(whole[: shape[0], : shape[1]].reshape(shape))


LINEARS = [(24, 36), (37, 41), (1, 64), (64, 1), (101, 7), (2, 2)]


@pytest.mark.parametrize(("out_dim", "in_dim"), LINEARS)
@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3)])
def test_a_linear_layer_at_full_rank(
    out_dim: int, in_dim: int, weight_format: str, bias: bool, batch: tuple[int, ...]
) -> None:
    dense = seeded(lambda: nn.Linear(in_dim, out_dim, bias=bias))
    layer = TTLinear.from_dense(dense, weight_format)
    x = torch.randn(*batch, in_dim)
    wanted = dense(x)
    # Of what is added up: a sum of few outputs may come out near 0.
    most = 1e-6 * float(dense.weight.norm(dim=1).max() * x.norm(dim=-1).max())
    found = runs(layer, x)
    assert found.keys() == set(layer.executions)
    for y in found.values():
        torch.testing.assert_close(y, wanted, atol=most, rtol=0)
    assert (layer.bias is None) == (not bias)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_convolution_at_full_rank_in_every_geometry(
    weight_format: str, padding_mode: str, kernel: tuple[int, int]
) -> None:
    """7 -> 10 channels do not factor, so that `matrix` is padded; every second geometry has no bias."""
    base = seeded(lambda: nn.Conv2d(7, 10, kernel))
    tensorization = tensorize_shape(weight_format, tuple(base.weight.shape))
    cores = decompose_weight(base.weight, tensorization).cores
    x, wrong = torch.randn(2, 7, 11, 9), []
    for count, (stride, padding, dilation) in enumerate(product(STRIDES, PADDINGS, DILATIONS)):
        if padding == "same" and stride != 1:
            continue
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        dense = nn.Conv2d(7, 10, kernel, bias=count % 2 == 0, **options)
        dense.weight.data.copy_(base.weight.data)
        layer = TTConv2d.from_cores(dense, tensorization, cores)
        inputs = x if count % 3 else x[0]
        wanted = dense(inputs)
        wrong += [(name, options) for name, y in runs(layer, inputs).items() if not close(y, wanted)]
    assert wrong == []


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_convolution_keeps_the_attributes_of_the_dense_one(weight_format: str) -> None:
    dense = nn.Conv2d(8, 6, (3, 2), (2, 1), (1, 0), (1, 2), padding_mode="reflect", bias=False)
    layer = TTConv2d.from_dense(dense, weight_format)
    names = [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "padding_mode",
        "groups",
    ]
    assert [getattr(layer, name) for name in names] == [getattr(dense, name) for name in names]
    assert layer.bias is None
    assert layer.spec == layer_spec(dense)


@pytest.mark.parametrize("execution", ["contract", "dense", "auto"])
@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (0, 5, 24)])
def test_an_empty_batch_of_features(execution: str, shape: tuple[int, ...]) -> None:
    dense = nn.Linear(24, 36)
    layer = TTLinear.from_dense(dense, max_rank=2)
    layer.execution = execution
    assert layer(torch.zeros(shape)).shape == dense(torch.zeros(shape)).shape


@pytest.mark.parametrize("weight_format", FORMATS)
def test_an_empty_batch_of_images(weight_format: str) -> None:
    dense = nn.Conv2d(8, 6, 3, padding=1)
    layer = TTConv2d.from_dense(dense, weight_format, max_rank=2)
    x = torch.zeros(0, 8, 5, 4)
    assert {y.shape for y in runs(layer, x).values()} == {dense(x).shape}


@pytest.mark.parametrize("weight_format", ["matrix", "lowrank"])
@pytest.mark.parametrize("max_rank", [1, 3])
def test_the_linear_weight_property_is_the_dense_weight(weight_format: str, max_rank: int) -> None:
    layer = TTLinear.from_dense(seeded(lambda: nn.Linear(41, 37)), weight_format, max_rank)
    np.testing.assert_allclose(layer.weight.detach().numpy(), dense_oracle(layer), atol=1e-6)
    x = torch.randn(5, 41)
    wanted = x.numpy() @ dense_oracle(layer).T + layer.bias.detach().numpy()  # type: ignore[union-attr]
    for y in runs(layer, x).values():
        np.testing.assert_allclose(y.detach().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("max_rank", [1, 3])
def test_the_convolution_weight_property_is_the_dense_weight(weight_format: str, max_rank: int) -> None:
    layer = TTConv2d.from_dense(seeded(lambda: nn.Conv2d(13, 10, (3, 2))), weight_format, max_rank)
    np.testing.assert_allclose(layer.weight.detach().numpy(), dense_oracle(layer), atol=1e-6)
    x = torch.randn(2, 13, 6, 5)
    wanted = nn.functional.conv2d(x.double(), torch.tensor(dense_oracle(layer)), layer.bias.double())  # type: ignore[union-attr]
    assert all(close(y, wanted.float()) for y in runs(layer, x).values())


def linear_with(out_modes: tuple[int, ...], in_modes: tuple[int, ...], cut: int, ranks: int) -> TTLinear:
    """A layer of random cores whose last `cut` outputs and inputs are padding."""
    modes = tuple(Mode(m, n, 1) for m, n in zip(out_modes, in_modes, strict=True))
    spec = LinearSpec(prod(in_modes) - cut, prod(out_modes) - cut, bias=True)
    return TTLinear(spec, Tensorization("matrix", modes), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("out_modes", "in_modes"),
    [
        ((32, 16), (16, 32)),
        ((8, 8, 8), (8, 8, 8)),
        ((5, 5, 5, 5), (4, 5, 5, 4)),
        ((4, 4, 4, 4, 3), (4, 4, 4, 4, 4)),
        ((3, 4, 4, 3, 4, 3), (4, 3, 3, 4, 3, 4)),
    ],
    ids=lambda modes: f"d={len(modes)}",
)
def test_random_cores_start_with_the_deviation_of_torchs_default(
    out_modes: tuple[int, ...], in_modes: tuple[int, ...], ranks: int
) -> None:
    torch.manual_seed(ranks)
    for cut, tolerance in ((0, 0.01), (3, 0.03)):
        layer = linear_with(out_modes, in_modes, cut, ranks)
        spread = float(np.sqrt(np.square(dense_oracle(layer)).mean()))
        assert spread == pytest.approx((3 * layer.in_features) ** -0.5, rel=tolerance)
        assert float(np.std(dense_oracle(layer))) == pytest.approx(spread, rel=0.01)
        assert layer.bias is not None
        assert float(layer.bias.detach().abs().max()) <= layer.in_features**-0.5
        assert float(layer.bias.detach().std()) == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.25)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("channels", [(32, 48), (31, 47)])
def test_random_convolutions_start_with_the_deviation_of_torchs_default(
    weight_format: str, ranks: int, channels: tuple[int, int]
) -> None:
    spec = ConvSpec(*channels, (3, 3))
    torch.manual_seed(ranks)
    layer = TTConv2d(spec, tensorize_shape(weight_format, spec.weight_shape), ranks)
    padded = prod(layer.tensorization.sizes) != prod(spec.weight_shape)
    found = float(np.sqrt(np.square(dense_oracle(layer)).mean()))
    assert found == pytest.approx((3 * 9 * channels[0]) ** -0.5, rel=0.05 if padded else 0.01)


def test_ranks_are_taken_as_given_even_when_infeasible() -> None:
    layer = linear_with((2, 2), (2, 2), 0, 9)
    assert layer.tt_ranks == (1, 9, 1)
    assert [tuple(core.shape) for core in layer.cores] == [(1, 2, 2, 1, 9), (9, 2, 2, 1, 1)]
    assert close(layer(torch.eye(4)).T - layer.bias[:, None], layer.weight, 1e-5)  # type: ignore[index]


CASES: list[tuple[type[Any], Callable[[], nn.Module], str, tuple[int, ...]]] = [
    (TTLinear, lambda: nn.Linear(24, 37), "matrix", (5, 24)),
    (TTLinear, lambda: nn.Linear(24, 37), "lowrank", (5, 24)),
    *((TTConv2d, lambda: nn.Conv2d(7, 10, 3, 2, 1), name, (2, 7, 6, 5)) for name in FORMATS),
    (TTConv1d, lambda: nn.Conv1d(7, 10, 3, 2, 1), "chain", (2, 7, 8)),
    (TTConv1d, lambda: nn.Conv1d(7, 10, 3, 2, 1), "matrix", (2, 7, 8)),
    (TTConv3d, lambda: nn.Conv3d(7, 5, 3, 2, 1), "chain", (2, 7, 3, 4, 3)),
    (TTConv2d, lambda: nn.Conv2d(6, 10, 3, 2, 1, groups=2), "chain", (2, 6, 4, 5)),
    (TTConv1d, lambda: nn.Conv1d(6, 10, 3, 2, 1, groups=2), "matrix", (2, 6, 8)),
    (TTConvTranspose1d, lambda: nn.ConvTranspose1d(7, 10, 3, 2, 1), "lowrank", (2, 7, 5)),
    (TTConvTranspose2d, lambda: nn.ConvTranspose2d(7, 10, 3, 2, 1), "chain", (2, 7, 4, 3)),
    (TTConvTranspose2d, lambda: nn.ConvTranspose2d(7, 10, 3, 2, 1), "matrix", (2, 7, 4, 3)),
    (TTConvTranspose3d, lambda: nn.ConvTranspose3d(7, 5, 3, 2, 1), "naive", (2, 7, 2, 3, 2)),
]
TYPES = [(torch.float64, 1e-12), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]
IDS = [f"{case[0].__name__}-{case[2]}" for case in CASES]
every_layer = pytest.mark.parametrize("case", CASES, ids=IDS)


def small(case: Any, max_rank: int | None = 3) -> tuple[Any, nn.Module, Tensor]:
    kind, make, weight_format, shape = case
    dense = seeded(make)
    return kind.from_dense(dense, weight_format, max_rank), dense, torch.randn(shape)


@every_layer
def test_no_storage_is_shared_with_the_dense_layer(case: Any) -> None:
    layer, dense, _ = small(case)
    before = [parameter.detach().clone() for parameter in dense.parameters()]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(a, b) for a, b in zip(dense.parameters(), before, strict=True))


def test_a_float64_weight_of_one_mode_is_copied_too() -> None:
    dense = nn.Linear(3, 2, bias=False).double()
    before = dense.weight.detach().clone()
    layer = TTLinear.from_dense(dense)
    assert len(layer.cores) == 1
    layer.cores[0].data.fill_(7.0)
    assert torch.equal(dense.weight.detach(), before)


@every_layer
def test_decomposing_draws_no_random_numbers(case: Any) -> None:
    kind, make, weight_format, _ = case
    dense, state = seeded(make), torch.get_rng_state()
    kind.from_dense(dense, weight_format, 2)
    assert torch.equal(torch.get_rng_state(), state)


@every_layer
def test_gradients_match_those_through_the_dense_weight(case: Any) -> None:
    layer, dense, x = small(case)
    layer, x = layer.double(), x.double().requires_grad_()

    def gradients(y: Tensor) -> list[Tensor]:
        return list(
            torch.autograd.grad(
                (y * torch.arange(y.numel()).view_as(y).sin()).sum(), [x, *layer.parameters()]
            )
        )

    parameters = {"weight": layer.weight, "bias": layer.bias}
    wanted = gradients(torch.func.functional_call(dense, parameters, (x,)))
    for execution in layer.executions:
        layer.execution = execution
        for found, exact in zip(gradients(layer(x)), wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
            assert bool(exact.any())


@every_layer
def test_deepcopy_is_independent(case: Any) -> None:
    layer, _, x = small(case)
    layer.execution = "dense"
    twin, wanted = deepcopy(layer), layer(x).detach()
    assert twin.execution == "dense"
    assert torch.equal(twin(x), wanted)
    twin.cores[0].data.zero_()
    assert torch.equal(layer(x), wanted)


def fresh(layer: Any, x: Tensor) -> Tensor:
    """What the layer says with nothing kept from before."""
    twin = deepcopy(layer)
    assert twin.cached_tensors() == []
    with torch.no_grad():
        y: Tensor = twin(x)
    return y


def changes() -> dict[str, Callable[[Any], object]]:
    def assigned(layer: Any) -> None:
        for core in layer.cores:
            core.data = core.data * 1.5

    def replaced(layer: Any) -> None:
        layer.cores = nn.ParameterList([nn.Parameter(core.detach() * 1.5) for core in layer.cores])

    def loaded(layer: Any) -> None:
        layer.load_state_dict({name: 1.5 * tensor for name, tensor in layer.state_dict().items()})

    def in_place(layer: Any) -> None:
        with torch.no_grad():
            layer.cores[0].mul_(1.5)

    def averaged(layer: Any) -> None:
        for core in layer.cores:
            core.data.mul_(0.5).add_(torch.full_like(core, 0.1).data)

    def shared_memory(layer: Any) -> None:
        layer.cores[0].detach().numpy()[:] *= 1.5

    def turned_around(layer: Any) -> None:
        for core in layer.cores:
            core.data.neg_()
        layer.cores[0].data.mul_(2)

    def poked(layer: Any) -> None:
        layer.cores[-1].data.flatten()[:: layer.cores[-1].shape[-1] + 1] += 2.0

    return {
        "in place": in_place, "assigned": assigned, "replaced": replaced, "loaded": loaded, "averaged": averaged,
        "shared memory": shared_memory, "turned around": turned_around, "poked": poked,
    }  # fmt: skip


@every_layer
@pytest.mark.parametrize("change", changes())
def test_what_is_kept_for_evaluation_follows_the_cores(case: Any, change: str) -> None:
    layer, _, x = small(case)
    layer.eval()
    for execution in layer.executions:
        layer.execution = execution
        with torch.no_grad():
            before = layer(x)
            made = [id(tensor) for tensor in layer.cached_tensors()]
            assert torch.equal(layer(x), before)
            assert made
            assert [id(tensor) for tensor in layer.cached_tensors()] == made
        changes()[change](layer)
        with torch.no_grad():
            after = layer(x)
        assert torch.equal(after, fresh(layer, x))
        assert not close(after, before)


def scaled(layer: Any, x: Tensor) -> Tensor:
    layer.bias = nn.Parameter(torch.full_like(layer.bias, 0.25)) if layer.bias is not None else None
    return x


STEPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{name: lambda layer, x, change=change: change(layer) or x for name, change in changes().items()},
    "other bias": scaled,
    "train": lambda layer, x: layer.train() and x,
    "eval": lambda layer, x: layer.eval() and x,
    "frozen": lambda layer, x: layer.requires_grad_(False) and x,
    "thawed": lambda layer, x: layer.requires_grad_() and x,
    "double": lambda layer, x: (layer.double(), x.double())[1],
    "float": lambda layer, x: (layer.float(), x.float())[1],
    "other images": lambda layer, x: torch.cat([x, x.flip(0)])[:3] * 1.5,
    "channels last": lambda layer, x: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "contiguous": lambda layer, x: x.contiguous(),
    "forced": lambda layer, x: setattr(layer, "execution", layer.executions[1]) or x,
    "dense": lambda layer, x: setattr(layer, "execution", "dense") or x,
    "auto": lambda layer, x: setattr(layer, "execution", "auto") or x,
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}


@every_layer
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(sorted(MODES))), max_size=8))
def test_no_history_of_calls_and_changes_is_seen_in_the_result(
    case: Any, steps: list[tuple[str, str]]
) -> None:
    layer, _, x = small(case)
    layer.eval()
    for step, mode in steps:
        x = STEPS[step](layer, x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert x.dtype == torch.float64 or layer(x).dtype == torch.bfloat16
        with MODES[mode]():
            results = [layer(x) for _ in range(2)]
        expected = fresh(layer, x)
        assert all(result.dtype == x.dtype and close(result, expected) for result in results)


def traced_graph(module: Any) -> str:
    return re.sub(r"\.?___torch_mangle_\d+", "", str(module.inlined_graph))


@every_layer
@torch.no_grad()
def test_a_traced_layer_is_the_same_whether_it_has_run_before_or_not(case: Any) -> None:
    layer, _, x = small(case)
    layer.eval()
    for execution in layer.executions:
        layer.execution = execution
        before = traced_graph(torch.jit.trace(deepcopy(layer), x))
        layer(x)
        traced = torch.jit.trace(layer, x)
        assert traced_graph(traced) == before
        for core in layer.cores:
            core.data.mul_(1.5)
        assert close(traced(x), layer(x))


@every_layer
def test_transformed_functions_keep_nothing(case: Any) -> None:
    """What a transform makes is of its one call."""
    layer, _, x = small(case)
    layer.eval().requires_grad_(False)
    wanted = torch.func.grad(lambda x: deepcopy(layer)(x).square().sum())(x)
    for _ in range(2):
        assert close(torch.func.grad(lambda x: layer(x).square().sum())(x), wanted)
        assert close(torch.vmap(layer)(x), layer(x))
        torch.func.hessian(lambda x: layer(x).square().sum())(x[:1])


def replica_of(module: nn.Module) -> nn.Module:
    """As nn.DataParallel makes them: without parameters, which are tensors that hang on others."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1)
    for name, child in module._modules.items():
        setattr(replica, name, replica_of(child))  # type: ignore[arg-type]
        replica._modules[name] = getattr(replica, name)
    return replica


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_replicas_of_data_parallel_compute_the_same(case: Any, training: bool, bias: bool) -> None:
    layer, _, x = small(case)
    if not bias:
        layer.bias = None
    layer.train(training)
    with torch.no_grad():
        wanted = layer(x)
        replica = replica_of(layer)
        assert close(replica(x), wanted)
        for core in layer.cores:
            core.mul_(1.5)
        assert close(replica_of(layer)(x), layer(x))
        assert close(replica(x), wanted)
    replica_of(layer)(x).sum().backward()
    assert all(core.grad is not None for core in layer.cores)
    assert repr(replica_of(layer))


@every_layer
@pytest.mark.parametrize("mode", MODES)
def test_layers_on_the_meta_device_give_shapes(case: Any, mode: str) -> None:
    layer, dense, x = small(case)
    with MODES[mode]():
        assert layer.eval().to("meta")(x.to("meta")).shape == dense(x).shape


@every_layer
def test_nothing_is_kept_where_gradients_flow_or_types_change(case: Any) -> None:
    layer, _, x = small(case)
    layer.eval()
    with torch.inference_mode():
        wanted = layer(x)
    y = layer(x)
    y.sum().backward()
    assert all(core.grad is not None for core in layer.cores)
    assert close(y, wanted)
    layer.requires_grad_(False)
    inputs = x.clone().requires_grad_()
    layer(inputs).sum().backward()
    assert inputs.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert close(layer(x), wanted)
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.train().cached_tensors() == []


@every_layer
def test_state_dict_round_trip(case: Any) -> None:
    layer, _, x = small(case)
    state = layer.state_dict()
    assert sorted(state) == sorted(["bias", *(f"cores.{k}" for k in range(len(layer.cores)))])
    other = seeded(lambda: type(layer)(layer.spec, layer.tensorization, layer.tt_ranks), 9)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


@every_layer
@pytest.mark.parametrize(("dtype", "tolerance"), TYPES)
def test_other_types(case: Any, dtype: torch.dtype, tolerance: float) -> None:
    layer, _, x = small(case)
    layer, x = layer.to(dtype), x.to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    exact = deepcopy(layer).double()
    exact.execution = "dense"
    wanted = exact(x.double())
    for y in runs(layer, x).values():
        assert y.dtype == dtype
        assert close(y.double(), wanted, tolerance)


@every_layer
def test_float16_cores_take_float32_input(case: Any) -> None:
    layer, _, x = small(case)
    layer = layer.half()
    exact = deepcopy(layer).double()
    assert all(close(y, exact(x.double()).float()) for y in runs(layer, x).values())


@every_layer
def test_autocast_gives_the_type_and_the_values_of_the_dense_layer(case: Any) -> None:
    layer, dense, x = small(case, max_rank=None)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = dense(x)
        outputs = runs(layer, x)
    assert wanted.dtype == torch.bfloat16
    assert all(close(y, wanted, 0.05) for y in outputs.values())


@every_layer
def test_under_autocast_cores_are_multiplied_in_float32(case: Any) -> None:
    """The weight is then rounded once, as a dense one is, whatever comes in; float64 stays float64."""
    layer, _, x = small(case)
    layer.execution = "dense"
    dense = dense_layer(layer)
    for images in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(images)
            wanted = dense(images)
        assert torch.equal(y, wanted)
        y.float().square().sum().backward()
    assert {core.grad.dtype for core in layer.cores} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64


@every_layer
def test_compile_without_graph_breaks(case: Any) -> None:
    layer, _, x = small(case)
    torch.compiler.reset()
    for execution in layer.executions:
        layer.execution = execution
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert close(compiled(x), layer(x))
        assert close(compiled(x[:1]), layer(x[:1]))


@every_layer
def test_compile_under_autocast(case: Any) -> None:
    layer, _, x = small(case)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert close(compiled(x), layer(x), 0.05)


@every_layer
def test_export_with_any_batch_size(case: Any) -> None:
    layer, _, x = small(case)
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    more = torch.cat([x, x, x])
    assert close(program.module()(more), layer(more))


@every_layer
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("weight_grad", "bias_grad"), [(True, False), (False, True)])
def test_training_flag_and_requires_grad_are_carried_over(
    case: Any, training: bool, weight_grad: bool, bias_grad: bool
) -> None:
    kind, make, weight_format, _ = case
    dense = make().train(training)
    dense.weight.requires_grad_(weight_grad)
    dense.bias.requires_grad_(bias_grad)  # type: ignore[operator, union-attr]
    layer = kind.from_dense(dense, weight_format, 2)
    assert layer.training == training
    assert all(core.requires_grad == weight_grad for core in layer.cores)
    assert layer.bias.requires_grad == bias_grad


@pytest.mark.parametrize("shape", [(5, 23), (5, 25), (24, 5), (1,)])
def test_linear_inputs_of_another_size(shape: tuple[int, ...]) -> None:
    layer = TTLinear.from_dense(nn.Linear(24, 37), max_rank=2)
    with pytest.raises(ShapeError, match=r"takes \(\.\.\., 24\)"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (2, 8, 5, 5), (7, 5), (1, 2, 7, 5, 5)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    layer = TTConv2d.from_dense(nn.Conv2d(7, 10, 3), max_rank=2)
    with pytest.raises(ShapeError, match=r"takes .* 7, height, width"):
        layer(torch.zeros(shape))


@every_layer
def test_whole_numbers_are_refused_not_rounded(case: Any) -> None:
    layer, _, x = small(case)
    with pytest.raises(ShapeError, match="floating-point"):
        layer(x.long())


@every_layer
def test_an_execution_that_does_not_exist(case: Any) -> None:
    layer, _, _ = small(case)
    with pytest.raises(ShapeError, match="execution must be one of auto"):
        layer.execution = "chain" if "contract" in layer.executions else "contract"


def test_a_batch_of_one_does_not_rebuild_the_weight() -> None:
    """Running by the cores is the cheaper one for few rows; the dense one wins at full rank with many."""
    for weight_format in ("matrix", "lowrank"):
        layer = TTLinear.from_dense(seeded(lambda: nn.Linear(256, 256)), weight_format, 4)
        assert layer._choice.cheaper(Calls(1, 1), cached=False, trains=True, device="cpu") == "contract"
    full = TTLinear.from_dense(seeded(lambda: nn.Linear(256, 256)))
    assert full._choice.cheaper(Calls(100_000, 100_000), cached=False, trains=True, device="cpu") == "dense"


@pytest.mark.parametrize(
    "move",
    [
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.share_memory(),
        lambda net: net.double().float(),
        lambda net: net.to_empty(device="meta").to_empty(device="cpu"),
    ],
    ids=["channels_last", "share_memory", "types", "to_empty"],
)
def test_a_network_moves_as_one_of_dense_layers(move: Callable[[nn.Module], nn.Module]) -> None:
    """Cores have five dimensions, which torch takes for volumes."""
    conv, linear = seeded(lambda: nn.Conv2d(3, 8, 3)), nn.Linear(8 * 6 * 6, 12)
    first, last = (
        TTConv2d.from_dense(conv, "chain", max_rank=4),
        TTLinear.from_dense(linear, "matrix", max_rank=3),
    )
    net = nn.Sequential(first, nn.Flatten(), last)
    before, x = deepcopy(net.state_dict()), torch.randn(2, 3, 8, 8)
    wanted = net(x)
    move(net)
    assert {name: each.shape for name, each in net.state_dict().items()} == {
        k: v.shape for k, v in before.items()
    }
    shared = [each.is_shared() for each in net.parameters()]
    net.load_state_dict(before)
    torch.testing.assert_close(net(x), wanted)
    assert [each.is_shared() for each in net.parameters()] == shared


def test_the_input_can_be_given_by_name() -> None:
    """By that of torch's own layers."""
    layer = TTLinear.from_dense(seeded(lambda: nn.Linear(12, 12)), "matrix", max_rank=3)
    x = torch.randn(2, 12)
    assert torch.equal(layer(input=x), layer(x))


@torch.no_grad()
def test_one_layer_serves_several_threads() -> None:
    """Between any two lines of one call comes another, which replaces what is kept, as from another thread."""
    layer = TTLinear.from_dense(seeded(lambda: nn.Linear(1024, 1024)), "matrix", max_rank=24).eval()
    few, many = torch.randn(1, 1024), torch.randn(512, 1024)
    made = set()
    for x in (few, many):
        layer(x)
        made.add(layer._cache.call.execution)  # type: ignore[union-attr]
    assert made == {"contract", "dense"}
    files = {module.__file__ for module in (base, choosing, cache)}
    calls = 0

    def come_between(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal calls
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            calls += 1
            # Or a third thread came before it, with a third shape.
            layer._cache.call = None
            layer(many if len(x) == 1 else few)
        return come_between

    for x in (few, many):
        sys.settrace(come_between)
        try:
            layer(x)
        finally:
            sys.settrace(None)
    assert calls > 20
