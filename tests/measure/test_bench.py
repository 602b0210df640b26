"""What `bench` measures: oracles for multiply-adds and memory, a fair dense side, and gates."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ttcompress
from ttcompress import cli
from ttcompress.commands.compress import compress_file
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.measure import bench, timing
from ttcompress.measure.runtimes import made_ready
from ttcompress.networks.surgery import expand_layers
from ttcompress.networks.zoo import Mlp
from ttcompress.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_dense(tmp_path / "mlp.pt", Mlp(width0=784, width1=300, width2=10).state_dict())
    compress_file(tmp_path / "mlp.pt", tmp_path / "small.safetensors", Recipe(ranks=4, format="lowrank"))
    return tmp_path / "small.safetensors"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, (3, 2), (2, 1), "valid", (1, 2), padding_mode="reflect", bias=False),
        nn.Flatten(),
        nn.Linear(12 * 3 * 6, 10),
    )


def test_the_dense_side_computes_the_same_with_ordinary_layers() -> None:
    model, _ = ttcompress.compress(network().half(), include=["*"], ranks=3, conv_ranks=3)
    x = torch.randn(2, 3, 8, 8)
    dense = expand_layers(ttcompress.compress(network(), include=["*"], ranks=3, conv_ranks=3)[0])
    wanted = ttcompress.compress(network(), include=["*"], ranks=3, conv_ranks=3)[0](x)
    torch.testing.assert_close(dense(x), wanted, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, TTLinear | TTConv2d) for module in dense.modules())
    original = dict(network().named_parameters())
    assert {name: tensor.shape for name, tensor in dense.named_parameters()} == {
        name: tensor.shape for name, tensor in original.items()
    }
    assert {tensor.dtype for tensor in expand_layers(model).parameters()} == {torch.float16}


def test_multiply_adds_are_those_of_the_formulas(file: Path) -> None:
    """784-300-10, the first layer of matrix rank 4: (784 + 300) 4 instead of 784 x 300 for each image."""
    result = bench.bench_file(file, batch_sizes=[1, 7])
    for entry in result["batches"]:
        last = 300 * 10
        assert entry["dense"]["multiply_adds"] == entry["batch"] * (784 * 300 + last)
        assert entry["compressed"]["multiply_adds"] == entry["batch"] * (4 * (784 + 300) + last)
        (layer,) = entry["layers"]
        assert layer["fqn"] == result["batches"][0]["layers"][0]["fqn"]
        assert layer["multiply_adds"]["dense"] == entry["batch"] * 784 * 300
    assert result["input_size"] == [1, 28, 28]


def test_cores_in_a_narrower_type_than_the_network(file: Path) -> None:
    compress_file(file.with_name("mlp.pt"), file, Recipe(ranks=4, dtype="float16"), force=True)
    result = bench.bench_file(file, batch_sizes=[2])
    assert result["dtype"] == "float32"


def testpeak_memory_is_weights_and_what_is_alive_together() -> None:
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Linear(200, 50), nn.Linear(50, 20)).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    # The largest moment: the ReLU's input and output, both of 10 x 200 numbers.
    assert bench.peak_memory(model, torch.randn(10, 100)) == weights + 4 * 10 * (200 + 200)


@pytest.mark.parametrize("execution", ["contract", "dense"])
def test_what_a_layer_keeps_counts_as_memory(execution: str) -> None:
    layer = TTLinear.from_dense(nn.Linear(100, 200, bias=False), "lowrank", 5).eval()
    layer.execution = execution
    kept = {"contract": 0, "dense": 4 * 100 * 200}[execution]
    results = {"contract": 10 * (5 + 200), "dense": 10 * 200}[execution]
    # The cores, and a copy by which the layer knows whether they have changed.
    cores = 2 * 4 * 5 * (100 + 200)
    assert bench.peak_memory(layer, torch.randn(10, 100)) == cores + kept + 4 * results


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_and_saves(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: tensor.clone() for name, tensor in ttcompress.load(file).state_dict().items()}
    code, out, _ = run(capsys, "bench", file, "--batch-sizes", "2", "--json", "--save", "--device", "cpu")
    result = json.loads(out)
    assert code == 0
    (entry,) = result["batches"]
    for side in ("dense", "compressed"):
        assert 0 < entry[side]["median"] <= entry[side]["p90"]
        assert entry[side]["throughput"] == pytest.approx(2 / entry[side]["median"])
    assert entry["memory_ratio"] < 1
    assert read_metadata(file)["bench"] == result
    after = ttcompress.load(file).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    code, out, _ = run(capsys, "report", file)
    assert (code, "inference         batch 2:" in out) == (0, True)
    code, out, _ = run(capsys, "bench", file, "--batch-sizes", "1,3", "--training")
    assert code == 0
    assert "training step" in out
    assert "batch 3: ratio" in out


def test_the_gate(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to five percent are noise."""
    for slow, expected in ((1.04, 0), (1.06, 1)):
        timings = timing.Timings([1.0] * 3, [slow] * 3)
        monkeypatch.setattr(bench, "by_turns", lambda *given, timings=timings: timings)
        code, _, err = run(capsys, "bench", file, "--fail-if-slower")
        assert code == expected
        assert ("slower" in err) == bool(expected)


