"""The command line as a user meets it: every mistake one line and exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Done, succeeded
from safetensors.torch import save_file
from torch import nn

from ttcompress.commands import compress as pipeline
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import read_header, read_metadata
from ttcompress.files.writing import write_safetensors
from ttcompress.networks.zoo import CifarResNet, Mlp

WIDTHS = {"width0": 64, "width1": 96, "width2": 80, "width3": 10}
RECIPES = Path(__file__).parents[1] / "recipes"


Run = Callable[..., Done]


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Run a command that has to fail in one line, write nothing, and leave every file as it was."""

    def refused(*arguments: object) -> str:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        done = run(*arguments)
        assert done.code == 2, done
        assert done.out == ""
        assert done.err.startswith("ttcompress: ")
        assert done.err.endswith("\n")
        assert done.err.count("\n") == 1
        assert len(done.err) > len("ttcompress: \n")
        assert "internal error" not in done.err
        assert "Traceback" not in done.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return done.err

    return refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mlp.pt and its compressed file mlp-tt.safetensors, read only."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    torch.save(Mlp(**WIDTHS).state_dict(), folder / "mlp.pt")
    succeeded("compress", "mlp.pt", "--ranks", 5, "--data", "digits", cwd=folder)
    return folder


@pytest.fixture
def mlp(files: Path) -> Path:
    return files / "mlp.pt"


@pytest.fixture
def compressed(files: Path) -> Path:
    return files / "mlp-tt.safetensors"


# ------------------------------------------------------------------------------------------------------ bad input files


class Bomb:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def _truncated_pt(path: Path) -> None:
    torch.save(Mlp(**WIDTHS).state_dict(), path)
    cut(path)


def _truncated_safetensors(path: Path) -> None:
    save_file(Mlp(**WIDTHS).state_dict(), path)
    cut(path)


