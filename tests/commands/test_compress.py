"""From checkpoint to file and back, each step the way a user takes it: elsewhere, with nothing but the file."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import ttcompress
from ttcompress.commands import compress as pipeline
from ttcompress.commands.evaluate import evaluate_file
from ttcompress.commands.expand import expand_file
from ttcompress.errors import ArchitectureError, CheckpointError, DataError, PlanError, TTCompressError
from ttcompress.files.header import METADATA_KEY, TensorInfo, canonical_json, read_header, read_metadata
from ttcompress.files.writing import write_safetensors
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.factories import load_factory
from ttcompress.networks.opening import open_dense
from ttcompress.networks.zoo import CifarResNet, Mlp
from ttcompress.planning.plan_file import read_plan, write_plan
from ttcompress.recipe import Recipe
from ttcompress.records.report import Report
from ttcompress.settings import Settings

WIDTHS = {"width0": 64, "width1": 96, "width2": 80, "width3": 10}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: CifarResNet(3),
    "mlp": lambda: Mlp(**WIDTHS),
    "squeezenet": lambda: torchvision.models.squeezenet1_1(num_classes=10),
    "mobilenet": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}
INPUTS = {"resnet20": (3, 32, 32), "mlp": (1, 8, 8), "squeezenet": (3, 64, 64), "mobilenet": (3, 64, 64)}
RECIPES = {
    "resnet20": Recipe(conv_ranks=6),
    "mlp": Recipe(ratio=2.0),
    "squeezenet": Recipe(conv_ranks=12),
    "mobilenet": Recipe(ranks=4, conv_ranks=6),
}
every_network = pytest.mark.parametrize("name", NETWORKS)

LOAD = """
import sys, torch
torch.set_num_threads(int(sys.argv[4]))
import ttcompress
model = ttcompress.load(sys.argv[1])
assert not model.training
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""
EXPANDED = """
import sys, torch
from ttcompress.networks.architectures import build
from ttcompress.records.report import Architecture
import json
reference = json.loads(sys.argv[4])
model = build(Architecture(**reference), device="cpu")
model.load_state_dict(torch.load(sys.argv[1], weights_only=True), strict=True)
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""
NET_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 96)
        self.norm = nn.BatchNorm1d(96)
        self.fc2 = nn.Linear(96, 64)
        self.encode = nn.Linear(64, 32, bias=False)
        self.decode = nn.Linear(64, 32, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("scale", torch.linspace(1, 2, 64), persistent=False)
        self.last = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.fc1(x.flatten(1))))
        x = self.fc2(x) * self.scale
        return self.last(torch.tanh(self.encode(x)) + self.decode(x))

def build():
    return Net()

def other():
    return nn.Sequential(nn.Linear(64, 10))
"""


def python(script: str, *arguments: object, cwd: Path, **environment: str) -> None:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def random_network(name: str) -> nn.Module:
    """With batch-norm statistics and biases that are not the neutral ones, so that mixing them up shows."""
    torch.manual_seed(3)
    model = NETWORKS[name]().eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
        elif key.endswith("num_batches_tracked"):
            tensor.fill_(11)
    return model


