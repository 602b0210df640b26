"""Cores of eight bits: what rounding may lose, and that files, networks and reports agree on what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import succeeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import weight_in_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ttcompress
from ttcompress.commands.compress import compress_file, plan_file
from ttcompress.commands.evaluate import evaluate_file
from ttcompress.commands.expand import expand_file
from ttcompress.commands.finetune import finetune_file
from ttcompress.errors import CheckpointError, ShapeError
from ttcompress.files.header import read_metadata
from ttcompress.files.shards import read_index
from ttcompress.networks.zoo import Mlp
from ttcompress.recipe import Recipe
from ttcompress.records.report import Report
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.quantize import LEVELS, as_stored, balanced, dequantize, quantize
from ttcompress.tt.shapes import tensorize_shape

pytestmark = pytest.mark.usefixtures("one_thread")
shapes = st.tuples(*[st.integers(1, 5)] * 5)
seeds = st.integers(0, 2**31)


def drawn(shape: tuple[int, ...], seed: int, spread: float = 6.0) -> Tensor:
    """Entries of very different sizes, some of them zero."""
    random = np.random.default_rng(seed)
    sizes = np.exp(spread * random.standard_normal(shape)) * random.integers(0, 4, shape).clip(max=1)
    return torch.from_numpy(random.standard_normal(shape) * sizes).float()


# ----------------------------------------------------------------------------------------------------------------- math


@given(shapes, seeds)
def test_no_entry_is_off_by_more_than_half_a_scale(shape: tuple[int, ...], seed: int) -> None:
    core = drawn(shape, seed)
    codes, scales = quantize(core)
    assert (codes.dtype, codes.shape) == (torch.int8, core.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, core.shape[-1:])
    exact, steps = core.double().numpy(), scales.double().numpy()
    # Scales are cut off to 16 bits, so that the largest entry may lie a little beyond the last code.
    most = np.abs(exact).max((0, 1, 2, 3))
    assert np.all(np.abs(codes.numpy() * steps - exact) <= 0.5 * steps + 2.0**-15 * most)
    assert np.all(steps <= most / LEVELS)
    assert np.all(steps >= most / LEVELS * (1 - 2.0**-14))


@given(shapes, seeds)
def test_what_was_quantized_is_quantized_to_the_same(shape: tuple[int, ...], seed: int) -> None:
    codes, scales = quantize(drawn(shape, seed))
    values = dequantize(codes, scales)
    assert np.array_equal(values.double().numpy(), codes.numpy().astype(np.float64) * scales.double().numpy())
    again = quantize(values)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 4)] * 4), min_size=1, max_size=4), seeds)
def test_balanced_cores_are_the_same_tensor(sizes: list[tuple[int, ...]], seed: int) -> None:
    ranks = [1, *(size[3] for size in sizes[:-1]), 1]
    cores = [
        drawn((ranks[k], *size[:3], ranks[k + 1]), seed + k, spread=2.0).double()
        for k, size in enumerate(sizes)
    ]
    even = balanced(cores)
    whole = [full(each) for each in (cores, even)]
    assert np.allclose(whole[0], whole[1], rtol=1e-9, atol=1e-12 * np.abs(whole[0]).max())
    for core in even[1:]:
        columns = core.abs().reshape(-1, core.shape[-1]).amax(0)
        relative = (core.abs() / columns.where(columns > 0, 1)).reshape(len(core), -1).amax(1)
        assert bool((relative <= 1).all())


def full(cores: list[Tensor]) -> Any:
    whole = np.ones((1, 1))
    for core in cores:
        whole = np.einsum("xa,asb->xsb", whole, core.double().numpy().reshape(len(core), -1, core.shape[-1]))
        whole = whole.reshape(-1, core.shape[-1])
    return whole


def test_balance_pays_where_singular_values_fall_off() -> None:
    left, right = (np.linalg.qr(np.random.default_rng(seed).standard_normal((64, 64)))[0] for seed in (0, 1))
    weight = torch.from_numpy(left @ np.diag(10.0 ** -np.linspace(0, 3, 64)) @ right)
    cores = decompose_weight(weight, tensorize_shape("lowrank", (64, 64)), 40).cores

    def missed(stored: list[Tensor]) -> float:
        return float(np.linalg.norm(full(stored) - full(list(cores))) / np.linalg.norm(full(list(cores))))

    assert missed(as_stored(cores, torch.int8)) < 0.6 * missed(
        [dequantize(*quantize(core)) for core in cores]
    )


@pytest.mark.parametrize("fmt", ["matrix", "naive", "chain", "lowrank"])
def test_the_error_of_a_decomposition_is_that_of_its_codes(fmt: str) -> None:
    weight = drawn((12, 10, 3, 3), 5, spread=1.0)
    tensorization = tensorize_shape(fmt, (12, 10, 3, 3))
    result = decompose_weight(weight, tensorization, 4, dtype=torch.int8)
    kept = [dequantize(*quantize(core)) for core in result.cores]
    assert all(torch.equal(core, again) for core, again in zip(result.cores, kept, strict=True))
    missed = weight.double().numpy() - weight_in_numpy(result.cores, weight.shape)
    assert result.relative_error == pytest.approx(
        np.linalg.norm(missed) / np.linalg.norm(weight.double().numpy()), 1e-5
    )


def test_values_without_a_scale_are_refused() -> None:
    with pytest.raises(ShapeError, match="wider"):
        as_stored([torch.full((1, 2, 1), 1e300, dtype=torch.float64)], torch.int8)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits.pt and its compressed file of eight bits, read only."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    network = Mlp(width0=64, width1=96, width2=40, width3=10)
    images, labels = digits()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), folder / "digits.pt")
    compress_file(folder / "digits.pt", folder / "small.safetensors", INT8)
    return folder


INT8 = Recipe(ratio=2, dtype="int8", data="digits", device="cpu")


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images / 16).float(), torch.from_numpy(bunch.target)


def stored_in_numpy(path: Path, fqn: str) -> list[Tensor]:
    """The cores of a layer as a reader makes them that knows nothing but docs/format.md."""
    tensors = load_file(path)
    names = sorted(name for name in tensors if name.startswith(f"{fqn}.cores."))
    codes = [tensors[name].numpy() for name in names]
    scales = [tensors[name.replace(".cores.", ".core_scales.")].numpy() for name in names]
    assert all(code.dtype == np.int8 for code in codes)
    return [torch.from_numpy(code * scale) for code, scale in zip(codes, scales, strict=True)]


def test_a_file_holds_codes_and_scales_and_the_report_says_what_they_are_worth(folder: Path) -> None:
    path, dense = folder / "small.safetensors", torch.load(folder / "digits.pt")
    report = Report.from_json(read_metadata(path))
    assert report.plan.layers
    for layer in report.plan.layers:
        assert layer.core_dtype == "int8"
        exact = dense[f"{layer.fqn}.weight"].double().numpy()
        missed = exact - weight_in_numpy(stored_in_numpy(path, layer.fqn), exact.shape)
        assert layer.relative_error == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(exact), rel=1e-5)
    tensors = load_file(path)
    assert report.bytes_after == sum(each.nbytes for each in tensors.values())
    assert report.bytes_after < 0.3 * report.bytes_before / report.plan.compression + 4 * 2000
    planned = plan_file(folder / "digits.pt", INT8)
    assert planned.bytes_after == report.bytes_after
    assert report.accuracy is not None
    assert evaluate_file(path, Recipe(data="digits", device="cpu"))[0].top1 == report.accuracy["compressed"]


def test_it_loads_in_a_fresh_process_and_is_saved_again_the_same(folder: Path, tmp_path: Path) -> None:
    path = folder / "small.safetensors"
    model = ttcompress.load(path)
    images = digits()[0][:7]
    code = (
        "import sys, torch, ttcompress\n"
        "model = ttcompress.load(sys.argv[1])\n"
        "torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    torch.save(images, tmp_path / "in.pt")
    files = [str(path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert torch.equal(torch.load(tmp_path / "out.pt"), model(images).detach())
    ttcompress.save(model, Report.from_json(read_metadata(path)), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_it_expands_and_is_trained_further_in_eight_bits(folder: Path, tmp_path: Path) -> None:
    path = folder / "small.safetensors"
    expand_file(path, tmp_path / "dense.pt")
    model, dense = ttcompress.load(path), Mlp(width0=64, width1=96, width2=40, width3=10)
    dense.load_state_dict(torch.load(tmp_path / "dense.pt"))
    images = digits()[0]
    assert torch.allclose(dense(images), model(images), atol=1e-4)
    recipe = Recipe(train="digits", data="digits", device="cpu", epochs=2, lr=0.05)
    report = finetune_file(path, tmp_path / "tuned.safetensors", recipe)
    before, after = load_file(path), load_file(tmp_path / "tuned.safetensors")
    assert {name: each.dtype for name, each in before.items()} == {
        name: each.dtype for name, each in after.items()
    }
    assert any(
        not torch.equal(each, after[name]) for name, each in before.items() if each.dtype == torch.int8
    )
    assert report.bytes_after == sum(each.nbytes for each in after.values())
    found = evaluate_file(tmp_path / "tuned.safetensors", Recipe(data="digits", device="cpu"))[0]
    assert report.accuracy is not None
    assert found.top1 == report.accuracy["compressed"]


def test_calibrated_and_searched_files_hold_what_was_measured(folder: Path, tmp_path: Path) -> None:
    shared = {"dtype": "int8", "calib": "digits", "effort": "fast", "data": "digits", "device": "cpu"}
    for name, goal in (("ratio", {"ratio": 3}), ("drop", {"max_drop": 5, "val": "digits"})):
        report = compress_file(
            folder / "digits.pt", tmp_path / f"{name}.safetensors", Recipe(**shared, **goal)
        )
        found = evaluate_file(tmp_path / f"{name}.safetensors", Recipe(data="digits", device="cpu"))[0]
        assert report.accuracy is not None
        assert found.top1 == report.accuracy["compressed"]
        dense = torch.load(folder / "digits.pt")
        for layer in report.plan.layers:
            exact = dense[f"{layer.fqn}.weight"].double().numpy()
            missed = exact - weight_in_numpy(
                stored_in_numpy(tmp_path / f"{name}.safetensors", layer.fqn), exact.shape
            )
            assert layer.relative_error == pytest.approx(
                np.linalg.norm(missed) / np.linalg.norm(exact), rel=1e-4
            )


def test_an_edited_plan_mixes_types(folder: Path, tmp_path: Path) -> None:
    plan = plan_file(folder / "digits.pt", Recipe(ratio=2)).plan.to_json()
    first, second = [entry for entry in plan["layers"] if "tt_ranks" in entry][:2]
    first["core_dtype"], second["core_dtype"] = "int8", "float16"
    (tmp_path / "plan.json").write_text(json.dumps({"schema": "ttcompress-plan/1", **plan}))
    text = succeeded(
        "compress", folder / "digits.pt", "--plan", "plan.json", "-o", "mixed.safetensors", cwd=tmp_path
    )
    assert "cores             float16, int8\n" in text
    tensors = load_file(tmp_path / "mixed.safetensors")
    assert tensors[f"{first['fqn']}.cores.0"].dtype == torch.int8
    assert tensors[f"{second['fqn']}.cores.0"].dtype == torch.float16
    assert f"{second['fqn']}.core_scales.0" not in tensors
    assert ttcompress.load(tmp_path / "mixed.safetensors")(digits()[0]).isfinite().all()


def test_weights_only_in_one_file_and_in_shards(folder: Path, tmp_path: Path) -> None:
    tensors = {f"block.{k}.up.weight": drawn((48, 32), k, spread=0.5) for k in range(3)} | {
        "scale": torch.ones(3)
    }
    source = tmp_path / "net"
    source.mkdir()
    homes = {name: f"x-{k % 2}.safetensors" for k, name in enumerate(tensors)}
    for shard in set(homes.values()):
        save_file({name: each for name, each in tensors.items() if homes[name] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    recipe = Recipe(arch="none", ranks=6, dtype="int8", device="cpu")
    report = compress_file(source, tmp_path / "out", recipe)
    index = read_index(tmp_path / "out")
    assert index is not None
    held = {name: each for file in index.files for name, each in load_file(file).items()}
    assert report.bytes_after == sum(each.nbytes for each in held.values())
    for layer in report.plan.layers:
        stored = [held[name].numpy() * held[scale].numpy() for name, scale in names(layer)]
        exact = tensors[f"{layer.fqn}.weight"].double().numpy()
        missed = exact - weight_in_numpy([torch.from_numpy(core) for core in stored], exact.shape)
        assert layer.relative_error == pytest.approx(np.linalg.norm(missed) / np.linalg.norm(exact), rel=1e-5)
    expand_file(tmp_path / "out", tmp_path / "dense")
    again = read_index(tmp_path / "dense")
    assert again is not None
    assert again.homes == homes


def names(layer: Any) -> list[tuple[str, str]]:
    return list(zip(layer.core_shapes, layer.scale_shapes, strict=True))


def without_scales(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name.replace(".cores.", ".core_scales.")]


def of_another_type(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()


def of_another_length(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name.replace(".cores.", ".core_scales.")] = torch.ones(99)


@pytest.mark.parametrize("damage", [without_scales, of_another_type, of_another_length])
def test_damaged_files_are_refused(folder: Path, tmp_path: Path, damage: Any) -> None:
    path = folder / "small.safetensors"
    tensors = load_file(path)
    damage(tensors, next(name for name in tensors if name.endswith("cores.0")))
    metadata = {"format": "pt", "ttcompress": json.dumps(read_metadata(path))}
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    for use in (ttcompress.load, lambda file: expand_file(file, tmp_path / "dense.pt")):
        with pytest.raises(CheckpointError, match=r"bad\.safetensors: (lacks|holds other tensors) .*cores?"):
            use(tmp_path / "bad.safetensors")
    assert not (tmp_path / "dense.pt").exists()
