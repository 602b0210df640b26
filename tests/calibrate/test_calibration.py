"""Calibration on toy networks against NumPy on all that their layers see: moments, cores, sweeps, what decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from math import prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import ttcompress
from ttcompress.calibrate import measured, observe
from ttcompress.calibrate import pairs as pairs_module
from ttcompress.calibrate import statistics as calibrate
from ttcompress.calibrate.batch_norm import recalibrate_batch_norm
from ttcompress.calibrate.calibration import DEFAULT_IMAGES, Calibration, draw_calibration
from ttcompress.calibrate.decompose import decompose, weight_only
from ttcompress.calibrate.held_out_errors import network_error, output_errors
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.observe import layer_inputs
from ttcompress.calibrate.pairs import input_pairs
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.statistics import measure
from ttcompress.calibrate.sweeps import fit_layer, sweep_layers
from ttcompress.calibrate.uses import Kind, Use
from ttcompress.errors import DataError
from ttcompress.layers.spec import layer_spec, viewed
from ttcompress.networks.surgery import apply_plan
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.layers import ConvSpec, LayerSpec, LinearSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.tt import whiten
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.fit import output_error
from ttcompress.tt.shapes import tensorize_shape
from ttcompress.tt.whiten import Moments, output_cost, whitened

Full = NDArray[np.float64]
SEEDS = st.integers(0, 2**31)
PAD = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}


pytestmark = pytest.mark.usefixtures("one_thread")


class Images(nn.Module):
    """Strides, dilation, padding of all kinds, a residual, a layer that runs twice; `named_modules` goes backwards."""

    inplace = True

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)
        self.body = nn.Linear(9, 16)
        self.twice = nn.Conv2d(9, 9, 3, padding="same", dilation=2)
        self.inner = nn.Conv2d(6, 9, (3, 2), (2, 1), (1, 0), padding_mode="reflect")
        self.first = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.inner(functional.relu(self.first(x), self.inplace)), self.inplace)
        y = y + self.twice(functional.relu(self.twice(y)))
        return self.head(functional.relu(self.body(y.mean((2, 3)))))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A transformer block on whole numbers; no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 24), nn.Linear(24, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(functional.gelu(self.up(x)))).mean(1))  # type: ignore[no-any-return]


ORDER = {
    "images": ["first", "inner", "twice", "body", "head"],
    "tokens": ["up", "down", "head"],
    "vectors": ["0", "2"],
}
nets = pytest.mark.parametrize("name", ORDER)


def toy(name: str, count: int = 48, seed: int = 0) -> tuple[nn.Module, Calibration]:
    torch.manual_seed(seed)
    if name == "images":
        model, inputs = Images(), torch.randn(count, 3, 7, 6).cumsum(2).double()
    elif name == "tokens":
        model, inputs = Tokens(), torch.randint(0, 11, (count, 5))
    else:
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Sigmoid(), nn.Linear(16, 3))
        inputs = torch.randn(count, 12).cumsum(1).double()
    return model.double().eval().requires_grad_(False), calibrated(inputs)


def calibrated(inputs: Tensor, size: int = 16) -> Calibration:
    return draw_calibration(
        "toy", len(inputs), None, 0, lambda indices: inputs[torch.tensor(indices)].split(size)
    )


def specs(model: nn.Module, names: Sequence[str]) -> dict[str, LayerSpec]:
    return {name: layer_spec(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]


def columns(module: Any, x: Tensor) -> Full:
    """The oracle: what the weight multiplies, at all positions, (in kh kw, rows)."""
    values = x.numpy().copy()
    if not hasattr(module, "kernel_size"):
        return values.reshape(-1, values.shape[-1]).T
    pads, spans = [(0, 0), (0, 0)], []
    for k, d, p in zip(module.kernel_size, module.dilation, [*module.padding][:2], strict=True):
        both = {"same": d * (k - 1), "valid": 0}.get(module.padding, 0) if isinstance(p, str) else 2 * p
        pads.append((both // 2, both - both // 2))
        spans.append(d * (k - 1) + 1)
    padded = np.pad(values, pads, PAD[module.padding_mode])  # type: ignore[call-overload]
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, (2, 3))
    (down, right), dilation = module.stride, module.dilation
    windows = windows[:, :, ::down, ::right, :: dilation[0], :: dilation[1]].transpose(1, 4, 5, 0, 2, 3)
    return windows.reshape(prod(windows.shape[:3]), -1)


def seen(model: nn.Module, name: str, batches: Iterable[Tensor]) -> tuple[Full, Full]:
    """What goes into a layer over all images and calls, and what comes out, as columns."""
    calls: list[tuple[Full, Full]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.movedim(1, -1) if output.dim() == 4 else output
        calls.append((columns(module, inputs[0]), rows.reshape(-1, rows.shape[-1]).T.numpy().copy()))

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return np.concatenate([x for x, _ in calls], 1), np.concatenate([y for _, y in calls], 1)


def second(left: Full, right: Full) -> Full:
    return np.asarray(left @ right.T / left.shape[1])


def close(found: Tensor, expected: Full, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=rtol * float(np.abs(expected).max()))


def hooks(model: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


def is_same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------- draw


@settings(max_examples=100, deadline=None)
@given(
    available=st.integers(16, 300), share=st.one_of(st.none(), st.floats(0, 1)), seed=st.integers(0, 2**40)
)
def test_images_are_drawn_once_and_ordered_anew_for_every_pass(
    available: int, share: float | None, seed: int
) -> None:
    asked = None if share is None else round(16 + share * (available - 16))
    one, other = (draw_calibration("toy", available, asked, seed, lambda indices: indices) for _ in range(2))  # type: ignore[arg-type, return-value]
    fitting, held_out = [*one.fitting(0)], [*one.held_out()]
    assert (len(fitting), len(held_out)) == (one.num_images, one.num_held_out)
    assert one.num_held_out == (asked or available) // 8
    assert len({*fitting, *held_out}) == (asked or available) == len(fitting) + len(held_out)
    assert {*fitting, *held_out} <= set(range(available))
    assert [*other.held_out()] == held_out
    assert [*one.fitting(0)] == fitting == [*other.fitting(0)]
    again = [*one.fitting(1)]
    assert sorted(again) == sorted(fitting)
    assert again != fitting


def test_another_seed_draws_other_images() -> None:
    drawn = [{*draw_calibration("toy", 200, 50, seed, lambda indices: indices).fitting(0)} for seed in (0, 1)]  # type: ignore[arg-type, return-value]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("available", "asked", "message"),
    [
        (100, 101, "toy has 100 images, --calib-images asks for 101"),
        (100, 15, "at least 16 images, not 15"),
        (15, None, "at least 16 images, not 15"),
    ],
)
def test_too_few_images(available: int, asked: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        draw_calibration("toy", available, asked, 0, lambda indices: [])


def test_only_so_many_images_unless_asked() -> None:
    drawn = draw_calibration("toy", 10**6, None, 0, lambda indices: [])
    assert drawn.num_images + drawn.num_held_out == DEFAULT_IMAGES


# ------------------------------------------------------------------------------------------------------- columns

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
PADDING = st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"]))


@settings(max_examples=100, deadline=None)
@given(kernel=PAIR, stride=PAIR, dilation=PAIR, padding=PADDING, mode=st.sampled_from([*PAD]), seed=SEEDS)
def test_a_weight_times_its_columns_is_the_output(
    kernel: Any, stride: Any, dilation: Any, padding: Any, mode: str, seed: int
) -> None:
    torch.manual_seed(seed)
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation, 1, False, mode).double()
    x = torch.randn(2, 2, 9, 8).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(observe, "POSITIONS", 10**9)
        found, positions = layer_inputs(conv, x, seed)
        output = conv(x)
    assert positions == prod(output.shape[2:])
    np.testing.assert_array_equal(found.numpy(), columns(conv, x))
    torch.testing.assert_close(conv.weight.flatten(1) @ found, output.transpose(0, 1).flatten(1))


@settings(max_examples=100, deadline=None)
@given(
    most=st.sampled_from([4, 16, 64]),
    height=st.integers(3, 40),
    aspect=st.floats(1, 2),
    stride=PAIR,
    offset=st.integers(0),
)
def test_large_maps_are_sampled_on_a_grid(
    most: int, height: int, aspect: float, stride: Any, offset: int
) -> None:
    conv = nn.Conv2d(1, 1, (3, 2), stride, 1)
    x = torch.randn(2, 1, height, round(aspect * height))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "POSITIONS", most)
        found, positions = layer_inputs(conv, x, offset)
    whole = columns(conv, x).T.reshape(2, positions, -1)
    ours = found.numpy().T.reshape(2, -1, found.shape[0])
    assert min(most, positions) / 6 <= ours.shape[1] <= most + 2 * sqrt(most)
    for image, sample in zip(whole, ours, strict=True):
        assert {*map(tuple, sample)} <= {*map(tuple, image)}


def test_other_batches_show_other_positions() -> None:
    x = torch.arange(32.0 * 32).reshape(1, 1, 32, 32)
    shown = [{*layer_inputs(nn.Conv2d(1, 1, 1), x, offset)[0].flatten().tolist()} for offset in range(4)]
    assert {len(each) for each in shown} == {observe.POSITIONS}
    assert len(set.union(*shown)) == 4 * observe.POSITIONS


@pytest.mark.parametrize(("shape", "positions"), [((4, 6), 1), ((4, 5, 6), 5), ((4, 2, 5, 6), 10)])
def test_a_linear_layer_has_a_row_for_every_position(shape: tuple[int, ...], positions: int) -> None:
    linear, x = nn.Linear(6, 3, bias=False), torch.randn(shape)
    found, count = layer_inputs(linear, x)
    assert count == positions
    torch.testing.assert_close(linear.weight @ found, linear(x).reshape(-1, 3).T)


# ------------------------------------------------------------------------------------------------------- measure


@nets
def test_moments_are_those_of_all_that_the_layers_see(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "POSITIONS", 10**9)
    model, calibration = toy(name)
    state = deepcopy(model.state_dict())
    statistics = measure(model, specs(model, sorted(ORDER[name])), calibration, 0)
    assert [*statistics] == ORDER[name]
    for fqn, each in statistics.items():
        for moments, batches in (
            (each.inputs, calibration.fitting(0)),
            (each.held_out, calibration.held_out()),
        ):
            x, _ = seen(model, fqn, batches)
            close(moments.own, second(x, x))
            close(moments.means[0], x.mean(1))
        assert each.outputs.own.shape == (len(state[f"{fqn}.weight"]),) * 2
        values = np.linalg.eigvalsh(each.outputs.own.numpy())
        assert values[-1] > 0
        assert values[0] >= -1e-12 * values[-1]
        torch.testing.assert_close(
            each.outputs.own, each.outputs.own.T, rtol=0, atol=1e-12 * float(values[-1])
        )
    assert is_same(model, state)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert hooks(model) == 0


@nets
def test_little_memory_takes_more_passes_but_gives_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calibration = toy(name)
    at_once = measure(model, specs(model, ORDER[name]), calibration, 3)
    monkeypatch.setattr(calibrate, "MOMENT_BYTES", 1)
    passes: list[int] = []
    counted = Calibration("toy", 42, 6, lambda number: passes.append(number) or calibration.fitting(number),  # type: ignore[func-returns-value]
                          calibration.held_out)  # fmt: skip
    one_by_one = measure(model, specs(model, ORDER[name]), counted, 3)
    assert len(passes) == len(ORDER[name])
    assert [*at_once] == [*one_by_one]
    for fqn, each in at_once.items():
        for attribute in ("inputs", "held_out", "outputs"):
            close(getattr(one_by_one[fqn], attribute).own, getattr(each, attribute).own.numpy(), 1e-12)


@nets
def test_moments_take_no_more_memory_for_more_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whiten, "MATRIX_LIMIT", 10)
    monkeypatch.setattr(whiten, "SKETCH_ROWS", 7)
    shapes = []
    for count in (32, 160):
        model, calibration = toy(name, count)
        statistics = measure(model, specs(model, ORDER[name]), calibration, 0)
        held = [m for each in statistics.values() for m in (each.inputs, each.held_out, each.outputs)]
        assert any(moments.is_sketch for moments in held)
        shapes.append([(tuple(moments.own.shape), moments.num_bytes) for moments in held])
    for (few, size), (many, same) in zip(*shapes, strict=True):
        assert size == same
        assert few == many or few[0] <= many[0] == 7


@pytest.mark.parametrize("kind", ["vectors", "tokens", "images"])
def test_squared_norms_in_the_metric_are_changes_of_the_network(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the mean over images, for a linear network and independent positions; a shift of all logits is no change."""
    monkeypatch.setattr(measured, "EVEN", 0.0)
    monkeypatch.setattr(whiten, "DAMPING", 0.0)
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, 1) if kind == "images" else nn.Linear(6, 5)
    pool = {"vectors": nn.Identity(), "tokens": nn.Flatten(), "images": nn.Flatten()}[kind]
    shape = {"vectors": (6,), "tokens": (4, 6), "images": (6, 3, 2)}[kind]
    model = nn.Sequential(layer, pool, nn.LazyLinear(4))
    inputs = torch.randn(4096, *shape) * 3
    model(inputs[:1])
    model.requires_grad_(False)
    statistics = measure(model, specs(model, ["0"]), calibrated(inputs, 512), 0)["0"]
    changed = deepcopy(model)
    difference = torch.randn(layer.weight.shape)
    changed[0].weight += difference
    missed = changed(inputs) - model(inputs)
    expected = float((missed - missed.mean(1, keepdim=True)).square().sum(1).mean())
    tensorization = tensorize_shape("lowrank", tuple(layer.weight.shape))
    found = float(whitened(difference, tensorization, statistics.metrics(tensorization)).square().sum())
    assert found == pytest.approx(expected, rel=0.1)