def test_what_cannot_be_measured(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = file.with_name("mlp.pt")
    for arguments, message in (
        ((dense,), "holds no compressed layers"),
        ((file, "--batch-sizes", "0"), "--batch-sizes"),
        ((file, "--input-size", "3,5"), "does not take"),
    ):
        code, out, err = run(capsys, "bench", *arguments)
        assert (code, out) == (2, "")
        assert message in err


def test_the_layers_of_a_network_get_what_they_get_in_it() -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8)
    received: Tensor = timing.input_of(model, model[2], x)
    torch.testing.assert_close(received, model[1](model[0](x)))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_saved_figures_leave_the_file_where_and_for_whom_it_was(
    file: Path, tmp_path: Path, mode: int
) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "net.safetensors"
    link.symlink_to(Path("..") / file.name)
    file.chmod(mode)
    bench.save_bench(link, {"batches": []})
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert link.is_symlink()
    assert read_metadata(file)["bench"] == {"batches": []}
    assert sorted(each.name for each in tmp_path.iterdir()) == ["links", "mlp.pt", file.name]
    assert [each.name for each in link.parent.iterdir()] == [link.name]


@pytest.mark.parametrize(
    "arguments", [["--batch-sizes", "1000000000000"], ["--batch-sizes", "1,99999999999999999999"]]
)
def test_batches_that_no_machine_has_are_one_line(
    file: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "bench", file, "--input-size", "1,28,28", *arguments, "--device", "cpu")
    assert code == 2
    assert "more than this machine has memory for" in err
    assert err.count("\n") == 1


def test_inference_is_of_stock_layers_unless_told_otherwise(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    for arguments in ((), ("--layers", "tt"), ("--training",), ("--training", "--layers", "plain")):
        code, out, _ = run(
            capsys, "bench", file, "--batch-sizes", "2", "--device", "cpu", "--json", *arguments
        )
        assert code == 0
        seen.append(json.loads(out)["layers"])
    assert seen == ["plain", "tt", "tt", "plain"]
    # What TT layers keep beside their cores is left out.
    peaks = []
    for layers in ("tt", "plain"):
        result = bench.bench_file(file, batch_sizes=[2], layers=layers)
        peaks.append(result["batches"][0]["compressed"]["peak_memory"])
    assert peaks[1] < peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["compile", "onnx", "onnx-int8"])