def _lying_safetensors(path: Path) -> None:
    text = json.dumps({"fc1.weight": {"dtype": "F32", "shape": [100, 100], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


def _poisoned(value: float) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        state = Mlp(**WIDTHS).state_dict()
        state["fc2.weight"][3, 4] = value
        torch.save(state, path)

    return make


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("net.pt", lambda path: None, "no such file"),
    "missing safetensors": ("net.safetensors", lambda path: None, "no such file"),
    "empty": ("net.pt", Path.touch, "is empty"),
    "empty safetensors": ("net.safetensors", Path.touch, "is empty"),
    "folder": ("net.pt", Path.mkdir, "is a folder"),
    "text": ("net.pt", lambda path: path.write_text("hello\nworld\n"), "not a checkpoint"),
    "truncated .pt": ("net.pt", _truncated_pt, "truncated"),
    "truncated safetensors": ("net.safetensors", _truncated_safetensors, "truncated"),
    "lying safetensors": ("net.safetensors", _lying_safetensors, "does not fill"),
    "code": (
        "net.pt",
        lambda path: torch.save({"a": Bomb(f"touch {path.parent}/trace")}, path),
        "could run code",
    ),
    "whole module": ("net.pt", lambda path: torch.save(nn.Linear(2, 2), path), "state_dict()"),
    "no known architecture": (
        "net.pt",
        lambda path: torch.save({"strange.weight": torch.ones(3, 3)}, path),
        "--arch",
    ),
    "a layer more": (
        "net.pt",
        lambda path: torch.save({**CifarResNet(3).state_dict(), "extra.weight": torch.ones(2)}, path),
        "resnet20",
    ),
    "NaN": ("net.pt", _poisoned(float("nan")), "fc2.weight"),
    "Inf": ("net.pt", _poisoned(float("-inf")), "fc2.weight"),
    "several": ("net.pt", lambda path: torch.save({"model": {"a": torch.ones(1)}, "ema": {}}, path), "--key"),
}


@pytest.mark.parametrize("command", ["compress", "plan", "evaluate", "dry run"])
@pytest.mark.parametrize("bad", BAD_FILES)
def test_bad_checkpoints(refused: Callable[..., str], tmp_path: Path, bad: str, command: str) -> None:
    name, make, wanted = BAD_FILES[bad]
    make(tmp_path / name)
    (tmp_path / "kept.safetensors").write_text("old")
    target = ["-o", "kept.safetensors", "--force"]
    arguments = {
        "compress": ["compress", name, "--ranks", "2", *target],
        "plan": ["plan", name, "--ranks", "2", *target],
        "evaluate": ["evaluate", name, "--data", "digits"],
        "dry run": ["compress", name, "--ranks", "2", "--dry-run"],
    }
    text = refused(*arguments[command])
    assert wanted in text
    assert name in text or "architecture" in text


@pytest.mark.parametrize("command", ["report", "expand", "evaluate"])
@pytest.mark.parametrize(
    "bad",
    [
        "missing safetensors",
        "empty safetensors",
        "truncated safetensors",
        "lying safetensors",
        "folder",
        "text",
    ],
)
def test_bad_compressed_files(refused: Callable[..., str], tmp_path: Path, bad: str, command: str) -> None:
    name, make, _ = BAD_FILES[bad]
    make(tmp_path / name)
    options = {"report": [], "expand": ["-o", "dense.pt"], "evaluate": ["--data", "digits"]}
    assert name in refused(command, name, *options[command])


def test_several_files_to_report_of_which_one_is_bad(refused: Callable[..., str], compressed: Path) -> None:
    assert "none.safetensors" in refused("report", compressed, "none.safetensors")


@pytest.mark.parametrize("command", ["report", "expand"])
def test_a_safetensors_file_that_is_not_ours(
    refused: Callable[..., str], tmp_path: Path, command: str
) -> None:
    save_file(Mlp(**WIDTHS).state_dict(), tmp_path / "dense.safetensors")
    text = refused(command, "dense.safetensors", *(["-o", "out.pt"] if command == "expand" else []))
    assert "not one that ttcompress wrote" in text


def test_evaluating_a_safetensors_file_of_no_known_network(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    save_file({"strange.cores.0": torch.ones(1, 2, 3, 1, 1)}, tmp_path / "dense.safetensors")
    assert "--arch" in refused("evaluate", "dense.safetensors", "--data", "digits")


@pytest.mark.parametrize("command", ["report", "expand"])
def test_report_and_expand_of_a_pt(refused: Callable[..., str], mlp: Path, command: str) -> None:
    assert "not a safetensors file" in refused(
        command, mlp, *(["-o", "out.pt"] if command == "expand" else [])
    )


@pytest.mark.parametrize("command", ["report", "expand", "evaluate"])
def test_a_file_of_a_newer_schema(
    refused: Callable[..., str], compressed: Path, tmp_path: Path, command: str
) -> None:
    metadata = {**read_metadata(compressed), "schema": "ttcompress/2"}
    write_safetensors(tmp_path / "newer.safetensors", load_compressed(compressed), metadata)
    options = {"report": [], "expand": ["-o", "out.pt"], "evaluate": ["--data", "digits"]}
    text = refused(command, "newer.safetensors", *options[command])
    assert "newer.safetensors" in text
    assert "'ttcompress/2'" in text
    assert "'ttcompress/1'" in text


@pytest.mark.parametrize("extra", [[], ["--dry-run"]])
def test_compress_of_a_compressed_file(
    refused: Callable[..., str], compressed: Path, extra: list[str]
) -> None:
    assert "expand" in refused("compress", compressed, "--ranks", "2", *extra)


# ---------------------------------------------------------------------------------------------------------- bad options


BAD_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "no target": ([], ["exactly one", "none"]),
    "ratio and eps": (["--ratio", "2", "--eps", "0.1"], ["exactly one", "--eps and --ratio"]),
    "ratio and params": (["--ratio", "2", "--params", "9000"], ["exactly one"]),
    "ranks and ratio": (["--ranks", "2", "--ratio", "2"], ["exactly one"]),
    "rank 0": (["--ranks", "0"], ["--ranks", "0"]),
    "rank -1": (["--conv-ranks=-1"], ["--conv-ranks", "-1"]),
    "a rank of 0 among others": (["--ranks", "4,0"], ["--ranks"]),
    "a rank that is no number": (["--ranks", "four"], ["four"]),
    "half a rank": (["--ranks", "2.5"], ["2.5"]),
    "no rank": (["--ranks", ""], ["''"]),
    "too many ranks": (["--ranks", "2,2,2,2,2,2,2"], ["fc"]),
    "ratio 0.5": (["--ratio", "0.5"], ["--ratio", "above 1"]),
    "ratio 1": (["--ratio", "1"], ["--ratio", "above 1"]),
    "ratio nan": (["--ratio", "nan"], ["--ratio"]),
    "ratio inf": (["--ratio", "inf"], ["--ratio"]),
    "ratio out of reach": (["--ratio", "100000"], ["out of reach", "most", "x ("]),
    "ratio of text": (["--ratio", "2x"], ["2x"]),
    "macs ratio 1": (["--macs-ratio", "1"], ["--macs-ratio", "above 1"]),
    "macs ratio of unknown inputs": (
        ["--macs-ratio", "2"],
        ["size of an input is not known", "--input-size"],
    ),
    "macs ratio out of reach": (
        ["--macs-ratio", "9999", "--input-size", "1,8,8"],
        ["--macs-ratio 9999 is out of reach", "multiply-adds)"],
    ),
    "macs ratio and ratio": (["--macs-ratio", "2", "--ratio", "2"], ["exactly one"]),
    "macs ratio of dense layers": (["--macs-ratio", "2", "--exec", "dense"], ["no --exec or --tune"]),
    "macs ratio by measurement": (["--macs-ratio", "2", "--tune"], ["no --exec or --tune"]),
    "input size of zero": (["--macs-ratio", "2", "--input-size", "1,0,8"], ["--input-size"]),
    "an input of another size": (
        ["--macs-ratio", "2", "--input-size", "1,9,9"],
        ["does not take", "(1, 9, 9)"],
    ),
    "latency ratio out of reach": (
        ["--latency-ratio", "9999", "--input-size", "64"],
        ["--latency-ratio 9999 is out of reach", "threads)"],
    ),
    "latency ratio by another way": (["--latency-ratio", "2", "--exec", "dense"], ["no --exec or --tune"]),
    "input size for nothing": (["--ranks", "2", "--input-size", "64"], ["--input-size", "leave it out"]),
    "latency ratio 0": (["--latency-ratio", "0"], ["--latency-ratio", "above 1"]),
    "a way to run that no layer has": (
        ["--ranks", "2", "--exec", "chain"],
        ["--exec chain", "linear matrix"],
    ),
    "an unknown way to run": (["--ranks", "2", "--exec", "sweep"], ["sweep", "contract"]),
    "a way to run, and measured ones": (["--ranks", "2", "--exec", "dense", "--tune"], ["leave out --exec"]),
    "macs ratio without a network": (
        ["--macs-ratio", "2", "--arch", "none"],
        ["no network can run", "--macs-ratio"],
    ),
    "eps 2": (["--eps", "2"], ["--eps", "below 1"]),
    "eps 0": (["--eps", "0"], ["--eps", "above 0"]),
    "eps -1": (["--eps=-1"], ["--eps"]),
    "params 0": (["--params", "0"], ["--params", "above 0"]),
    "params of a million": (["--params", "1000000"], ["asks for nothing"]),
    "params out of reach": (["--params", "10"], ["out of reach"]),
    "pattern without match": (["--ranks", "2", "--include", "fcc2"], ["'fcc2'", "fc2"]),
    "excluded pattern without match": (["--ranks", "2", "--exclude", "layer*"], ["'layer*'", "fc1"]),
    "bad regular expression": (["--ranks", "2", "--include", "re:("], ["re:("]),
    "everything excluded": (["--ranks", "2", "--exclude", "*"], ["no layer is left"]),
    "in-modes with several layers": (
        ["--ranks", "2", "--in-modes", "8,8", "--out-modes", "8,12"],
        ["--in-modes"],
    ),
    "in-modes without out-modes": (
        ["--ranks", "2", "--include", "fc1", "--in-modes", "8,8"],
        ["fc1", "together"],
    ),
    "modes that do not multiply": (
        ["--ranks", "2", "--include", "fc1", "--in-modes", "8,9", "--out-modes", "3,4"],
        ["fc1", "multiply to 12"],
    ),
    "modes of zero": (
        ["--ranks", "2", "--include", "fc1", "--in-modes", "0,8", "--out-modes", "8,12"],
        ["--in-modes"],
    ),
    "mean without std": (["--ranks", "2", "--data", "digits", "--mean", "0.5"], ["--mean and --std"]),
    "std without mean": (["--ranks", "2", "--data", "digits", "--std", "0.5"], ["--mean and --std"]),
    "mean without std and data": (["--ranks", "2", "--mean", "0.5"], ["--mean and --std"]),
    "std of zero": (["--ranks", "2", "--data", "digits", "--mean", "0.5", "--std", "0"], ["--std"]),
    "three means for one channel": (
        ["--ranks", "2", "--data", "digits", "--mean", "0,0,0", "--std", "1,1,1"],
        ["digits@test", "channels"],
    ),
    "unknown data": (["--ranks", "2", "--data", "imagenet:/data"], ["imagenet:/data", "cifar10:ROOT"]),
    "data without place": (["--ranks", "2", "--data", "npz:"], ["npz:PATH"]),
    "data that is not there": (["--ranks", "2", "--data", "npz:none.npz"], ["none.npz"]),
    "unlabelled data": (["--ranks", "2", "--data", "npz:unlabelled.npz"], ["no labels"]),
    "images of another size": (["--ranks", "2", "--data", "npz:large.npz"], ["(1, 9, 9)"]),
    "more classes": (["--ranks", "2", "--data", "npz:classes.npz"], ["label 10", "10 classes"]),
    "device nonsense": (["--ranks", "2", "--device", "nonsense"], ["--device", "nonsense"]),
    "device cuda:99": (["--ranks", "2", "--device", "cuda:99"], ["cuda:99"]),
    "device cpu:x": (["--ranks", "2", "--device", "cpu:x"], ["cpu:x"]),
    "unknown format": (["--ranks", "2", "--format", "tucker"], ["tucker", "matrix"]),
    "unknown dtype": (["--ranks", "2", "--dtype", "int4"], ["int4", "float16"]),
    "batch size 0": (["--ranks", "2", "--data", "digits", "--batch-size", "0"], ["--batch-size"]),
    "seed -1": (["--ranks", "2", "--seed=-1"], ["--seed"]),
    "a seed that no generator takes": (["--ranks", "2", "--seed", str(2**64)], ["--seed", "below 2**63"]),
    "how to train, without training": (
        ["--ranks", "2", "--lr", "5", "--compile"],
        ["--lr, --compile", "--finetune"],
    ),
    "a teacher without training": (["--ranks", "2", "--teacher", "none.pt"], ["--teacher", "--finetune"]),
    "resume without training": (["--ranks", "2", "--resume"], ["--resume", "--finetune"]),
    "training images that are not there": (
        ["--ranks", "2", "--finetune", "1", "--train", "images:nope"],
        ["no folder nope"],
    ),
    "a teacher that is not there": (
        ["--ranks", "2", "--finetune", "1", "--train", "digits", "--teacher", "none.pt"],
        ["none.pt"],
    ),
    "unknown option": (["--rank", "2"], ["--rank"]),
    "option without value": (["--ranks"], ["--ranks"]),
    "unknown architecture": (["--ranks", "2", "--arch", "vgg61"], ["vgg61", "vgg16"]),
    "another architecture": (["--ranks", "2", "--arch", "resnet20"], ["resnet20", "does not fit"]),
    "missing factory file": (["--ranks", "2", "--arch", "none.py:build"], ["none.py"]),
    "missing recipe": (["--recipe", "none.toml"], ["none.toml"]),
    "damaged recipe": (["--recipe", "bad.toml"], ["bad.toml", "'rangs'"]),
    "missing plan": (["--plan", "none.json"], ["none.json"]),
    "damaged plan": (["--plan", "bad.json"], ["bad.json"]),
    "binary plan": (["--plan", "unlabelled.npz"], ["unlabelled.npz"]),
    "plan of another schema": (["--plan", "other.json"], ["other.json", "ttcompress-plan/1"]),
    "key in a bare state dict": (["--ranks", "2", "--key", "ema"], ["'ema'"]),
    "nothing pays": (["--ranks", "1000"], ["nothing would be compressed"]),
    "only conv ranks": (["--conv-ranks", "4"], ["no --ranks given"]),
    "one argument too many": (["--ranks", "2", "again.pt"], ["again.pt"]),
}


@pytest.fixture
def bad_inputs(tmp_path: Path) -> None:
    pixels = np.zeros((20, 8, 8), np.uint8)
    pixels[::2] = 255
    labels = np.arange(20) % 10
    np.savez(tmp_path / "unlabelled.npz", images=pixels)
    np.savez(
        tmp_path / "large.npz",
        images=np.random.default_rng(0).integers(0, 255, (20, 9, 9), np.uint8),
        labels=labels,
    )
    np.savez(tmp_path / "classes.npz", images=pixels, labels=np.arange(20) % 11)
    (tmp_path / "bad.toml").write_text("rangs = 4")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "other.json").write_text('{"schema": "ttcompress-plan/2"}')


@pytest.mark.parametrize("bad", BAD_OPTIONS)
@pytest.mark.usefixtures("bad_inputs")
def test_bad_options(refused: Callable[..., str], tmp_path: Path, mlp: Path, bad: str) -> None:
    options, wanted = BAD_OPTIONS[bad]
    (tmp_path / "out.safetensors").write_text("old")
    text = refused("compress", mlp, *options, "-o", "out.safetensors", "--force")
    assert all(word in text for word in wanted), text


@pytest.mark.parametrize(
    "target", [["--ranks", "2"], ["--ratio", "2"], ["--eps", "0.5"], ["--params", "5000"]]
)
def test_a_plan_beside_another_target(
    refused: Callable[..., str], run: Run, mlp: Path, target: list[str]
) -> None:
    assert run("plan", mlp, "--ranks", "4", "-o", "plan.json").code == 0
    assert "--plan" in refused("compress", mlp, "--plan", "plan.json", *target)


@pytest.mark.parametrize("option", [["--exclude", "fc1"], ["--format", "chain"], ["--dtype", "int8"]])
def test_a_plan_beside_options_that_it_states(
    refused: Callable[..., str], run: Run, mlp: Path, option: list[str]
) -> None:
    assert run("plan", mlp, "--ranks", "4", "-o", "plan.json").code == 0
    text = refused("compress", mlp, "--plan", "plan.json", *option, "-o", "out.safetensors")
    assert f"leave out {option[0]}" in text


@pytest.mark.parametrize(
    "damage",
    [
        "fqn",
        "tt_ranks",
        "grows",
        "layers",
        "kept_parameters",
        "weight_dtype",
        "a spec",
        "a number",
        "a name",
        "nested",
    ],
)
def test_a_plan_that_was_edited_wrongly(
    refused: Callable[..., str], run: Run, mlp: Path, tmp_path: Path, damage: str
) -> None:
    run("plan", mlp, "--ranks", "4", "-o", "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    layer = data["layers"][0]
    if damage == "fqn":
        layer["fqn"] = "fc7"
    elif damage == "tt_ranks":
        layer["tt_ranks"] = [1, 0, 1]
    elif damage == "grows":
        layer["tt_ranks"] = [1] + [1000] * (len(layer["tt_ranks"]) - 2) + [1]
    elif damage == "weight_dtype":
        layer["weight_dtype"] = "float99"
    elif damage == "a spec":
        layer["spec"] = [1]
    elif damage == "a number":
        layer["fqn"] = 7
    elif damage == "a name":
        data["kept_parameters"][0]["name"] = "zzz"
    elif damage != "nested":
        data.pop(damage)
    text = json.dumps(data)
    (tmp_path / "plan.json").write_text("[" * 100_000 if damage == "nested" else text)
    refused("compress", mlp, "--plan", "plan.json", "-o", "out.safetensors")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compres"],
        ["train", "net.pt"],
        ["--nonsense"],
        ["compress"],
        ["report"],
        ["expand", "net.safetensors"],
        ["evaluate"],
        ["plan", "--ranks", "4"],
        ["plan", "--arch", "vgg16", "--ratio", "4"],
        ["plan", "--arch", "vgg16", "--eps", "0.1"],
        ["plan", "--arch", "resnet20", "--max-drop", "1", "--val", "digits"],
        ["plan", "--arch", "vgg61", "--ranks", "4"],
        ["demo", "now"],
    ],
    ids=" ".join,
)
def test_bad_commands(refused: Callable[..., str], arguments: list[str]) -> None:
    refused(*arguments)