class Averaged(nn.Module):
    """Classes of the mean output of a layer over all positions."""

    def __init__(self, layer: nn.Module, last: int) -> None:
        super().__init__()
        self.layer, self.classes, self.last = layer, nn.Linear(5, 4), last

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.layer(x).movedim(self.last, -1).flatten(1, -2).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "images", "upwards", "table"])
def test_what_positions_have_in_common_adds_up(
    kind: str, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of which all positions of an image see the same costs more than the sum of what each costs."""
    monkeypatch.setattr(measured, "EVEN", 0.0)
    monkeypatch.setattr(measured, "UNSEEN", 0.0)
    monkeypatch.setattr(whiten, "DAMPING", 0.0)
    torch.manual_seed(0)
    layer: Any = {
        "tokens": nn.Linear(6, 5),
        "images": nn.Conv2d(6, 5, 1),
        "upwards": nn.ConvTranspose2d(6, 5, 1),
        "table": nn.Embedding(6, 5),
    }[kind]
    count = 1 if alike else 12
    shape = {"tokens": (12, 6), "table": (12,)}.get(kind, (6, 3, 4))
    if kind == "table":
        inputs = torch.randint(0, 6, (4096, count)).expand(4096, 12)
    else:
        seen = (count, 6) if kind == "tokens" else (6, *(shape[1:] if count > 1 else (1, 1)))
        inputs = torch.randn(4096, *seen).expand(4096, *shape)

    model = Averaged(layer, 1 if kind in ("images", "upwards") else -1).requires_grad_(False)
    spec = specs(model, ["layer"])["layer"]
    found = measure(model, {"layer": spec}, calibrated(inputs, 512), 0)["layer"]

    view = tensorize_shape("lowrank", spec.view_shape)
    metrics = found.metrics(view)
    expected = cost = 0.0
    for difference in torch.randn(50, *layer.weight.shape):
        changed = deepcopy(model)
        changed.layer.weight += difference
        missed = changed(inputs) - model(inputs)
        expected += float((missed - missed.mean(1, keepdim=True)).square().sum(1).mean())
        cost += float(whitened(viewed(difference, spec), view, metrics).square().sum())
    assert cost == pytest.approx(expected, rel=0.2)


class Gated(nn.Module):
    """Gradients at the outputs of a layer that are 0 for some images and not for others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1000).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * x[:, :1]  # type: ignore[no-any-return]