def test_other_runtimes(runtime: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys,
        "bench",
        file,
        "--batch-sizes",
        "1,3",
        "--runtime",
        runtime,
        "--json",
        "--threads",
        "1",
        "--save",
    )
    result = json.loads(out)
    # The compiler logs what it likes.
    assert (code, err if runtime != "compile" else "") == (0, "")
    assert result["runtime"] == runtime
    for entry in result["batches"]:
        assert entry["time_ratio"] > 0
        assert entry["layers"] == []
        sizes = [entry[side]["file_bytes"] for side in ("dense", "compressed")]
        assert sizes == [None, None] if runtime == "compile" else sizes[1] < sizes[0] / 2
        assert entry["compressed"]["multiply_adds"] < entry["dense"]["multiply_adds"]
    code, out, _ = run(capsys, "bench", file, "--batch-sizes", "1", "--runtime", runtime)
    assert {"compile": "torch.compile", "onnx": "onnxruntime", "onnx-int8": "int8"}[runtime] in out
    code, out, _ = run(capsys, "report", file)
    assert code == 0
    assert {"compile": "torch.compile", "onnx": "onnxruntime", "onnx-int8": "int8"}[runtime] in out


def test_onnxruntime_computes_the_same_as_torch(file: Path) -> None:
    model = ttcompress.load(file)
    x = torch.randn(3, 1, 28, 28)
    for runtime, most in (("onnx", 1e-4), ("onnx-int8", 0.1)):
        ready = made_ready(runtime, model, x, training=False)
        (found,), wanted = ready.run(), model(x)
        assert isinstance(found, Tensor)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < most


def test_what_runtimes_refuse(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--runtime", "onnx", "--training"), "leave --training out"),
        (("--runtime", "tvm"), "tvm"),
        (("--threads", "0"), "--threads"),
    ):
        code, out, err = run(capsys, "bench", file, *arguments)
        assert (code, out, message in err) == (2, "", True), err


def test_threads_are_as_asked_and_then_as_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        bench, "bench_file", lambda *given, **named: seen.append(torch.get_num_threads()) or {}
    )
    monkeypatch.setattr("ttcompress.cli.print_json", lambda result: None)
    before = torch.get_num_threads()
    cli.commands.main(["bench", str(file), "--threads", "3", "--json"], standalone_mode=False)
    assert (seen, torch.get_num_threads()) == ([3], before)


def test_layers_get_numbers_in_the_shape_and_order_of_memory_of_what_they_receive() -> None:
    model = network()
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    received = timing.received_by(model, ["0", "2", "4"], x)
    wanted = model[1](model[0](x))
    made = received["2"].made_up()  # type: ignore[union-attr]
    assert (made.shape, made.stride()) == (wanted.shape, wanted.stride())
    # Tokens stay what they are: they are indices.
    table = nn.Sequential(nn.Embedding(5, 4))
    tokens = torch.tensor([[4, 1]])
    assert torch.equal(timing.received_by(table, ["0"], tokens)["0"], tokens)  # type: ignore[arg-type]


def test_the_faster_one_is_not_the_one_that_runs_first() -> None:
    order: list[str] = []
    timing.by_turns(lambda: order.append("dense"), lambda: order.append("compressed"), torch.device("cpu"))
    # Two to warm up, two to know how long they take.
    rounds = [order[start] for start in range(4, len(order), 2)]
    assert {rounds.count("dense"), rounds.count("compressed")} <= {len(rounds) // 2, -(-len(rounds) // 2)}


def test_memory_on_a_gpu_is_that_of_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are there too: what was allocated before the forward pass does not count, its own weights do."""
    allocated = {"now": 50_000, "peak": 90_000}
    model = nn.Sequential(nn.Linear(10, 5), nn.Identity())

    def reset(_: torch.device) -> None:
        allocated["peak"] = allocated["now"]

    def use(*_: object) -> None:
        allocated["peak"] = max(allocated["peak"], allocated["now"] + 300)

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    model.register_forward_hook(use)

    class There(Tensor):
        device = torch.device("cuda", 0)

    images = torch.ones(2, 10).as_subclass(There)
    assert bench.peak_memory(model, images) == 4 * (10 * 5 + 5) + 300