def test_evaluate_without_data(refused: Callable[..., str], mlp: Path) -> None:
    assert "--data" in refused("evaluate", mlp)


@pytest.mark.parametrize("limit", ["0", "-3", "few"])
def test_evaluate_of_no_images(refused: Callable[..., str], mlp: Path, limit: str) -> None:
    assert "--limit" in refused("evaluate", mlp, "--data", "digits", f"--limit={limit}")


# ---------------------------------------------------------------------------------------------------------- bad outputs


COMMANDS = {
    "compress": ["compress", "MLP", "--ranks", "2"],
    "plan": ["plan", "MLP", "--ranks", "2"],
    "expand": ["expand", "TT"],
}


@pytest.fixture
def command(request: pytest.FixtureRequest, files: Path) -> list[str]:
    named = {"MLP": str(files / "mlp.pt"), "TT": str(files / "mlp-tt.safetensors")}
    return [named.get(part, part) for part in COMMANDS[request.param]]


every_writer = pytest.mark.parametrize("command", COMMANDS, indirect=True)


@every_writer
@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        ("there.pt", "--force"),
        ("there.pt/out.pt", "not an existing folder"),
        ("none/out.pt", "not an existing folder"),
        ("folder", "is a folder"),
        (".", "is a folder"),
        ("x" * 300 + ".pt", "too long"),
    ],
    ids=["exists", "parent is a file", "no parent", "folder", "here", "too long"],
)
def test_bad_outputs(
    refused: Callable[..., str], tmp_path: Path, command: list[str], output: str, wanted: str
) -> None:
    (tmp_path / "there.pt").write_text("old")
    (tmp_path / "folder").mkdir()
    assert wanted in refused(*command, "-o", output)