def test_images_count_alike_whatever_the_size_of_their_batch() -> None:
    batches = [torch.zeros(30, 3), torch.ones(2, 3)]
    calibration = Calibration("toy", 32, 32, lambda number: batches, lambda: batches)
    gated = Gated()
    (found,) = measure(gated, specs(gated, ["layer"]), calibration, 0).values()
    for moments in (found.inputs, found.held_out):
        close(moments.own, np.full((3, 3), 2 / 32), 1e-6)
    assert found.inputs.trace * found.outputs.trace == pytest.approx(3 * 999 * 2 / 32, rel=0.2)


@pytest.mark.parametrize("bad", [0, 1], ids=["fitting", "held out"])
def test_hooks_go_also_when_something_breaks(bad: int) -> None:
    model, calibration = toy("images")
    batches = [[*calibration.fitting(0)], [torch.zeros(1, 3, 7, 6).double(), *calibration.held_out()]]
    batches[bad][-1] = batches[bad][-1] * float("nan")
    broken = Calibration("toy", 42, 7, lambda number: batches[0], lambda: batches[1])
    with pytest.raises(DataError, match="NaN"):
        measure(model, specs(model, ORDER["images"]), broken, 0)
    assert hooks(model) == 0
    with pytest.raises(DataError, match="does not take images"):
        measure(model, specs(model, ORDER["images"]), calibrated(torch.zeros(16, 4, 7, 6).double()), 0)
    assert hooks(model) == 0


