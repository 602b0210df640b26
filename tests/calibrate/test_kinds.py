"""Calibration of every kind of weight: what is seen of each, against NumPy, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import prod
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
from ttcompress.calibrate import decompose as decomposing
from ttcompress.calibrate import measured, observe, tables
from ttcompress.calibrate import statistics as calibrate
from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.calibrate.held_out_errors import network_error
from ttcompress.calibrate.layer_statistics import LayerStatistics
from ttcompress.calibrate.observe import layer_inputs, layer_outputs
from ttcompress.calibrate.shifts import Shift
from ttcompress.calibrate.statistics import measure
from ttcompress.layers.spec import unviewed, viewed
from ttcompress.networks.running import map_tensors, tensors_of
from ttcompress.planning.selection import find_layers
from ttcompress.records.layers import LayerSpec
from ttcompress.tt import whiten
from ttcompress.tt.shapes import tensorize_shape
from ttcompress.tt.whiten import whitened

Full = NDArray[np.float64]
SEEDS = st.integers(0, 2**31)


pytestmark = pytest.mark.usefixtures("one_thread")


def calibrated(inputs: Any, size: int = 16) -> Calibration:
    count = len(tensors_of(inputs)[0])

    def batches(indices: Sequence[int]) -> list[Any]:
        parts = torch.tensor(indices).split(size)
        return [map_tensors(lambda tensor, part=part: tensor[part], inputs) for part in parts]  # type: ignore[misc]

    return draw_calibration("toy", count, None, 0, batches)


def specs(model: nn.Module) -> dict[str, LayerSpec]:
    return {layer.fqn: layer.spec for layer in find_layers(model, ("*",)) if not layer.kept}


def statistics(model: nn.Module, calibration: Calibration, seed: int = 0) -> dict[str, LayerStatistics]:
    model.eval().requires_grad_(False)
    return measure(model, specs(model), calibration, seed)


def second(x: Full) -> Full:
    return np.asarray(x @ x.T / x.shape[1])


def close(found: Tensor, expected: Full, rtol: float = 1e-9) -> None:
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=rtol * scale)


# ------------------------------------------------------------------------------------------------------ networks


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(10, 16, num_layers=2, bidirectional=True, batch_first=True, **options)
        self.head = nn.Linear(2 * options.get("proj_size", 16), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))  # type: ignore[no-any-return]


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        seen = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return self.head(seen.mean(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """A table that is looked up and, as the same parameter, an output layer; either may come first."""

    def __init__(self, table_first: bool = True) -> None:
        super().__init__()
        if table_first:
            self.embed, self.out = nn.Embedding(40, 12), nn.Linear(12, 40, bias=False)
        else:
            self.out, self.embed = nn.Linear(12, 40, bias=False), nn.Embedding(40, 12)
        self.up = nn.Linear(12, 12)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.up(self.embed(tokens))).mean(1))  # type: ignore[no-any-return]


class Crossed(nn.Module):
    """Attention with other keys and values than queries, sequences first, and more keys of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 3, kdim=10, vdim=9, add_bias_kv=True)
        self.head = nn.Linear(12, 5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        return self.head(self.attend(query=q, key=k, value=v)[0].mean(0))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """A convolution, one in groups and a transposed one, of any number of axes."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        turned = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
        self.first = plain(4, 12, 3, 1, 1)
        self.grouped = plain(12, 12, 2, groups=3)
        self.turned = turned(12, 8, 3, 2, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.grouped(functional.relu(self.first(x))))
        return self.head(functional.relu(self.turned(y)).flatten(2).mean(2))  # type: ignore[no-any-return]


class Same(nn.Conv2d):
    """With a border of its own, as TensorFlow has it."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Foreign(nn.Module):
    """Parameters of its own, and modules that no layer of ours stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 20) / 4)
        self.both = nn.Bilinear(20, 20, 12)
        self.bag = nn.EmbeddingBag(30, 12)
        self.cell = nn.GRUCell(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = torch.tanh(x @ self.matrix)
        z = self.both(y, y) + self.bag(tokens)
        return self.head(self.cell(z, z))  # type: ignore[no-any-return]


def ids(count: int, most: int = 40) -> Tensor:
    """Some far more often than others, and every tenth never."""
    drawn = (most * torch.rand(count, 6) ** 3).long()
    return torch.where(drawn % 10 == 9, drawn - 1, drawn)


def rows(count: int) -> Tensor:
    return torch.randn(count, 7, 10).cumsum(1) / 2


Case = tuple[Callable[[], nn.Module], Callable[[int], Any]]
CASES: dict[str, Case] = {
    "lstm": (Recurrent, rows),
    "lstm with projections": (lambda: Recurrent(nn.LSTM, proj_size=9), rows),
    "gru": (lambda: Recurrent(nn.GRU), rows),
    "sentences": (Sentences, ids),
    "tied table": (Tied, ids),
    "tied output": (lambda: Tied(table_first=False), ids),
    "crossed attention": (
        Crossed,
        lambda n: (torch.randn(n, 6, 12), torch.randn(n, 4, 10), torch.randn(n, 4, 9)),
    ),
    "conv1d": (lambda: Windows(1), lambda n: torch.randn(n, 4, 12)),
    "conv2d": (lambda: Windows(2), lambda n: torch.randn(n, 4, 6, 7)),
    "conv3d": (lambda: Windows(3), lambda n: torch.randn(n, 4, 3, 4, 4)),
    "subclass": (
        lambda: nn.Sequential(
            Same(4, 12, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5)
        ),
        lambda n: torch.randn(n, 4, 6, 6),
    ),
    "foreign": (Foreign, lambda n: (torch.randn(n, 12), ids(n, 30))),
}
kinds = pytest.mark.parametrize("name", CASES)


def toy(name: str, count: int = 96) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    make, data = CASES[name]
    return make().eval(), data(count)


def as_calib(inputs: Any) -> Any:
    return [(inputs,)] if isinstance(inputs, tuple) else inputs


def run(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return output


def missed(model: nn.Module, other: nn.Module, inputs: Any) -> float:
    ours, theirs = run(other, inputs), run(model, inputs)
    return float((ours - theirs).norm() / theirs.norm())


# ------------------------------------------------------------------------------------------------ whole networks


def thinned(model: nn.Module, rank: int) -> nn.Module:
    """All weights of this rank as matrices."""
    thin = deepcopy(model)
    for layer in find_layers(thin, ("*",)):
        if not layer.kept:
            weight = viewed(layer.weight.detach(), layer.spec)
            axis = 2 if layer.spec.groups > 1 else 1
            u, s, v = torch.linalg.svd(weight.flatten(axis), full_matrices=False)
            low = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
            layer.weight.data.copy_(unviewed(low.reshape(weight.shape), layer.spec))
    return thin


@kinds
def test_full_rank_keeps_the_outputs(name: str) -> None:
    model, inputs = toy(name)
    thin = thinned(model, 2)
    small, report = ttcompress.compress(
        thin, ranks=2, conv_ranks=2, format="lowrank", include=("*",), calib=as_calib(inputs)
    )
    assert report.plan.layers
    assert missed(thin, small, inputs) < 1e-4
    assert all(layer.output_error is not None for layer in report.plan.layers)


@pytest.mark.slow
@kinds
def test_a_compressed_network_is_nearer_than_without_images_and_repeats_with_the_seed(name: str) -> None:
    model, inputs = toy(name, 160)
    _, others = toy(name, 64)
    options: dict[str, Any] = {"ratio": 1.5, "include": ("*",)}
    plain, _ = ttcompress.compress(model, **options)
    before = deepcopy(model.state_dict())
    small, again = (
        ttcompress.compress(model, **options, calib=as_calib(inputs), seed=3)[0] for _ in range(2)
    )
    assert missed(model, small, others) < missed(model, plain, others)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in small.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_whole_numbers_reach_the_network_as_they_are() -> None:
    seen: list[Tensor] = []
    model, tokens = toy("sentences")
    model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    ttcompress.compress(model, ratio=1.2, calib=tokens, include=("*",), effort="fast")
    assert seen
    known = {tuple(row) for row in tokens.tolist()}
    for batch in seen:
        assert batch.dtype == torch.int64
        assert {tuple(row) for row in batch.tolist()} <= known


# --------------------------------------------------------------------------------------------------- what is seen


def test_tokens_are_counted_exactly() -> None:
    model, tokens = toy("sentences", 200)
    calibration = calibrated(tokens)
    found = statistics(model, calibration)["embed"]
    for moments, batches in (
        (found.inputs, calibration.fitting(0)),
        (found.held_out, calibration.held_out()),
    ):
        drawn = torch.cat([*batches]).numpy()
        counts = np.bincount(drawn.ravel(), minlength=50)
        assert moments.is_diagonal
        close(moments.own, counts / drawn.size, 1e-12)
    assert found.outputs.own.shape == (16, 16)


def test_a_large_table_never_makes_a_matrix_of_its_rows() -> None:
    model = nn.Sequential(nn.Embedding(30_000, 4), nn.Flatten(), nn.Linear(24, 3))
    found = statistics(model, calibrated(ids(64)))["0"]
    assert found.inputs.num_bytes + found.held_out.num_bytes <= 16 * 30_000
    for name in ("lowrank", "matrix"):
        view = tensorize_shape(name, (4, 30_000))
        assert all(metric.inp.dim() == 1 for metric in found.metrics(view))


class Own(nn.Linear):
    """A Linear whose forward is not that of torch."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias) + 1


class Padded(nn.Conv2d):
    """Pads by itself, as networks that came from other libraries do."""

    def __init__(self, *sizes: int, by: int) -> None:
        super().__init__(*sizes)  # type: ignore[arg-type]
        self.by = by

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(input, [0, self.by] * 2), self.weight, self.bias)