@pytest.mark.parametrize("command", ["compress"], indirect=True)
def test_the_default_output_is_not_overwritten_either(
    refused: Callable[..., str], tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "mlp-tt.safetensors").write_text("old")
    assert "--force" in refused(*command)


@every_writer
def test_force_replaces(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "out.pt").write_text("old")
    done = run(*command, "-o", "out.pt", "--force")
    assert done.code == 0
    assert (tmp_path / "out.pt").read_bytes() != b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]


def test_expand_refuses_a_suffix_that_says_nothing(refused: Callable[..., str], compressed: Path) -> None:
    assert ".safetensors" in refused("expand", compressed, "-o", "dense.bin")


# -------------------------------------------------------------------------------------------------------------- results


def test_compress_json(run: Run, mlp: Path, tmp_path: Path) -> None:
    done = run("compress", mlp, "--ranks", "5", "--data", "digits", "--json")
    assert (done.code, done.err) == (0, "")
    output = tmp_path / "mlp-tt.safetensors"
    infos, _ = read_header(output)
    data = done.json
    assert data["file"] == output.name
    assert data["file_bytes"] == output.stat().st_size
    assert data["params_before"] == sum(p.numel() for p in Mlp(**WIDTHS).parameters())
    assert data["params_after"] == sum(info.params for info in infos.values())
    assert data["compression"] == data["params_before"] / data["params_after"]
    assert data["bytes_before"] == 4 * data["params_before"]
    assert data["bytes_after"] == sum(info.num_bytes for info in infos.values())
    assert data["seed"] == 0
    layers = {layer["fqn"]: layer for layer in data["layers"]}
    assert list(layers) == ["fc1", "fc2", "fc3"]
    for name, shape in (("fc1", (96, 64)), ("fc2", (80, 96))):
        layer = layers[name]
        assert (layer["kind"], layer["format"]) == ("linear", "matrix")
        assert np.prod(layer["out_modes"]) == shape[0]
        assert np.prod(layer["in_modes"]) == shape[1]
        assert layer["tt_ranks"] == [1, *[5] * (len(layer["out_modes"]) - 1), 1]
        assert layer["params_before"] == shape[0] * shape[1]
        cores = [info for key, info in infos.items() if key.startswith(f"{name}.cores.")]
        assert layer["params_after"] == sum(core.params for core in cores)
        assert 0 < layer["relative_error"] < 1
    assert layers["fc3"]["kept"].startswith("last Linear")
    assert layers["fc3"]["params_before"] == layers["fc3"]["params_after"] == 800
    accuracy = data["accuracy"]
    assert accuracy["n"] == 360
    assert accuracy["data"] == "digits@test"
    for side, interval in (("dense", "dense_interval"), ("compressed", "interval")):
        low, high = accuracy[interval]
        assert 0 <= low <= accuracy[side] <= high <= 100
        assert accuracy[side] <= accuracy[f"{side}_top5"] <= 100
    assert 0 <= accuracy["agreement"] <= 100