# ------------------------------------------------------------------------------------------- decompose, fit_layer

CASES: list[tuple[Any, ...]] = [
    ("matrix", (8, 12), (2, 4), (3, 4)),
    ("matrix", (7, 11), (2, 4), (3, 4)),
    ("matrix", (4, 6, 3, 2), (2, 2), (2, 3)),
    ("chain", (5, 4, 3, 2)),
    ("naive", (5, 4, 3, 2)),
    ("lowrank", (5, 4, 3, 2)),
    ("lowrank", (6, 9)),
]
drawn_layers = given(
    case=st.sampled_from(CASES),
    cap=st.integers(1, 5),
    count=st.integers(1, 40),
    sketch=st.booleans(),
    seed=SEEDS,
)


def planned(case: Sequence[Any], cap: int) -> LayerPlan:
    shape, tensorization = case[1], tensorize_shape(*case)
    spec = (
        LinearSpec(shape[1], shape[0], True) if len(shape) == 2 else ConvSpec(shape[1], shape[0], shape[2:])
    )
    ranks = tuple(min(cap, most) for most in tensorization.max_ranks())
    return LayerPlan("layer", spec, tensorization, ranks, "float64")


def moments(size: int, count: int, seed: int, sketch: bool = False, moved: float = 0.0) -> Moments:
    """Of samples whose entries are of different sizes and go together."""
    rng = np.random.default_rng(seed)
    spread = np.diag(np.exp(2 * rng.standard_normal(size))) + 0.3 * rng.standard_normal((size, size))
    x = torch.tensor(spread @ rng.standard_normal((size, count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whiten, "MATRIX_LIMIT", 0 if sketch else size)
        made = Moments(size, moved > 0)
        made.add(x, x + moved * torch.tensor(rng.standard_normal((size, count))) if moved else None)
    return made


def test_a_share_of_the_output_metric_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eigenvalue e becomes 0.7 e + 0.3 mean(e), here up to the scale that another mode carries."""
    monkeypatch.setattr(whiten, "DAMPING", 0.0)
    inputs, outputs = moments(6, 40, 0), moments(5, 40, 1)
    metric = LayerStatistics(inputs, inputs, outputs, unfelt=0.3).metrics(tensorize_shape("lowrank", (5, 6)))[
        1
    ]
    values = np.linalg.eigvalsh(outputs.own.numpy())
    expected = 0.7 * values + 0.3 * values.mean()
    found = np.linalg.eigvalsh(metric.squared().out.numpy())
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-9)


@settings(max_examples=80, deadline=None)
@drawn_layers
def test_whitening_never_misses_the_outputs_by_more_than_weight_only(
    case: Any, cap: int, count: int, sketch: bool, seed: int
) -> None:
    layer, size = planned(case, cap), prod(case[1][1:])
    weight = torch.tensor(np.random.default_rng(seed).standard_normal(case[1]))
    inputs, held_out = (moments(size, each, seed, sketch) for each in (count, 5))
    statistics = LayerStatistics(inputs, held_out, moments(case[1][0], count, seed + 1), unfelt=0.2)
    cores = decompose(weight, layer, statistics)
    assert [tuple(core.shape) for core in cores] == layer.tensorization.core_shapes(layer.tt_ranks)
    found, plain = (weight - dense_weight(each, case[1]) for each in (cores, weight_only(weight, layer)))
    assert output_cost(found, inputs) <= output_cost(plain, inputs)
    outputs = statistics.output_metric
    assert output_cost(found, held_out, outputs) <= output_cost(plain, held_out, outputs)


@pytest.mark.parametrize("case", CASES[3:], ids=str)
def test_whitening_helps_where_inputs_are_uneven(case: Any) -> None:
    layer, size = planned(case, 2), prod(case[1][1:])
    weight = torch.tensor(np.random.default_rng(0).standard_normal(case[1]))
    inputs = moments(size, 200, 1)
    cores = decompose(weight, layer, LayerStatistics(inputs, inputs, moments(case[1][0], 200, 2)))
    found, plain = (weight - dense_weight(each, case[1]) for each in (cores, weight_only(weight, layer)))
    assert output_cost(found, inputs) < 0.9 * output_cost(plain, inputs)


@settings(max_examples=60, deadline=None)
@drawn_layers
def test_fitting_never_misses_the_outputs_by_more_than_weight_only(
    case: Any, cap: int, count: int, sketch: bool, seed: int
) -> None:
    layer, size = planned(case, cap), prod(case[1][1:])
    weight = torch.tensor(np.random.default_rng(seed).standard_normal(case[1]))
    pairs = moments(size, count, seed, sketch and len(case[1]) == 2, moved=0.3)
    plain = weight_only(weight, layer)
    start = [core + torch.randn(core.shape).double() for core in plain]
    before = [core.clone() for core in start]
    fitted = fit_layer(weight, layer, start, pairs, moments(case[1][0], count, seed + 1), seed % 2)
    error = output_error(weight, pairs)
    scale = float(error.quadratic(plain))
    assert error.value(fitted) <= error.value(plain) + 1e-9 * scale
    assert [core.shape for core in fitted] == [core.shape for core in plain]
    assert all(torch.equal(core, copy) for core, copy in zip(start, before, strict=True))


# -------------------------------------------------------------------------------------------------------- sweeps


def compressed(name: str) -> tuple[nn.Module, nn.Module, CompressionPlan, Calibration]:
    dense, calibration = toy(name, 96)
    model = deepcopy(dense)
    include = tuple(ORDER[name])
    plan = apply_plan(
        model, make_plan(dense, Recipe(ranks=2, conv_ranks=2, format="lowrank", include=include))
    )
    assert len(plan.layers) >= 2
    return dense, model, plan, calibration


@nets
def test_sweeps_change_cores_and_biases_only_and_bring_the_network_nearer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a layer has a bias and runs once, the mean of its output is that of the dense layer."""
    monkeypatch.setattr(observe, "POSITIONS", 10**9)
    dense, model, plan, calibration = compressed(name)
    statistics = measure(dense, specs(dense, ORDER[name]), calibration, 0)
    states, before = (
        [deepcopy(each.state_dict()) for each in (dense, model)],
        network_error(dense, model, calibration),
    )
    calls: list[str] = []
    reference = Reference(dense, statistics, calibration)
    sweep_layers(reference, model, plan, 1, lambda what, *_: calls.append(what))
    layers = {layer.fqn for layer in plan.layers}
    assert calls == [f"fitting {fqn}" for fqn in ORDER[name] if fqn in layers]
    assert is_same(dense, states[0])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, states[1][key])}
    allowed = {key for key in states[1] for fqn in layers if key.startswith((f"{fqn}.cores.", f"{fqn}.bias"))}
    assert {key for key in allowed if ".cores." in key} <= changed <= allowed
    assert network_error(dense, model, calibration) < before
    for fqn in layers - {"twice", "first"}:
        (_, ours), (_, theirs) = (seen(each, fqn, calibration.fitting(0)) for each in (model, dense))
        np.testing.assert_allclose(ours.mean(1), theirs.mean(1), atol=1e-9)
    assert hooks(dense) + hooks(model) == 0