def test_a_forward_that_does_as_its_layer_of_torch_is_that_layer() -> None:
    torch.manual_seed(0)
    own = nn.Sequential(
        Padded(3, 4, 1, by=0), nn.ReLU(), Padded(4, 5, 2, by=1), nn.Flatten(), nn.Linear(45, 3)
    )
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), *own[1:])
    plain.load_state_dict(own.state_dict())
    calibration = calibrated(torch.randn(32, 3, 3, 3))
    found, expected = statistics(own, calibration), statistics(plain, calibration)
    assert torch.equal(found["0"].inputs.own, expected["0"].inputs.own)
    assert found["0"].use == expected["0"].use
    assert found["0"].shift == Shift("0.bias")
    assert found["2"].use is None


def test_a_weight_of_unknown_use_has_the_moments_of_its_own_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """D = sum over images and positions of g x^T, with the same draws: E[D D^T] and E[D^T D] in NumPy."""
    monkeypatch.setattr(calibrate, "DRAWS", 14)
    torch.manual_seed(0)
    model = nn.Sequential(Own(6, 5), nn.Flatten(), nn.Linear(20, 3)).double()
    inputs = torch.randn(48, 4, 6).double()
    calibration = calibrated(inputs)
    found = statistics(model, calibration)["0"]

    generator, last = torch.Generator().manual_seed(0), model[2].weight.detach().numpy()
    sums: list[list[Full]] = [[], []]
    for part, batches in enumerate((calibration.fitting(0), calibration.held_out())):
        pieces = [piece for batch in batches for piece in batch.split(42 // 14)]
        for x in pieces:
            v = torch.randn(len(x), 3, generator=generator).double().numpy()
            g = ((v - v.mean(1, keepdims=True)) @ last).reshape(-1, 4, 5)
            sums[part].append(np.einsum("bpo,bpi->oi", g, x.numpy()))
    own, held_out = sums
    inner = sum(d.T @ d for d in own) / 42
    outer = sum(d @ d.T for d in own) / 42
    close(found.inputs.own, np.asarray(inner))
    close(found.outputs.own, np.asarray(outer / np.trace(inner)))
    close(found.held_out.own, np.asarray(sum(d.T @ d for d in held_out) / 6))


def test_both_ways_to_see_a_weight_agree_in_the_mean() -> None:
    """Gradients at the outputs of a linear network do not depend on its inputs, so that products come apart."""
    torch.manual_seed(0)
    known = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    unknown = deepcopy(known)
    unknown[0] = Own(6, 5)
    unknown.load_state_dict(known.state_dict())
    calibration = calibrated(torch.randn(6000, 6) @ torch.randn(6, 6), 64)
    one, other = (statistics(model, calibration)["0"] for model in (known, unknown))
    close(one.inputs.own / one.inputs.trace, (other.inputs.own / other.inputs.trace).numpy(), 0.15)
    close(one.outputs.own / one.outputs.trace, (other.outputs.own / other.outputs.trace).numpy(), 0.15)
    costs = [each.inputs.trace * each.outputs.trace for each in (one, other)]
    assert costs[1] == pytest.approx(costs[0], rel=0.15)


def test_gradients_of_a_weight_know_how_positions_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a mean over positions only the mean input matters, which products of moments do not see."""
    monkeypatch.setattr(measured, "EVEN", 0.0)
    monkeypatch.setattr(whiten, "DAMPING", 0.0)
    torch.manual_seed(0)

    class Pooled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x).mean(1))  # type: ignore[no-any-return]

    model, inputs = Pooled(Own(6, 5), nn.Linear(5, 4)), torch.randn(4096, 9, 6)
    found = statistics(model, calibrated(inputs, 512))["0"]
    changed, difference = deepcopy(model), torch.randn(5, 6)
    changed[0].weight += difference
    change = run(changed, inputs) - run(model, inputs)
    expected = float((change - change.mean(1, keepdim=True)).square().sum(1).mean())
    view = tensorize_shape("lowrank", (5, 6))
    cost = float(whitened(difference, view, found.metrics(view)).square().sum())
    assert cost == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_shows_what_its_projections_multiply(
    batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(12, 3, batch_first=batch_first)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x if batch_first else x.transpose(0, 1)
            seen.append((y, self.attend(y, y, y, attn_mask=mask, need_weights=False)[0]))
            return self.head(seen[-1][1].flatten(0, 1).reshape(len(x), -1, 12).mean(1))  # type: ignore[no-any-return]

    mask = torch.triu(torch.ones(5, 5), 1).bool()
    seen: list[tuple[Tensor, Tensor]] = []
    model = Net().double()
    calibration = calibrated(torch.randn(48, 5, 12).double())
    found = statistics(model, calibration)
    assert model.attend.out_proj.weight.shape == (12, 12)

    seen.clear()
    for batch in calibration.fitting(0):
        run(model, batch)
    x = np.concatenate([each.reshape(-1, 12).numpy() for each, _ in seen])
    y = np.concatenate([each.reshape(-1, 12).numpy() for _, each in seen])
    out = model.attend.out_proj
    values = np.linalg.solve(out.weight.numpy(), (y - out.bias.numpy()).T)
    close(found["attend.in_proj_weight"].inputs.own, second(x.T))
    close(found["attend.out_proj"].inputs.own, second(values), 1e-7)
    assert [*found] == ["attend.in_proj_weight", "attend.out_proj", "head"]


@pytest.mark.parametrize("table_first", [True, False])
def test_the_uses_of_a_tied_table_add_up(table_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lookups give counts of rows and a metric of columns, the output layer a metric of rows and moments of columns."""
    torch.manual_seed(0)
    model = Tied(table_first).double()
    calibration = calibrated(ids(64))
    (name,) = {"embed", "out"} & set(specs(model))
    found = statistics(model, calibration)[name]

    apart = Tied(table_first).double()
    apart.load_state_dict(model.state_dict())
    apart.out.weight = nn.Parameter(model.embed.weight.detach().clone())
    single = statistics(apart, calibration)
    table, output = single["embed"], single["out"]
    lookups = table.inputs.trace * table.outputs.trace
    products = output.inputs.trace * output.outputs.trace

    by_row = lookups * table.inputs.own / table.inputs.trace
    by_row += products * output.outputs.own.diagonal() / output.outputs.trace
    by_column = lookups * table.outputs.own / table.outputs.trace
    by_column += products * output.inputs.own / output.inputs.trace
    rows_of, columns_of = (found.inputs, found.outputs) if table_first else (found.outputs, found.inputs)
    assert rows_of.is_diagonal
    close(rows_of.own / rows_of.trace, (by_row / (lookups + products)).numpy())
    close(columns_of.own / columns_of.trace, (by_column / (lookups + products)).numpy())
    assert rows_of.trace * columns_of.trace == pytest.approx(lookups + products)


SIZES = st.integers(1, 3)


@settings(max_examples=120, deadline=None)
@given(
    axes=st.integers(1, 3), turned=st.booleans(), geometry=st.tuples(*[SIZES] * 9), seed=SEEDS, data=st.data()
)
def test_a_weight_times_its_columns_is_the_output_for_any_number_of_axes(
    axes: int, turned: bool, geometry: tuple[int, ...], seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    kernel, stride, dilation = (geometry[3 * k : 3 * k + axes] for k in range(3))
    name = f"Conv{'Transpose' if turned else ''}{axes}d"
    options: dict[str, Any] = {
        "stride": stride,
        "dilation": dilation,
        "padding": tuple(k - 1 for k in kernel),
    }
    if turned:
        most = min(max(s, d) for s, d in zip(stride, dilation, strict=True))
        options["output_padding"] = data.draw(st.integers(0, most - 1))
    conv = getattr(nn, name)(2, 3, kernel, bias=False, **options).double()
    x = torch.randn(2, 2, *[7, 6, 7][:axes]).double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(observe, "POSITIONS", 10**9)
        columns, positions = layer_inputs(conv, x, seed)
        output = conv(x)
        weight = conv.weight.transpose(0, 1) if turned else conv.weight
    assert positions == prod(output.shape[2:])
    torch.testing.assert_close(weight.flatten(1) @ columns, layer_outputs(conv, output))


def test_a_grid_over_a_transposed_convolution_meets_all_of_its_window() -> None:
    conv = nn.ConvTranspose2d(1, 1, 4, 2, 1)
    columns, _ = layer_inputs(conv, torch.ones(1, 1, 32, 32))
    assert bool((columns.sum(1) > 0).all())


# ---------------------------------------------------------------------------------------------------------- sweeps


@pytest.mark.parametrize("name", ["sentences", "conv1d", "conv3d"])
def test_sweeps_bring_all_that_is_seen_nearer(name: str) -> None:
    model, inputs = toy(name, 160)
    _, report = ttcompress.compress(
        model, ranks=3, conv_ranks=3, format="lowrank", include=("*",), calib=inputs, effort="fast"
    )
    assert report.calibration is not None
    errors = {entry["stage"]: entry["error"] for entry in report.calibration["stages"]}
    assert errors["sweeps"] < errors["whitened"]


def test_the_error_of_the_network_is_told_for_weights_of_all_kinds() -> None:
    model, inputs = toy("lstm")
    _, report = ttcompress.compress(model, ratio=1.5, include=("*",), calib=inputs, effort="fast")
    calibration = calibrated(inputs)
    assert network_error(model, model, calibration) == 0
    for layer in report.plan.layers:
        assert layer.output_error is not None
        assert all(0 < error < 1 for error in layer.output_error.values())


# ---------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", ["lowrank", "matrix"])
def test_rows_that_are_never_seen_keep_to_a_bound_which_the_report_tells(name: str) -> None:
    """A multiple of what they have at the same TT-ranks without images."""
    model, tokens = toy("sentences", 200)
    options: dict[str, Any] = {"ranks": 4, "format": name, "include": ("embed",)}
    plain, _ = ttcompress.compress(model, **options)
    small, report = ttcompress.compress(model, **options, calib=tokens)
    # What is held out decides, and is nothing to learn from.
    never = np.setdiff1d(np.arange(50), tokens.numpy())
    dense = model.embed.weight.detach()[never]

    def error(other: nn.Module) -> float:
        return float((other.embed.weight.detach()[never] - dense).norm() / dense.norm())

    assert 10 < len(never) < 20
    (layer,) = report.plan.layers
    assert error(small) <= tables.UNSEEN_LIMIT * error(plain)
    told = f"{len(never)} of 50 rows are not in the calibration data"
    bound = f"relative error is {error(small):.3f}, at most {tables.UNSEEN_LIMIT * error(plain):.3f}"
    assert layer.note == f"{told}; their {bound}"


def test_no_stage_gives_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "UNSEEN_LIMIT", 0.5)
    monkeypatch.setattr(decomposing, "UNSEEN_LIMIT", 0.5)
    model, tokens = toy("sentences", 200)
    options: dict[str, Any] = {"ranks": 4, "format": "lowrank", "include": ("embed",)}
    plain, _ = ttcompress.compress(model, **options)
    small, report = ttcompress.compress(model, **options, calib=tokens)
    assert report.calibration is not None
    assert not any(entry["kept"] for entry in report.calibration["stages"][1:])
    torch.testing.assert_close(small.embed.weight, plain.embed.weight)


def test_a_share_of_the_metric_of_a_table_is_even_over_its_rows() -> None:
    model, tokens = toy("sentences")
    found = statistics(model, calibrated(tokens))["embed"]
    counts = found.inputs.own
    even = measured.UNSEEN * counts.mean()
    close(found.input_metric.own, ((1 - measured.UNSEEN) * counts + even).numpy())
    assert float(found.input_metric.own.min()) > 0


def test_recurrent_modules_have_gradients_in_eval_mode() -> None:
    """Those of cuDNN have not, so that it is left out meanwhile."""
    before = torch.backends.cudnn.enabled
    seen: list[bool] = []
    for model in (Recurrent(), nn.Linear(2, 2)):
        with observe.gradients_in_eval(model):
            seen.append(torch.backends.cudnn.enabled)
        assert torch.backends.cudnn.enabled == before
    assert seen == [False, before]