def test_report_json_is_the_same_object(run: Run, mlp: Path) -> None:
    first = run("compress", mlp, "--ranks", "3", "--data", "digits", "--json", "-o", "a.safetensors").json
    assert run("report", "a.safetensors", "--json").json == first


def test_report_json_of_several_files_is_a_list(run: Run, mlp: Path, compressed: Path) -> None:
    first = run("compress", mlp, "--ranks", "3", "--json", "-o", "a.safetensors").json
    second = run("report", compressed, "--json").json
    assert run("report", "a.safetensors", compressed, "--json").json == [first, second]
    assert first["accuracy"] is None


def test_evaluate_json(run: Run, mlp: Path, compressed: Path) -> None:
    accuracy = run("report", compressed, "--json").json["accuracy"]
    for file, side, interval in ((mlp, "dense", "dense_interval"), (compressed, "compressed", "interval")):
        done = run("evaluate", file, "--data", "digits", "--json")
        assert (done.code, done.err) == (0, "")
        assert done.json == {
            "accuracy": accuracy[side],
            "top5": accuracy[f"{side}_top5"],
            "n": 360,
            "interval": accuracy[interval],
            "data": "digits@test",
        }
    assert run("evaluate", mlp, "--data", "digits", "--limit", "100", "--json").json["n"] == 100