def test_a_mean_that_the_bias_takes_up_costs_no_rank() -> None:
    """Inputs far from 0, with a bias that undoes it, are fitted as well as those around 0."""
    dense, model, plan, calibration = compressed("vectors")
    shift, missed = 300 * torch.randn(12).double(), []
    for moved in (0 * shift, shift):
        one, other = deepcopy(dense), deepcopy(model)
        for first in (one[0], other[0]):  # type: ignore[index]
            first.bias -= first.weight.detach() @ moved  # type: ignore[union-attr, operator]
        shifted = calibrated(moved + torch.cat([*calibration.fitting(0)]))
        reference = Reference(one, measure(one, specs(one, ["0", "2"]), shifted, 0), shifted)
        sweep_layers(reference, other, plan, 1)
        missed.append(output_errors(one, other, plan, shifted)["0"])
    assert missed[1] == pytest.approx(missed[0], rel=0.01)


@nets
def test_pairs_are_the_inputs_of_both_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "POSITIONS", 10**9)
    monkeypatch.setattr(pairs_module, "SWEEP_IMAGES", 17)
    dense, model, plan, calibration = compressed(name)
    fqn, last, ran = ORDER[name][1], "4" if name == "vectors" else "head", []
    for each in (dense, model):
        each.get_submodule(last).register_forward_hook(lambda *_: ran.append(1))
    (layer,) = [layer for layer in plan.layers if layer.fqn == fqn]
    pairs = input_pairs(dense, model, layer, Use(fqn, Kind.PRODUCT), calibration).fitted
    assert not ran
    batches = [*calibration.fitting(0)][:2]
    (ours, _), (theirs, _) = (seen(each, fqn, batches) for each in (model, dense))
    assert np.abs(ours - theirs).max() > 0.01
    close(pairs.own, second(ours, ours))
    close(pairs.crossed, second(theirs, ours))
    for found, expected in zip(pairs.means, (ours, theirs), strict=True):
        close(found, expected.mean(1))


