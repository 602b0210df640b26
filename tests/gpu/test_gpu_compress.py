"""Decomposition, calibration and measurements on the GPU: what comes of them is what comes of them on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.commands.compress import compress_file
from ttcompress.errors import PlanError
from ttcompress.files.writing import write_dense
from ttcompress.measure.bench import bench_file
from ttcompress.networks.zoo import Mlp
from ttcompress.recipe import Recipe
from ttcompress.records.report import Report
from ttcompress.tt.decompose import decompose_weight, squared_spectra
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.gpu

SHAPES = {"matrix": (60, 96), "chain": (24, 16, 3, 3), "naive": (24, 16, 3, 3), "lowrank": (48, 40)}


def decaying(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers whose singular values fall, as those of trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(shape[0], torch.Size(shape[1:]).numel(), generator=generator)
    outs, values, ins = torch.linalg.svd(matrix, full_matrices=False)
    return (outs * values * 0.8 ** torch.arange(len(values)) @ ins).reshape(shape)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )
    with torch.no_grad():
        for number, weight in enumerate(p for p in model.parameters() if p.dim() > 1):
            weight.copy_(decaying(*weight.shape, seed=number) / weight[0].numel() ** 0.5)
    return model.eval()


def images(count: int = 96) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def on_both(device: torch.device, **options: Any) -> list[tuple[nn.Module, Report]]:
    """Compressed on the CPU, and on the device."""
    return [ttcompress.compress(network(), device=str(each), seed=0, **options) for each in ("cpu", device)]


def shape_of(report: Report) -> list[Any]:
    return [(each.fqn, each.tensorization, each.tt_ranks) for each in report.plan.layers]


@pytest.mark.parametrize("given", [{"max_rank": 5}, {"eps": 0.2}, {"eps": 0.01}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", SHAPES)
def test_tt_svd(form: str, dtype: torch.dtype, given: dict[str, Any], device: torch.device) -> None:
    weight = decaying(*SHAPES[form]).to(dtype)
    view = tensorize_shape(form, SHAPES[form])
    wanted, found = (decompose_weight(each, view, **given) for each in (weight, weight.to(device)))
    assert all(core.device == device for core in found.cores)
    assert [core.shape for core in found.cores] == [core.shape for core in wanted.cores]
    assert found.relative_error == pytest.approx(wanted.relative_error, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize("form", SHAPES)
def test_spectra(form: str, device: torch.device) -> None:
    weight = decaying(*SHAPES[form])
    view = tensorize_shape(form, SHAPES[form])
    spectra = squared_spectra(weight, view), squared_spectra(weight.to(device), view)
    torch.testing.assert_close(*spectra, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [{"ratio": 2}, {"eps": 0.2}, {"ranks": 4, "conv_ranks": 6}, {"params": 9000, "dtype": "float16"}],
    ids=str,
)
def test_a_plan_by_weights_and_its_errors(options: dict[str, Any], device: torch.device) -> None:
    (_, wanted), (model, found) = on_both(device, **options)
    assert shape_of(found) == shape_of(wanted)
    for ours, theirs in zip(found.plan.layers, wanted.plan.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3, abs=2e-6)
    # The network goes back to where it was.
    assert {each.device.type for each in model.parameters()} == {"cpu"}


def test_calibration(device: torch.device) -> None:
    """The same plan; its errors as near as sums of other order, taken a hundred steps on, are."""
    effort = "default" if device.type == "cuda" else "fast"
    options = {"ranks": 4, "conv_ranks": 5, "calib": images(), "effort": effort}
    (here, wanted), (there, found) = on_both(device, **options)
    assert shape_of(found) == shape_of(wanted)

    with torch.no_grad():
        exact = network()(images(32))
        errors = [float((each(images(32)) - exact).norm() / exact.norm()) for each in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.2)
    for ours, theirs in zip(found.plan.layers, wanted.plan.layers, strict=True):
        assert ours.output_error is not None
        assert theirs.output_error is not None
        assert ours.output_error.keys() == theirs.output_error.keys()


def test_a_calibrated_budget(device: torch.device) -> None:
    (_, wanted), (_, found) = on_both(device, ratio=2, calib=images(), effort="fast")
    assert 2 <= found.compression <= 2.04
    assert {each.fqn for each in found.plan.layers} == {each.fqn for each in wanted.plan.layers}
    squares = [
        sum((each.predicted_error or 0) ** 2 for each in report.plan.layers) for report in (found, wanted)
    ]
    assert squares[0] == pytest.approx(squares[1], rel=0.05)


def test_accuracy_and_labels_from_the_cpu(device: torch.device) -> None:
    x = images()
    data = [(part, network()(part).argmax(1)) for part in x.split(32)]
    model, report = ttcompress.compress(network(), ratio=1.5, data=data, device=str(device))
    assert report.accuracy is not None
    assert report.accuracy["dense"] == 100
    again = ttcompress.evaluate(model, data, device=str(device))
    assert again.top1 == report.accuracy["compressed"]


# ------------------------------------------------------------------------------------------------------------- by time


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    """A compressed file."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    write_dense(folder / "mlp.pt", Mlp(width0=784, width1=300, width2=10).state_dict())
    # Left to itself, so small a network runs dense there.
    recipe = Recipe(ranks=4, format="lowrank", exec="contract", device=str(device))
    compress_file(folder / "mlp.pt", folder / "mlp-tt.safetensors", recipe)
    return folder / "mlp-tt.safetensors"


@pytest.mark.parametrize("training", [False, True])
def test_bench(training: bool, file: Path, device: torch.device) -> None:
    found = bench_file(file, batch_sizes=(1, 8), device=device, training=training)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    assert found["device"].startswith(name)
    for entry in found["batches"]:
        assert entry["dense"]["median"] > 0
        assert entry["compressed"]["median"] > 0
        peaks = [entry[side]["peak_memory"] for side in ("dense", "compressed")]
        assert training or peaks[1] < peaks[0]


def test_bench_in_compiled_networks(file: Path, gpu: torch.device) -> None:
    found = bench_file(file, batch_sizes=(1,), device=gpu, runtime="compile", with_layers=False)
    assert found["batches"][0]["compressed"]["median"] > 0


@pytest.mark.parametrize("asked", [1.01, 1e6])
def test_a_latency_is_kept_or_refused(asked: float, device: torch.device) -> None:
    torch.manual_seed(0)
    width = 4096 if device.type == "cuda" and asked < 2 else 512
    model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    found, refusal = 0.0, ""
    try:
        plan = ttcompress.plan(model, latency_ratio=asked, input_size=(width,), device=str(device))
        found = (plan.latency or {})["ratio"]
    except PlanError as error:
        refusal = str(error)
    assert found >= asked or "out of reach" in refusal
    assert refusal or asked < 1e6


def test_ways_to_run_by_measurement(device: torch.device) -> None:
    _, report = ttcompress.compress(
        network(), ratio=1.5, tune=True, input_size=(3, 12, 12), device=str(device)
    )
    for layer in report.plan.layers:
        assert layer.execution in layer.executions


def test_a_compressed_network_moves_as_any_other(file: Path, device: torch.device) -> None:
    here, there = ttcompress.load(file), ttcompress.load(file, device=str(device))
    x = torch.randn(5, 784)
    assert {each.device for each in there.state_dict().values()} == {device}
    with torch.no_grad():
        torch.testing.assert_close(there(x.to(device)).cpu(), here(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(there.cpu()(x), here(x))