def test_text_shows_what_json_holds(run: Run, compressed: Path, mlp: Path) -> None:
    accuracy = run("report", compressed, "--json").json["accuracy"]
    text = run("report", compressed).out
    assert f"{accuracy['dense']:.2f} % -> {accuracy['compressed']:.2f} %" in text
    assert f"{accuracy['dense_top5']:.2f} % -> {accuracy['compressed_top5']:.2f} %" in text
    assert "n = 360" in text
    assert f"{accuracy['agreement']:.2f} %" in text
    done = run("evaluate", mlp, "--data", "digits")
    assert f"{accuracy['dense']:.2f} % top-1" in done.out
    assert "n = 360" in done.out
    low, high = accuracy["dense_interval"]
    assert f"{low:.2f} to {high:.2f}" in done.out


def test_side_by_side_text(run: Run, mlp: Path, compressed: Path) -> None:
    run("compress", mlp, "--ranks", "2", "-o", "small.safetensors")
    done = run("report", compressed, "small.safetensors")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].split() == ["mlp-tt.safetensors", "small.safetensors"]


@pytest.mark.parametrize(
    "extra", [["--dry-run"], ["--dry-run", "-o", "out.safetensors"], ["--dry-run", "--json"]]
)
def test_dry_run_writes_nothing_and_promises_what_compress_does(
    run: Run, mlp: Path, tmp_path: Path, extra: list[str]
) -> None:
    done = run("compress", mlp, "--ratio", "2", *extra)
    assert (done.code, done.err) == (0, "")
    assert not list(tmp_path.iterdir())
    planned = run("compress", mlp, "--ratio", "2", "--dry-run", "--json").json
    assert planned == run("plan", mlp, "--ratio", "2", "--json").json
    real = run("compress", mlp, "--ratio", "2", "--json").json
    assert planned["file"] is None
    for key in ("compression", "params_before", "params_after", "bytes_before", "bytes_after"):
        assert planned[key] == real[key]