# ------------------------------------------------------------------------------------------------------ deciding


@nets
def test_a_network_is_no_error_away_from_itself(name: str) -> None:
    dense, model, plan, calibration = compressed(name)
    vars(dense)["inplace"] = vars(model)["inplace"] = False
    assert network_error(dense, deepcopy(dense), calibration) == 0
    assert output_errors(dense, deepcopy(dense), plan, calibration) == {layer.fqn: 0 for layer in plan.layers}
    for fqn, error in output_errors(dense, model, plan, calibration).items():
        (_, ours), (_, theirs) = (seen(each, fqn, calibration.held_out()) for each in (model, dense))
        assert error == pytest.approx(
            sqrt(np.square(ours - theirs).sum() / np.square(theirs).sum()), rel=1e-9
        )
    assert hooks(dense) + hooks(model) == 0


@pytest.mark.parametrize(("shape", "is_logits"), [((), True), ((5,), False)])
def test_the_error_of_the_network_is_that_of_its_outputs(shape: tuple[int, ...], is_logits: bool) -> None:
    """A shift of all logits is none; a shift of all entries of other outputs is."""
    torch.manual_seed(0)
    dense = nn.Linear(6, 4).requires_grad_(False)
    model, shifted = deepcopy(dense), deepcopy(dense)
    model.weight += torch.randn(4, 6)
    shifted.bias += 3
    calibration = calibrated(torch.randn(80, *shape, 6), 3)
    images = torch.cat([*calibration.held_out()])
    ours, theirs = (each(images).double().numpy() for each in (model, dense))
    if is_logits:
        ours, theirs = (each - each.mean(1, keepdims=True) for each in (ours, theirs))
    expected = sqrt(np.square(ours - theirs).sum() / np.square(theirs).sum())
    assert network_error(dense, model, calibration) == pytest.approx(expected, rel=1e-5)
    assert (network_error(dense, shifted, calibration) > 1e-3) != is_logits