def images(name: str) -> Tensor:
    return torch.randn(3, *INPUTS[name], generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all NETWORKS, NAME.pt, and their compressed files, NAME-tt.safetensors; read only."""
    folder = tmp_path_factory.mktemp("networks")
    for name in NETWORKS:
        torch.save(random_network(name).state_dict(), folder / f"{name}.pt")
        pipeline.compress_file(folder / f"{name}.pt", folder / f"{name}-tt.safetensors", RECIPES[name])
    return folder


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "sources" / "net.py"
    path.parent.mkdir()
    path.write_text(NET_FILE)
    return path


@pytest.fixture
def net(net_file: Path) -> nn.Module:
    torch.manual_seed(1)
    return load_factory(f"{net_file}:build")().eval()


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def tensors_of(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


# --------------------------------------------------------------------------------------------------- in another process


@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "mlp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("squeezenet", "mobilenet")),
    ],
)
def test_a_fresh_process_with_only_the_file_gives_the_same_logits(
    folder: Path, tmp_path: Path, name: str
) -> None:
    network = open_dense(folder / f"{name}.pt")
    pipeline.compress_network(network, Settings.of(RECIPES[name]))
    x, alone = images(name), tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / f"{name}-tt.safetensors", alone / "only.safetensors")
    torch.save(x, tmp_path / "x")
    python(LOAD, "only.safetensors", tmp_path / "x", tmp_path / "y", torch.get_num_threads(), cwd=alone)
    expected = logits_of(network.model, x)
    assert expected.std() > 0
    assert torch.equal(torch.load(tmp_path / "y"), expected)
    assert names_in(alone) == ["only.safetensors"]


@every_network
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_expanded_has_the_original_keys_types_and_the_compressed_logits(
    folder: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    compressed, dense = folder / f"{name}-tt.safetensors", tmp_path / f"dense{suffix}"
    expand_file(compressed, dense)
    original = torch.load(folder / f"{name}.pt", weights_only=True)
    expanded = torch.load(dense, weights_only=True) if suffix == ".pt" else tensors_of(dense)
    assert {key: (t.shape, t.dtype) for key, t in expanded.items()} == {
        key: (t.shape, t.dtype) for key, t in original.items()
    }
    replaced = {f"{layer.fqn}.weight" for layer in Report.from_json(read_metadata(compressed)).plan.layers}
    assert {key for key in original if not torch.equal(original[key], expanded[key])} == replaced
    model = random_network(name)
    model.load_state_dict(expanded, strict=True)
    wanted = logits_of(ttcompress.load(compressed), images(name))
    assert (logits_of(model, images(name)) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_expanded_loads_strictly_in_a_fresh_process(folder: Path, tmp_path: Path) -> None:
    compressed = folder / "resnet20-tt.safetensors"
    expand_file(compressed, tmp_path / "dense.pt")
    torch.save(images("resnet20"), tmp_path / "x")
    reference = json.dumps(read_metadata(compressed)["architecture"])
    python(EXPANDED, "dense.pt", "x", "y", reference, cwd=tmp_path)
    wanted = logits_of(ttcompress.load(compressed), images("resnet20"))
    assert (torch.load(tmp_path / "y") - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_expanding_what_was_expanded_is_refused(folder: Path, tmp_path: Path) -> None:
    expand_file(folder / "mlp-tt.safetensors", tmp_path / "dense.safetensors")
    with pytest.raises(CheckpointError, match="not one that ttcompress wrote"):
        expand_file(tmp_path / "dense.safetensors", tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("name", ["mlp", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_same_input_and_seed_give_the_same_bytes_in_any_process(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Also with another number of threads, hash seed, working folder and output name."""
    option = {"mlp": ["--ratio", "2"], "resnet20": ["--conv-ranks", "6"]}[name]
    environments: list[dict[str, str]] = [
        {"PYTHONHASHSEED": "1"},
        {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2"},
    ]
    for number, environment in enumerate(environments):
        cwd = tmp_path / str(number)
        cwd.mkdir()
        arguments = ["compress", f"{folder}/{name}.pt", *option, "-o", f"out{number}.safetensors"]
        python(f"from ttcompress.cli import main; main({arguments})", cwd=cwd, **environment)
    first, second = ((tmp_path / f"{k}/out{k}.safetensors").read_bytes() for k in range(2))
    assert first == second == (folder / f"{name}-tt.safetensors").read_bytes()
    assert str(folder).encode() not in first


def test_threads_are_put_back(folder: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pipeline.compress_file(folder / "mlp.pt", tmp_path / "out.safetensors", RECIPES["mlp"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "out.safetensors").read_bytes() == (folder / "mlp-tt.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------- promises


@every_network
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float64"])
def test_written_is_what_the_plan_promised(
    folder: Path, tmp_path: Path, name: str, dtype: str | None
) -> None:
    recipe = replace(RECIPES[name], dtype=dtype)
    promised = pipeline.plan_file(folder / f"{name}.pt", recipe)
    done = pipeline.compress_file(folder / f"{name}.pt", tmp_path / "out.safetensors", recipe)
    infos, _ = read_header(tmp_path / "out.safetensors")
    source = torch.load(folder / f"{name}.pt", weights_only=True)
    assert promised.plan.params_after == done.plan.params_after < done.plan.params_before
    assert promised.plan.params_before == sum(p.numel() for p in NETWORKS[name]().parameters())
    assert sum(info.num_bytes for info in infos.values()) == promised.bytes_after == done.bytes_after
    assert (
        sum(t.numel() * t.element_size() for t in source.values())
        == promised.bytes_before
        == done.bytes_before
    )
    buffers = {key for key, _ in NETWORKS[name]().named_buffers()}
    assert sum(info.params for key, info in infos.items() if key not in buffers) == promised.plan.params_after
    for layer in promised.plan.layers:
        cores = {key: info for key, info in infos.items() if key.startswith(f"{layer.fqn}.cores.")}
        shapes = layer.tensorization.core_shapes(layer.tt_ranks)
        kind = {None: "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
        assert cores == {f"{layer.fqn}.cores.{k}": TensorInfo(kind, shape) for k, shape in enumerate(shapes)}
        assert f"{layer.fqn}.weight" not in infos
        assert layer.params_after < layer.params_before
    kept = {kept.name for kept in promised.plan.kept}
    assert all(
        torch.equal(tensor, source[key])
        for key, tensor in tensors_of(tmp_path / "out.safetensors").items()
        if key in kept
    )


@pytest.mark.parametrize(("dtype", "least"), [("float16", 1e-5), ("bfloat16", 1e-4)])
def test_narrow_cores_run_and_their_error_counts_the_cast(tmp_path: Path, dtype: str, least: float) -> None:
    """A weight of rank 1, where the cast is all the error there is."""
    module = random_network("mlp")
    dense = module.get_submodule("fc2").weight.detach()
    dense.copy_(torch.randn(80, 1) @ torch.randn(1, 96))
    compressed, report = ttcompress.compress(module, ranks=1, format="lowrank", include=["fc2"], dtype=dtype)
    (layer,) = report.plan.layers
    exact = copy.deepcopy(compressed).double().get_submodule("fc2").weight.detach()
    error = float((exact - dense).norm() / dense.norm())
    assert least < error < 1e-2
    assert layer.relative_error == pytest.approx(error, rel=0.05)
    ttcompress.save(compressed, report, tmp_path / "narrow.safetensors")
    loaded = ttcompress.load(tmp_path / "narrow.safetensors", factory=NETWORKS["mlp"])
    torch.testing.assert_close(
        logits_of(loaded, images("mlp")), logits_of(module, images("mlp")), rtol=0.05, atol=0.05
    )


def test_measured_errors_are_those_of_the_file(folder: Path) -> None:
    for name in NETWORKS:
        path = folder / f"{name}-tt.safetensors"
        compressed, dense = ttcompress.load(path), random_network(name)
        for layer in Report.from_json(read_metadata(path)).plan.layers:
            weight = dense.get_submodule(layer.fqn).weight.detach()
            error = (compressed.get_submodule(layer.fqn).weight.detach() - weight).norm() / weight.norm()
            assert layer.relative_error == pytest.approx(float(error), rel=1e-4)


def test_an_edited_plan_gives_exactly_its_count(folder: Path, tmp_path: Path) -> None:
    report = pipeline.plan_file(folder / "mlp.pt", Recipe(ranks=6, include=("fc2",)))
    path = tmp_path / "plan.json"
    write_plan(path, report.plan)
    data = json.loads(path.read_text())
    edited = next(layer for layer in data["layers"] if layer["fqn"] == "fc2")
    edited["tt_ranks"] = [1, 3, *edited["tt_ranks"][2:]]
    # A count that somebody forgot to change, or never could know, does not matter.
    edited["params_after"] = data["params_after"] = 1
    path.write_text(json.dumps(data))
    plan = read_plan(path)
    promised = pipeline.plan_file(folder / "mlp.pt", Recipe(), plan)
    done = pipeline.compress_file(folder / "mlp.pt", tmp_path / "out.safetensors", Recipe(), plan)
    written = sum(info.params for info in read_header(tmp_path / "out.safetensors")[0].values())
    assert written == done.plan.params_after == promised.plan.params_after == plan.params_after
    shapes = plan.layers[0].tensorization.core_shapes([1, 3, *edited["tt_ranks"][2:]])
    by_hand = sum(a * m * n * w * b for a, m, n, w, b in shapes)
    dense = Mlp(**WIDTHS).get_submodule("fc2").weight.numel()
    assert written == sum(p.numel() for p in Mlp(**WIDTHS).parameters()) - dense + by_hand
    assert written < report.plan.params_after


def test_a_plan_of_another_network_is_refused(folder: Path, tmp_path: Path) -> None:
    plan = pipeline.plan_file(folder / "mlp.pt", Recipe(ranks=6)).plan
    for name in ("resnet20", "squeezenet"):
        with pytest.raises(PlanError):
            pipeline.compress_file(folder / f"{name}.pt", tmp_path / "out.safetensors", Recipe(), plan)
    other = {**WIDTHS, "width3": 11}
    torch.save(Mlp(**other).state_dict(), tmp_path / "other.pt")
    with pytest.raises(PlanError, match="does not fit"):
        pipeline.compress_file(tmp_path / "other.pt", tmp_path / "out.safetensors", Recipe(), plan)
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------------------------------------------ user's networks


def test_factory_records_base_name_and_hash_only_and_is_asked_for_again(
    net: nn.Module, net_file: Path, tmp_path: Path
) -> None:
    checkpoint, output = tmp_path / "net.pt", tmp_path / "net-tt.safetensors"
    torch.save(net.state_dict(), checkpoint)
    report = pipeline.compress_file(checkpoint, output, Recipe(ranks=3, arch=f"{net_file}:build"))
    digest = __import__("hashlib").sha256(NET_FILE.encode()).hexdigest()
    assert read_metadata(output)["architecture"] == {
        "kind": "factory",
        "name": "net.py:build",
        "arguments": {},
        "sha256": digest,
    }
    assert str(tmp_path).encode() not in output.read_bytes()
    with pytest.raises(ArchitectureError, match=r"--arch .*factory="):
        ttcompress.load(output)
    assert {layer.fqn for layer in report.plan.layers} == {"encode", "fc1", "fc2"}
    loaded = ttcompress.load(output, factory=load_factory(f"{net_file}:build"))
    torch.testing.assert_close(logits_of(loaded, images("mlp")).std(), logits_of(loaded, images("mlp")).std())
    with pytest.raises(ArchitectureError, match="builds another network"):
        ttcompress.load(output, factory=load_factory(f"{net_file}:other"))


def test_a_file_never_imports_what_it_names(net: nn.Module, net_file: Path, tmp_path: Path) -> None:
    """net.py lies in the working folder and would leave a trace when imported; loading must not look at it."""
    checkpoint, output = tmp_path / "net.pt", tmp_path / "net-tt.safetensors"
    torch.save(net.state_dict(), checkpoint)
    pipeline.compress_file(checkpoint, output, Recipe(ranks=3, arch=f"{net_file}:build"))
    (tmp_path / "net.py").write_text("open('trace', 'w').close()\n" + NET_FILE)
    script = (
        "import sys, ttcompress\n"
        "try:\n    ttcompress.load(sys.argv[1])\n"
        "except ttcompress.TTCompressError as error:\n    sys.exit(0 if '--arch' in str(error) else 1)\n"
        "sys.exit(2)"
    )
    python(script, output, cwd=tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "num_batches_tracked absent"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tied_weights_hidden_buffers_and_absent_counters(
    net: nn.Module, net_file: Path, tmp_path: Path, tracked: bool, suffix: str
) -> None:
    checkpoint, output = tmp_path / "net.pt", tmp_path / "net-tt.safetensors"
    state = {key: tensor for key, tensor in net.state_dict().items() if tracked or "num_batches" not in key}
    torch.save(state, checkpoint)
    arch = f"{net_file}:build"
    report = pipeline.compress_file(checkpoint, output, Recipe(ranks=3, arch=arch))
    infos, _ = read_header(output)
    assert ("norm.num_batches_tracked" in infos) is tracked
    assert "decode.weight" not in infos
    assert "scale" not in infos
    assert report.tied == {"decode.weight": "encode.weight"}
    assert report.plan.params_before == sum(p.numel() for p in net.parameters())
    assert sum(info.num_bytes for info in infos.values()) == report.bytes_after
    # In another process, since this one has built the network already.
    script = LOAD.replace("load(sys.argv[1])", "load(sys.argv[1], factory=__import__('net').build)")
    torch.save(images("mlp"), tmp_path / "x")
    python(script, output, tmp_path / "x", tmp_path / "y", torch.get_num_threads(), cwd=net_file.parent)
    network = open_dense(checkpoint, arch)
    pipeline.compress_network(network, Settings.of(Recipe(ranks=3)))
    assert torch.equal(torch.load(tmp_path / "y"), logits_of(network.model, images("mlp")))
    loaded = ttcompress.load(output, factory=load_factory(arch))
    assert torch.equal(loaded.decode.weight, loaded.encode.weight)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.plan.params_after
    expand_file(output, tmp_path / f"dense{suffix}")
    expanded = open_dense(tmp_path / f"dense{suffix}", arch)
    assert expanded.tensors.keys() == state.keys()
    torch.testing.assert_close(
        logits_of(expanded.model, images("mlp")),
        logits_of(network.model, images("mlp")),
        rtol=1e-4,
        atol=1e-5,
    )


# ---------------------------------------------------------------------------------------------------------- in memory


def storages(module: nn.Module) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.numel()
    }


@every_network
def test_in_memory_no_storage_is_shared_and_the_source_stays(name: str) -> None:
    module = random_network(name)
    before = copy.deepcopy(module.state_dict())
    compressed, report = ttcompress.compress(module, **options_of(RECIPES[name]))
    assert storages(module).isdisjoint(storages(compressed))
    with torch.no_grad():
        for tensor in (*compressed.parameters(), *compressed.buffers()):
            tensor.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert sum(p.numel() for p in compressed.parameters()) == report.plan.params_after


def options_of(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in vars(recipe).items() if value not in (None, ())}


def test_inplace_changes_the_module_itself() -> None:
    module = random_network("mlp")
    compressed, _ = ttcompress.compress(module, ranks=5, inplace=True)
    assert compressed is module
    assert isinstance(module.get_submodule("fc2"), TTLinear)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_requires_grad_are_kept(training: bool) -> None:
    module = random_network("mlp").train(training)
    module.get_submodule("fc2").requires_grad_(False)
    compressed, _ = ttcompress.compress(module, ranks=5)
    assert all(part.training is training for part in compressed.modules())
    assert not any(p.requires_grad for p in compressed.get_submodule("fc2").parameters())
    assert all(p.requires_grad for p in compressed.get_submodule("fc1").parameters())


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
def test_in_memory_save_and_load_in_a_fresh_process(tmp_path: Path, name: str) -> None:
    compressed, report = ttcompress.compress(random_network(name), **options_of(RECIPES[name]))
    path = tmp_path / "saved.safetensors"
    ttcompress.save(compressed, report, path)
    assert report.bytes_after == sum(info.num_bytes for info in read_header(path)[0].values())
    with pytest.raises(ArchitectureError, match="factory="):
        ttcompress.load(path)
    factory = {"mlp": f"zoo.Mlp(**{WIDTHS})", "resnet20": "zoo.CifarResNet(3)"}[name]
    script = "from ttcompress.networks import zoo\n" + LOAD.replace(
        "argv[1])", f"argv[1], factory=lambda: {factory})"
    )
    torch.save(images(name), tmp_path / "x")
    python(script, path, "x", "y", torch.get_num_threads(), cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y"), logits_of(compressed, images(name)))
    with pytest.raises(CheckpointError, match="choose another name, or force"):
        ttcompress.save(compressed, report, path)
    ttcompress.save(compressed, report, path, force=True)


def test_save_after_training_on_keeps_the_trained_cores(tmp_path: Path) -> None:
    compressed, report = ttcompress.compress(random_network("mlp"), ranks=5)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.add_(0.125)
    ttcompress.save(compressed, report, tmp_path / "saved.safetensors")
    loaded = ttcompress.load(tmp_path / "saved.safetensors", factory=NETWORKS["mlp"])
    assert torch.equal(logits_of(loaded, images("mlp")), logits_of(compressed, images("mlp")))


def test_own_loader(tmp_path: Path) -> None:
    module = random_network("mlp")
    x = torch.randn(50, 64)
    labels = logits_of(module, x).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 16)
    compressed, report = ttcompress.compress(module, ranks=5, data=loader)
    assert report.accuracy is not None
    right = int((logits_of(compressed, x).argmax(1) == labels).sum())
    same = int((logits_of(compressed, x).argmax(1) == logits_of(module, x).argmax(1)).sum())
    assert report.accuracy["dense"] == 80.0
    assert report.accuracy["compressed"] == 100 * right / 50
    assert report.accuracy["agreement"] == 100 * same / 50
    low, high = report.accuracy["lost_interval"]
    assert low < report.accuracy["dense"] - report.accuracy["compressed"] < high
    assert report.accuracy["n"] == 50
    ttcompress.save(compressed, report, tmp_path / "saved.safetensors")
    assert ttcompress.read_report(tmp_path / "saved.safetensors").accuracy == report.accuracy


def test_own_metric(tmp_path: Path) -> None:
    def size(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters())

    compressed, report = ttcompress.compress(random_network("mlp"), ranks=5, metric=size)
    assert report.accuracy == {
        "metric": "size",
        "dense": float(report.plan.params_before),
        "compressed": float(report.plan.params_after),
        "n": None,
        "interval": None,
    }
    ttcompress.save(compressed, report, tmp_path / "saved.safetensors")
    assert ttcompress.read_report(tmp_path / "saved.safetensors").accuracy == report.accuracy


BATCH = (torch.randn(4, 64), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "error", "wanted"),
    [
        ({}, PlanError, "exactly one"),
        ({"ranks": 4, "ratio": 2.0}, PlanError, "exactly one"),
        ({"ranks": 0}, PlanError, "^ranks must be a whole number above 0"),
        ({"ranks": 4, "data": [BATCH], "metric": lambda module: 1.0}, PlanError, "not both"),
        ({"ranks": 4, "data": iter([BATCH])}, DataError, "read more than once"),
        ({"ranks": 4, "metric": lambda module: float("nan")}, DataError, "returned nan"),
        ({"ranks": 4, "metric": lambda module: float("inf")}, DataError, "returned inf"),
        ({"ranks": 4, "data": []}, DataError, "no image"),
        ({"ranks": 4, "include": ["nothing*"]}, PlanError, "nothing"),
        ({"ranks": 4, "device": "nonsense"}, PlanError, "device"),
        ({"ranks": 4, "calib_images": 20}, DataError, "^calib_images needs calib$"),
        ({"conv_ranks": 4}, PlanError, "nothing would be compressed"),
    ],
)
def test_in_memory_mistakes(options: dict[str, Any], error: type[TTCompressError], wanted: str) -> None:
    module = random_network("mlp")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=wanted):
        ttcompress.compress(module, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("options", [{"ranks": 4}, {"ratio": 2.0}, {"eps": 0.3}], ids=str)
def test_in_memory_nan_is_refused(options: dict[str, Any]) -> None:
    module = random_network("mlp")
    with torch.no_grad():
        module.get_submodule("fc2").weight[0, 0] = float("nan")
    with pytest.raises(TTCompressError, match="NaN"):
        ttcompress.compress(module, **options)


@pytest.mark.parametrize("options", [{"ranks": 4}, {"ratio": 2.0}, {"eps": 0.3}], ids=str)
def test_a_weight_of_zeros_stays_zero(tmp_path: Path, options: dict[str, Any]) -> None:
    module = random_network("mlp")
    torch.nn.init.zeros_(module.get_submodule("fc2").weight)
    compressed, report = ttcompress.compress(module, **options)
    assert compressed.get_submodule("fc2").weight.abs().max() == 0
    ttcompress.save(compressed, report, tmp_path / "saved.safetensors")
    layers = ttcompress.read_report(tmp_path / "saved.safetensors").layers
    assert [layer.relative_error for layer in layers if layer.fqn == "fc2"] == [0]


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("name", ["mlp", "resnet20"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_other_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source, output = tmp_path / "net.pt", tmp_path / "net-tt.safetensors"
    torch.save(random_network(name).to(dtype).state_dict(), source)
    report = pipeline.compress_file(source, output, RECIPES[name])
    assert {layer.weight_dtype for layer in report.plan.layers} == {str(dtype).removeprefix("torch.")}
    floating = {key: tensor for key, tensor in tensors_of(output).items() if tensor.is_floating_point()}
    assert {tensor.dtype for tensor in floating.values()} == {dtype}
    assert all(layer.relative_error is not None and layer.relative_error < 1 for layer in report.plan.layers)
    logits = logits_of(ttcompress.load(output), images(name).to(dtype))
    wanted = logits_of(ttcompress.load(output).double(), images(name).double())
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float64: 1e-12}[dtype]
    assert (logits.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    expand_file(output, tmp_path / "dense.pt")
    expanded = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert {tensor.dtype for tensor in expanded.values() if tensor.is_floating_point()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cores", [None, "float32", "float16", "bfloat16"])
def test_half_precision_is_measured_too(tmp_path: Path, dtype: torch.dtype, cores: str | None) -> None:
    source, output = tmp_path / "net.pt", tmp_path / "net-tt.safetensors"
    torch.save(random_network("mlp").to(dtype).state_dict(), source)
    report = pipeline.compress_file(source, output, Recipe(ranks=5, data="digits", dtype=cores))
    assert report.accuracy is not None
    assert report.accuracy["n"] == 360
    accuracy, data = evaluate_file(output, Recipe(data="digits"))
    assert (accuracy.top1, data) == (report.accuracy["compressed"], "digits@test")


# -------------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "damaged.safetensors"


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metadata = read_metadata(source)
    change(metadata)
    write_safetensors(target, tensors_of(source), metadata)


@pytest.mark.parametrize(
    "schema", ["ttcompress/2", "ttcompress/2.1", "ttcompress/10", "other/1", "", None, 1, ["ttcompress/1"]]
)
def test_another_schema_is_refused_naming_it(folder: Path, tmp_path: Path, schema: object) -> None:
    path = tmp_path / "newer.safetensors"
    rewrite(folder / "mlp-tt.safetensors", path, lambda metadata: metadata.update(schema=schema))
    for read in (ttcompress.load, ttcompress.read_report, lambda path: expand_file(path, tmp_path / "x.pt")):
        with pytest.raises(CheckpointError, match="ttcompress/1") as error:
            read(path)
        assert repr(schema) in str(error.value)
    assert names_in(tmp_path) == ["newer.safetensors"]


def test_a_minor_schema_is_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "minor.safetensors"
    rewrite(
        folder / "mlp-tt.safetensors", path, lambda metadata: metadata.update(schema="ttcompress/1.3", news=1)
    )
    assert torch.equal(
        logits_of(ttcompress.load(path), images("mlp")),
        logits_of(ttcompress.load(folder / "mlp-tt.safetensors"), images("mlp")),
    )


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown architecture": lambda m: m["architecture"].update(name="os.system"),
    "architecture of another kind": lambda m: m["architecture"].update(kind="module"),
    "another network": lambda m: m["architecture"].update(name="lenet5", arguments={}),
    "arguments that do not fit": lambda m: m["architecture"].update(arguments={"width0": 64, "width1": 10}),
    "arguments of no kind": lambda m: m["architecture"].update(arguments={"weights": "DEFAULT"}),
    "arguments are a list": lambda m: m["architecture"].update(arguments=[1]),
    "a layer that is not there": lambda m: m["layers"][0].update(fqn="fc9"),
    "a layer of no name": lambda m: m["layers"][0].update(fqn=None),
    "other ranks": lambda m: m["layers"][0].update(tt_ranks=[1, 2, 1]),
    "ranks of no number": lambda m: m["layers"][0].update(tt_ranks="15"),
    "a type of no dtype": lambda m: m["layers"][0].update(weight_dtype="load"),
    "a type of no text": lambda m: m["layers"][0].update(weight_dtype=7),
    "other modes": lambda m: m["layers"][0].update(out_modes=[1, 1]),
    "another shape": lambda m: m["layers"][0]["spec"].update(in_features=97),
    "an attribute that nobody knows": lambda m: m["layers"][0]["spec"].update(evil=1),
    "a layer less": lambda m: m["layers"].pop(0),
    "tied to nothing": lambda m: m.update(tied={"a.weight": "b.weight"}),
    "tied of no kind": lambda m: m.update(tied=[1]),
    "no layers": lambda m: m.pop("layers"),
    "no bytes": lambda m: m.pop("bytes_after"),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_metadata_that_lies_never_loads(
    folder: Path, tmp_path: Path, lie: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "lie.safetensors"
    rewrite(folder / "mlp-tt.safetensors", path, lie)

    def load_and_expand() -> None:
        ttcompress.load(path)
        expand_file(path, tmp_path / "dense.pt")

    with pytest.raises(TTCompressError) as error:
        load_and_expand()
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["lie.safetensors"]


@pytest.mark.parametrize("change", ["missing", "renamed", "reshaped"])
def test_tensors_that_do_not_fit_the_metadata(folder: Path, tmp_path: Path, change: str) -> None:
    source, path = folder / "mlp-tt.safetensors", tmp_path / "lie.safetensors"
    tensors = tensors_of(source)
    core = tensors.pop("fc2.cores.0")
    if change != "missing":
        tensors |= {"fc2.cores.9": core} if change == "renamed" else {"fc2.cores.0": core.reshape(-1)}
    write_safetensors(path, tensors, read_metadata(source))
    with pytest.raises(TTCompressError, match=r"cores\.0"):
        ttcompress.load(path)
    with pytest.raises(TTCompressError):
        expand_file(path, tmp_path / "dense.pt")
    assert names_in(tmp_path) == ["lie.safetensors"]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


SMALL = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats(-2, 2)
    | st.text(max_size=3)
    | st.just([])
    | st.just({})
)
VALUES = SMALL | st.lists(SMALL, max_size=2) | st.dictionaries(st.text(max_size=2), SMALL, max_size=2)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_other_value_in_the_metadata_gives_our_error_or_a_report(
    folder: Path, damaged: Path, data: st.DataObject
) -> None:
    source = folder / "mlp-tt.safetensors"
    metadata = read_metadata(source)
    *place, last = data.draw(st.sampled_from([path for path in places(metadata) if path]))
    inner: Any = metadata
    for key in place:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    write_safetensors(damaged, tensors_of(source), metadata)
    for read in (
        ttcompress.read_report,
        ttcompress.load,
        lambda path: expand_file(path, path.with_suffix(".pt"), True),
    ):
        try:
            read(damaged)
        except TTCompressError:
            continue


def test_canonical_metadata_has_no_time_and_no_path(folder: Path) -> None:
    _, metadata = read_header(folder / "mlp-tt.safetensors")
    text = metadata[METADATA_KEY]
    assert text == canonical_json(json.loads(text))
    assert "/" not in text.replace("ttcompress/1", "")
    assert not {"time", "date", "created", "host"} & set(json.loads(text))


# ------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(ratio=1e6), Recipe(ranks=4, include=("none",)), Recipe(ranks=4, device="tpu")]
)
def test_a_failure_writes_nothing_and_keeps_the_old_file(
    folder: Path, tmp_path: Path, recipe: Recipe
) -> None:
    output = tmp_path / "out.safetensors"
    output.write_text("old")
    with pytest.raises(TTCompressError):
        pipeline.compress_file(folder / "mlp.pt", output, recipe, force=True)
    assert output.read_text() == "old"
    assert names_in(tmp_path) == ["out.safetensors"]


def test_a_compressed_file_is_not_compressed_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed already"):
        pipeline.compress_file(folder / "mlp-tt.safetensors", tmp_path / "out.safetensors", Recipe(ranks=2))
    assert not names_in(tmp_path)


def test_evaluating_a_compressed_file_agrees_with_its_report(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    report = pipeline.compress_file(folder / "mlp.pt", output, Recipe(ranks=5, data="digits"))
    assert report.accuracy is not None
    compressed, _ = evaluate_file(output, Recipe(data="digits"))
    dense, _ = evaluate_file(folder / "mlp.pt", Recipe(data="digits"))
    assert (dense.top1, dense.top5) == (report.accuracy["dense"], report.accuracy["dense_top5"])
    assert (compressed.top1, compressed.top5) == (
        report.accuracy["compressed"],
        report.accuracy["compressed_top5"],
    )
    assert list(compressed.interval) == report.accuracy["interval"]
    assert compressed.n == 360


@pytest.mark.parametrize("ranks", [np.int64(4), np.array(4), np.array([2, 3]), [np.int32(2), np.int64(3)]])
def test_numbers_of_numpy_are_numbers(ranks: Any) -> None:
    linear = nn.Linear(64, 64)
    _, report = ttcompress.compress(nn.Sequential(linear, nn.Linear(64, 64)), ranks=ranks, include=["0"])
    plain = np.asarray(ranks).tolist()
    _, same = ttcompress.compress(nn.Sequential(linear, nn.Linear(64, 64)), ranks=plain, include=["0"])
    assert report.layers[0].tt_ranks == same.layers[0].tt_ranks
    assert report.recipe == same.recipe


def test_the_library_names_what_it_cannot_take() -> None:
    linear, conv = nn.Linear(64, 64), nn.Conv2d(8, 8, 3)
    with pytest.raises(PlanError, match="TTLinear stands for layers of another kind than Conv2d"):
        ttcompress.TTLinear.from_dense(conv)
    with pytest.raises(PlanError, match="TTConv2d stands for layers of another kind than Linear"):
        ttcompress.TTConv2d.from_dense(linear)
    for values in (np.ones((3, 3)), [[1.0]], 3.0):
        with pytest.raises(TTCompressError, match="takes a torch tensor, not"):
            ttcompress.tt_svd(values)  # type: ignore[arg-type]
    layer = ttcompress.TTLinear.from_dense(linear)
    with pytest.raises(TTCompressError, match=r"takes \(\.\.\., 64\), not \(\)"):
        layer(torch.tensor(1.0))