def test_plan_then_compress(run: Run, mlp: Path, tmp_path: Path) -> None:
    done = run("plan", mlp, "--ratio", "2", "-o", "plan.json")
    assert (done.code, done.err) == (0, "")
    by_plan = run("compress", mlp, "--plan", "plan.json", "-o", "a.safetensors", "--json").json
    direct = run("compress", mlp, "--ratio", "2", "-o", "b.safetensors", "--json").json
    for key in ("params_after", "bytes_after", "compression"):
        assert by_plan[key] == direct[key]
    first, second = load_compressed(tmp_path / "a.safetensors"), load_compressed(tmp_path / "b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_key_prefix_and_wrapper(run: Run, tmp_path: Path, mlp: Path) -> None:
    state = torch.load(mlp, weights_only=True)
    wrapped = {"model": state, "ema": {f"module.{key}": tensor * 2 for key, tensor in state.items()}}
    torch.save(wrapped, tmp_path / "both.pt")
    done = run("compress", "both.pt", "--key", "ema", "--ranks", "2", "--json")
    assert done.code == 0
    kept = load_compressed(tmp_path / "both-tt.safetensors")["fc3.weight"]
    assert torch.equal(kept, state["fc3.weight"] * 2)


def test_factory_on_the_command_line(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    layers = "nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10)"
    body = f"from torch import nn\ndef build():\n    return nn.Sequential({layers})\n"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "net.py").write_text(body)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 10))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    arch = f"{tmp_path}/sub/net.py:build"
    data = run("compress", "net.pt", "--arch", arch, "--ranks", "4", "--data", "digits", "--json").json
    assert data["architecture"]["name"] == "net.py:build"
    assert "--arch" in refused("evaluate", "net-tt.safetensors", "--data", "digits")
    again = run("evaluate", "net-tt.safetensors", "--data", "digits", "--arch", arch, "--json")
    assert again.code == 0, again
    assert again.json["accuracy"] == data["accuracy"]["compressed"]
    assert run("expand", "net-tt.safetensors", "-o", "dense.pt").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "TT"],
        ["report", "TT", "TT"],
        ["report", "TT", "--json"],
        ["evaluate", "MLP", "--data", "digits"],
    ],
    ids=" ".join,
)
def test_results_on_stdout_nothing_on_stderr(run: Run, files: Path, arguments: list[str]) -> None:
    named = {"MLP": str(files / "mlp.pt"), "TT": str(files / "mlp-tt.safetensors")}
    done = run(*(named.get(part, part) for part in arguments))
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("\n")
    assert "\x1b" not in done.out


# -------------------------------------------------------------------------------------------------- interrupts and bugs


@pytest.mark.parametrize("where", ["compress_network", "write_network", "open_dense"])
def test_interrupt(run: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, where, interrupt)
    done = run("compress", mlp, "--ranks", "2")
    assert done.code == 130
    assert done.out == ""
    # The empty line before it, click's, is for the ^C that a terminal shows.
    assert done.err.strip() == "ttcompress: interrupted; nothing was written"
    assert not list(tmp_path.iterdir())


def test_interrupt_while_writing_leaves_the_old_file(
    run: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the data, when the temporary file is there already."""
    (tmp_path / "out.safetensors").write_text("old")
    seen: list[str] = []

    def interrupt(self: torch.Tensor, *arguments: object) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "numpy", interrupt)
    done = run("compress", mlp, "--ranks", "2", "-o", "out.safetensors", "--force")
    assert done.code == 130
    assert len(seen) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    assert (tmp_path / "out.safetensors").read_text() == "old"


def test_an_internal_error_is_one_line_and_exit_code_1(
    run: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(pipeline, "compress_network", fail)
    done = run("compress", mlp, "--ranks", "2")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "RuntimeError: first line second line" in done.err
    assert "TTCOMPRESS_DEBUG=1" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to ...")], ids=str
)
def test_no_memory_is_one_line_that_says_what_helps(
    error: Exception, run: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ran out, as in the decomposition of a large weight on a GPU."""

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "compress_network", fail)
    done = run("compress", mlp, "--ranks", "2")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "out of memory; a smaller --batch-size" in done.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["user", "internal"])
def test_debug_shows_a_traceback(mlp: Path, tmp_path: Path, kind: str) -> None:
    """In its own process, which prints the traceback of an error that nobody caught."""
    script = "from ttcompress import cli\nfrom ttcompress.commands import compress as pipeline\n"
    if kind == "internal":
        script += "pipeline.compress_network = None\n"
    option = "0" if kind == "user" else "2"
    script += f"cli.main(['compress', {str(mlp)!r}, '--ranks', '{option}'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "TTCOMPRESS_DEBUG": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (2 if kind == "user" else 1)
    assert "Traceback (most recent call last)" in done.stderr
    assert "cli.py" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["0", ""])
def test_no_traceback_without_debug(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, mlp: Path, value: str
) -> None:
    monkeypatch.setenv("TTCOMPRESS_DEBUG", value)
    refused("compress", mlp, "--ranks", "0")