def test_outputs_without_power() -> None:
    dense, model = nn.Linear(6, 1), nn.Linear(6, 1)
    for parameter in dense.parameters():
        nn.init.zeros_(parameter)
    calibration = calibrated(torch.randn(80, 6))
    assert (network_error(dense, dense, calibration), network_error(dense, model, calibration)) == (0, 1)


# ---------------------------------------------------------------------------------------------------- batch norm


def test_batch_norm_takes_the_statistics_of_the_images() -> None:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm1d(4, momentum=None)]
    layers = [nn.Conv2d(3, 4, 3), norms[0], nn.Softplus(), nn.Flatten(2), norms[1], nn.Dropout(0.5)]
    model = nn.Sequential(*layers).double().eval()
    images = torch.randn(64, 3, 5, 5).double()
    state = deepcopy(model.state_dict())
    for size in (56, 28):
        calibration = calibrated(images, size)
        assert recalibrate_batch_norm(model, calibration)
        batches = [model[0](batch).detach() for batch in calibration.fitting(0)]
        for norm in norms:
            flat = [batch.transpose(0, 1).flatten(1) for batch in batches]
            close(norm.running_mean, np.mean([each.mean(1).numpy() for each in flat], 0))
            close(norm.running_var, np.mean([each.var(1).numpy() for each in flat], 0))
            batches = [
                functional.softplus(functional.batch_norm(batch, None, None, training=True))
                for batch in batches
            ]
        assert [norm.momentum for norm in norms] == [0.3, None]
        assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "weight" in key)


def test_without_batch_norm_there_is_nothing_to_do() -> None:
    model, calibration = toy("images")
    assert recalibrate_batch_norm(model, calibration) is False
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).eval()
    assert recalibrate_batch_norm(untracked, calibration) is False
    assert not untracked[0].training


class Unusual(nn.Module):
    """Images one by one, an input by name, and on demand a layer without gradients."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.first, self.conv = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.linear, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.stack([self.conv(self.first(each)).mean((1, 2)) for each in x])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.linear(input=found)
        return self.last(found)


def test_layers_may_be_called_in_unusual_ways() -> None:
    torch.manual_seed(0)
    net, images = Unusual(), torch.randn(48, 1, 8, 8)
    small, report = ttcompress.compress(net, ratio=1.5, calib=images)
    assert {layer.fqn for layer in report.plan.layers} <= {"conv", "linear"}
    assert report.calibration is not None
    missed = (small(images) - net(images)).detach()
    assert float(missed.norm()) < 0.9 * float(net(images).detach().norm())


def test_a_layer_without_gradients_is_named() -> None:
    with pytest.raises(DataError, match="linear runs without gradients"):
        ttcompress.compress(Unusual(frozen=True), ratio=1.5, calib=torch.randn(48, 1, 8, 8))


@pytest.mark.parametrize("dead", ["weight", "inputs", "images"])
def test_what_says_nothing_is_calibrated_all_the_same(dead: str) -> None:
    """A zero layer, as of a residual branch before training, units that never fire, images that are all black."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    images = torch.randn(64, 16)
    with torch.no_grad():
        if dead == "weight":
            net[2].weight.zero_()
        elif dead == "inputs":
            net[0].bias.fill_(-1e3)
        else:
            images.zero_()
    small, report = ttcompress.compress(net, ratio=1.5, calib=images)
    assert report.plan.layers
    torch.testing.assert_close(small(images), net(images), atol=1e-2, rtol=0)