def test_the_installed_command_and_the_module(tmp_path: Path, mlp: Path) -> None:
    command = [sys.executable, "-m", "ttcompress", "compress", str(mlp), "--ranks", "3", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    # On a busy machine a stage may take long enough to have a line in a log; nothing else may be there.
    assert re.sub(r"^ttcompress: \w+, [1-9]\d* s\n", "", done.stderr, flags=re.MULTILINE) == ""
    assert json.loads(done.stdout)["file"] == "mlp-tt.safetensors"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------- the papers' numbers, from integers


FC6_MODES = ["--in-modes", "2,7,8,8,7,4", "--out-modes", "4,4,4,4,4,4"]


# NUMBERS.md: parameters of fc6 of VGG-16 at these TT-ranks, and the compression as printed.
@pytest.mark.parametrize(
    ("rank", "params", "printed"), [(4, 2016, "50,972x"), (2, 528, "194,622x"), (1, 144, "713,614x")]
)
def test_vgg16_fc6_from_integers(run: Run, rank: int, params: int, printed: str) -> None:
    arguments = ["plan", "--arch", "vgg16", "--ranks", rank, "--include", "classifier.0", *FC6_MODES]
    (layer,) = (layer for layer in run(*arguments, "--json").json["layers"] if "kept" not in layer)
    assert layer["fqn"] == "classifier.0"
    assert layer["params_after"] == params
    assert layer["params_before"] == 102_760_448
    assert printed in run(*arguments).out


# Novikov et al. 2015, table 3, whole networks.
@pytest.mark.parametrize(
    ("recipe", "printed"),
    [
        ("vgg16-tt1-fc-fc", "3.9x"),
        ("vgg16-tt2-fc-fc", "3.9x"),
        ("vgg16-tt4-fc-fc", "3.9x"),
        ("vgg16-tt4-tt4-fc", "7.4x"),
        ("vgg16-mr1-fc-fc", "3.9x"),
        ("vgg16-mr5-fc-fc", "3.9x"),
        ("vgg16-mr50-fc-fc", "3.7x"),
        ("vgg19-tt1-fc-fc", "3.5x"),
        ("vgg19-tt2-fc-fc", "3.5x"),
        ("vgg19-tt4-fc-fc", "3.5x"),
        ("vgg19-tt4-tt4-fc", "6.0x"),
    ],
)
def test_whole_networks_of_novikov(run: Run, recipe: str, printed: str) -> None:
    done = run("plan", "--recipe", RECIPES / f"{recipe}.toml")
    assert (done.code, done.err) == (0, "")
    (line,) = (line for line in done.out.splitlines() if line.startswith("all parameters"))
    assert line.split()[-1] == printed


@pytest.mark.parametrize(("rank", "printed"), [(1, "3,521x"), (5, "704x"), (50, "70x")])
@pytest.mark.parametrize("network", ["vgg16", "vgg19"])
def test_matrix_ranks_of_novikov(run: Run, network: str, rank: int, printed: str) -> None:
    data = run("plan", "--recipe", RECIPES / f"{network}-mr{rank}-fc-fc.toml", "--json").json
    (layer,) = (layer for layer in data["layers"] if "kept" not in layer)
    assert layer["params_after"] == rank * (25088 + 4096)
    assert f"{layer['params_before'] / layer['params_after']:,.0f}x" == printed


# -------------------------------------------------------------------------------------------------------------- outputs


def _command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ttcompress", *map(str, arguments)], capture_output=True, text=True, **options
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["report", "TT"], ["report", "TT", "--json"]], ids=" ".join
)
def test_a_full_disk_under_standard_output_is_one_line(files: Path, arguments: list[str]) -> None:
    tt = str(files / "mlp-tt.safetensors")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ttcompress", *(tt if each == "TT" else each for each in arguments)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "ttcompress: No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_error(files: Path) -> None:
    tt = files / "mlp-tt.safetensors"
    line = f"{sys.executable} -m ttcompress report {tt} --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True)
    assert (done.returncode in (0, 141), done.stdout, done.stderr) == (True, "{", "")


@pytest.mark.parametrize("name", ["naïve", "层", "\N{PILE OF POO}"])
def test_names_that_the_terminal_has_no_letters_for(tmp_path: Path, name: str) -> None:
    done = _command(
        "report", f"{name}.safetensors", cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "internal" not in done.stderr


def test_an_interrupt_while_modules_are_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cloup.py").write_text("raise KeyboardInterrupt")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = _command("--version", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "ttcompress: interrupted; nothing was written\n"


NOISY = """
import torch
from torch import nn

print("imported")

class Net(nn.Sequential):
    def forward(self, x):
        print("running")
        return super().forward(x.flatten(1))

def build():
    print("built")
    return Net(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
"""


@pytest.mark.parametrize("verb", ["compress", "plan", "evaluate", "export"])
def test_what_a_users_own_code_prints_is_no_result(run: Run, tmp_path: Path, verb: str) -> None:
    (tmp_path / "net.py").write_text(NOISY)
    torch.save(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).state_dict(), "n.pt")
    options = {
        "compress": ["--ranks", "4", "--data", "digits"],
        "plan": ["--ranks", "4"],
        "evaluate": ["--data", "digits"],
        "export": ["--onnx", "n.onnx", "--input-size", "64"],
    }[verb]
    done = run(verb, "n.pt", "--arch", "net.py:build", *options, "--json")
    assert done.code == 0
    assert isinstance(done.json, dict)
    assert "built" in done.err
