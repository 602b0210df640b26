"""`--arch none`: matrices by name, one file or shards, going on after a kill, several processes, little memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded import INDEX, write
from torch import Tensor, nn
from toys import PRELOADED, as_torchrun

import ttcompress
from ttcompress import cli
from ttcompress.commands import partial_results as work
from ttcompress.commands import weights_only as tensorwise
from ttcompress.commands.compress import compress_file, plan_file
from ttcompress.commands.expand import expand_file
from ttcompress.errors import CheckpointError, PlanError
from ttcompress.files import writing
from ttcompress.files.checkpoint import load_compressed
from ttcompress.files.header import read_header, read_metadata
from ttcompress.files.shards import stored_bytes
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.opening import open_compressed
from ttcompress.networks.zoo import Mlp
from ttcompress.planning.plan_file import read_plan, write_plan
from ttcompress.recipe import Recipe
from ttcompress.report.text import read_report
from ttcompress.runtime import fixed_threads
from ttcompress.tt.contract import dense_weight

pytestmark = pytest.mark.usefixtures("one_thread")
GOAL = Recipe(arch="none", ratio=2.5)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Of rank 4, and noise."""
    generator = torch.Generator().manual_seed(seed)
    one, other, noise = (
        torch.randn(*shape, generator=generator) for shape in ((rows, 4), (4, columns), (rows, columns))
    )
    return (one @ other + 0.3 * noise).bfloat16()


TENSORS = {
    "embed.weight": matrix(40, 32, 0),
    **{f"layers.{k}.up.weight": matrix(64, 32, 2 * k + 1) for k in range(3)},
    **{f"layers.{k}.down.weight": matrix(32, 64, 2 * k + 2) for k in range(3)},
    **{f"layers.{k}.up.bias": torch.full((64,), float(k)) for k in range(3)},
    "layers.0..odd [name].weight": matrix(32, 32, 9).float(),
    "layers.0.norm.weight": torch.ones(32),
    "scale": torch.tensor(0.5, dtype=torch.float64),
    "narrow.weight": matrix(8, 8, 10).to(torch.float8_e4m3fn),
    "ids": torch.arange(40),
}
LAYERS = [name.removesuffix(".weight") for name in TENSORS if re.search(r"(up|down|\])\.weight", name)]
HOMES = {name: f"x-{1 + (k % 3)}.safetensors" for k, name in enumerate(TENSORS)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, read only."""
    return write(tmp_path_factory.mktemp("source") / "net", TENSORS, HOMES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors in one file, read only."""
    path = tmp_path_factory.mktemp("source") / "net.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def compressed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run makes of the shards, read only."""
    folder = tmp_path_factory.mktemp("compressed") / "net-tt"
    compress_file(shards, folder, GOAL)
    return folder


def raw(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Everything of the tensors, NaN and narrow types too."""
    return {
        name: (each.dtype, each.shape, each.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, each in tensors.items()
    }


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------- files


def test_shards_become_shards_with_cores_in_the_place_of_weights(compressed: Path) -> None:
    assert sorted(content(compressed)) == ["x-1.safetensors", "x-2.safetensors", "x-3.safetensors", INDEX]
    index = json.loads((compressed / INDEX).read_text())
    stored = {shard: load_file(compressed / shard) for shard in set(HOMES.values())}
    assert index["weight_map"] == {name: shard for shard, tensors in stored.items() for name in tensors}
    merged = {name: tensor for tensors in stored.values() for name, tensor in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    for layer in LAYERS:
        assert f"{layer}.weight" not in merged
        assert index["weight_map"][f"{layer}.cores.0"] == HOMES[f"{layer}.weight"]
    untouched = {
        name: tensor for name, tensor in TENSORS.items() if name.removesuffix(".weight") not in LAYERS
    }
    assert untouched.keys() == {name for name in merged if ".cores." not in name}
    assert raw(untouched).items() <= raw(merged).items()


def reported(file: Path) -> dict[str, Any]:
    """What a file holds of its report."""
    return {key: value for key, value in read_metadata(file).items() if key != "layout"}


def test_the_report_is_whole_in_every_shard(compressed: Path) -> None:
    whole = read_report(compressed).to_json()
    assert whole["architecture"] is None
    assert whole["source"]["file"] == "net"
    assert (whole["file"], whole["file_bytes"]) == ("net-tt", stored_bytes(compressed))
    assert sorted(each["fqn"] for each in whole["layers"] if "kept" not in each) == sorted(LAYERS)
    assert 2.5 <= whole["compression"] <= 2.55
    for shard in set(HOMES.values()):
        assert read_header(compressed / shard)[1]["format"] == "pt"
        assert reported(compressed / shard).items() <= whole.items()


def test_relative_errors_are_those_of_the_stored_cores(compressed: Path) -> None:
    tensors = load_compressed(compressed)
    for layer in read_report(compressed).layers:
        dense = TENSORS[f"{layer.fqn}.weight"].double()
        rebuilt = dense_weight([tensors[name].double() for name in layer.core_shapes], tuple(dense.shape))
        assert float((dense - rebuilt).norm() / dense.norm()) == pytest.approx(layer.relative_error, rel=1e-6)


def test_one_file_becomes_one_file_of_the_same_tensors(file: Path, compressed: Path, tmp_path: Path) -> None:
    compress_file(file, tmp_path / "net-tt.safetensors", GOAL)
    assert [each.name for each in tmp_path.iterdir()] == ["net-tt.safetensors"]
    one, several = reported(tmp_path / "net-tt.safetensors"), read_report(compressed).to_json()
    assert {**one, "source": None}.items() <= {**several, "source": None}.items()
    assert raw(load_file(tmp_path / "net-tt.safetensors")) == raw(load_compressed(compressed))


def test_shards_become_one_file_if_it_is_named_as_one(shards: Path, compressed: Path, tmp_path: Path) -> None:
    compress_file(shards, tmp_path / "one.safetensors", GOAL)
    assert reported(tmp_path / "one.safetensors").items() <= read_report(compressed).to_json().items()


def test_expanding_gives_back_keys_types_and_shards(compressed: Path, tmp_path: Path) -> None:
    expand_file(compressed, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / INDEX).read_text())["weight_map"] == HOMES
    for shard in set(HOMES.values()):
        for name, tensor in load_file(tmp_path / "dense" / shard).items():
            assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
            if name.removesuffix(".weight") in LAYERS:
                distance = (tensor.double() - TENSORS[name].double()).norm() / TENSORS[name].double().norm()
                assert distance < 0.2
    expand_file(compressed, tmp_path / "dense.pt")
    assert torch.load(tmp_path / "dense.pt", weights_only=True).keys() == TENSORS.keys()


def test_a_single_shard_is_not_taken_for_the_whole(compressed: Path, tmp_path: Path) -> None:
    for shard in set(HOMES.values()):
        with pytest.raises(CheckpointError, match="lacks"):
            expand_file(compressed / shard, tmp_path / "dense.pt")


def test_shards_of_different_runs_are_not_mixed(compressed: Path, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "net-tt"
    compress_file(shards, other, Recipe(arch="none", ratio=2.5, seed=1))
    (other / "x-2.safetensors").write_bytes((compressed / "x-2.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors are of different runs"):
        read_report(other)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32)
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.ones(4))


def test_a_factory_makes_it_a_network_again(tmp_path: Path) -> None:
    """Of a checkpoint that, as usual, lacks the tied weight, and has a float buffer, which counts as a parameter."""
    net = Block()
    tensors = {name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}
    source = write(tmp_path / "net", tensors, {name: f"{name[0]}.safetensors" for name in tensors})
    compress_file(source, tmp_path / "net-tt", Recipe(arch="none", ranks=4))
    loaded = ttcompress.load(tmp_path / "net-tt", factory=Block)
    assert isinstance(loaded.fc, TTLinear)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded.embed.weight, net.embed.weight)
    assert torch.equal(loaded.fc.bias, net.fc.bias)


class Everything(nn.Module):
    """One weight of each kind, tied ones, and a buffer that no checkpoint has to bring."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.speech = nn.Conv1d(32, 32, 3, padding=1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.image = nn.Conv2d(1, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.randn(32, 32))
        self.register_buffer("positions", torch.arange(7), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.speech(x.mT).mT @ self.scale
        x = self.attention(x, x, x)[0]
        x = self.lstm(x)[0]
        x = self.norm(self.image(x[:, None])).mean(1)
        return self.head(x)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "net."])
def test_weights_of_all_kinds_load_into_their_network(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    net = Everything().eval()
    state = {f"{prefix}{name}": tensor for name, tensor in net.state_dict().items()}
    # As checkpoints of older libraries have it.
    state[f"{prefix}positions"] = torch.arange(7)
    torch.save(state, tmp_path / "net.pt")
    report = compress_file(
        tmp_path / "net.pt", tmp_path / "out.safetensors", Recipe(arch="none", ratio=2, include=("*",))
    )
    assert report.compression >= 2
    assert len(report.layers) >= 5
    assert f"{prefix}positions" in load_file(tmp_path / "out.safetensors")

    expand_file(tmp_path / "out.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert dense.keys() == state.keys()
    net.load_state_dict({name.removeprefix(prefix): each for name, each in dense.items()}, strict=False)

    loaded = ttcompress.load(tmp_path / "out.safetensors", factory=Everything)
    ids = torch.randint(64, (2, 7))
    torch.testing.assert_close(loaded(ids), net(ids), rtol=1e-3, atol=1e-4)
    # The network tells what the names did not.
    assert isinstance(loaded, Everything)

    network, known = open_compressed(tmp_path / "out.safetensors", Everything)
    ttcompress.save(network, known, tmp_path / "again.safetensors")
    again = ttcompress.load(tmp_path / "again.safetensors", factory=Everything)
    assert torch.equal(again(ids), loaded(ids))


def test_plan_and_what_it_makes(shards: Path, compressed: Path, tmp_path: Path) -> None:
    planned = plan_file(shards, GOAL)
    write_plan(tmp_path / "plan.json", planned.plan)
    done = compress_file(shards, tmp_path / "net-tt", Recipe(arch="none"), read_plan(tmp_path / "plan.json"))
    assert done.plan.params_after == planned.plan.params_after
    assert planned.bytes_after == done.bytes_after == read_report(compressed).bytes_after
    assert raw(load_compressed(tmp_path / "net-tt")) == raw(load_compressed(compressed))


def test_pickled_checkpoints_and_prefixes(tmp_path: Path) -> None:
    """Names stay exactly as they are, tied weights are stored once and come back as two."""
    table = matrix(32, 32, 2)
    tensors = {"module.a.weight": table, "module.b.weight": table, "module.c.weight": matrix(32, 32, 1)}
    torch.save(tensors, tmp_path / "net.pt")
    report = compress_file(tmp_path / "net.pt", tmp_path / "out.safetensors", Recipe(arch="none", ranks=2))
    assert report.tied == {"module.b.weight": "module.a.weight"}
    stored = load_file(tmp_path / "out.safetensors")
    assert {re.sub(r"\.cores\.\d", "", name) for name in stored} == {"module.a", "module.c"}
    expand_file(tmp_path / "out.safetensors", tmp_path / "dense.safetensors")
    dense = load_file(tmp_path / "dense.safetensors")
    assert dense.keys() == tensors.keys()
    assert torch.equal(dense["module.b.weight"], dense["module.a.weight"])


def test_a_sharded_checkpoint_of_a_known_architecture(tmp_path: Path) -> None:
    state = Mlp(width0=64, width1=48, width2=32, width3=10).state_dict()
    write(tmp_path / "mlp", state, {name: f"{name.split('.')[0]}.safetensors" for name in state})
    report = compress_file(tmp_path / "mlp", tmp_path / "out.safetensors", Recipe(arch="mlp", ranks=3))
    assert report.architecture is not None
    assert report.architecture.name == "mlp"
    assert isinstance(ttcompress.load(tmp_path / "out.safetensors"), Mlp)


# ------------------------------------------------------------------------------------------------------------- refusing


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["compress", *map(str, arguments), "--arch", "none"])
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--ratio", 2, "--data", "digits"], "leave out --data"),
        (["--ratio", 2, "--calib", "digits", "--effort", "fast"], "leave out --calib, --effort"),
        (["--max-drop", 1, "--val", "digits"], "leave out --val, --max-drop"),
        (["--ratio", 2, "--finetune", 3, "--train", "digits"], "leave out --train, --epochs"),
        (["--ratio", 900], "--ratio 900 is out of reach"),
        (["--ratio", 2, "--include", "nothing*"], "matches no weight that could be compressed"),
        (["--ratio", 2, "--include", "embed", "--exclude", "*"], "no layer is left to compress"),
        ([], "state exactly one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_leaves_nothing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[object], wanted: str
) -> None:
    code, text = run(capsys, shards, *options, "-o", tmp_path / "out")
    assert (code, text.count("\n")) == (2, 1)
    assert wanted in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_commands_that_need_a_network_say_so(
    shards: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    option = "--data" if command == "evaluate" else "--train"
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, str(shards), "--arch", "none", option, "digits"])
    assert exit_.value.code == 2
    assert "--arch none is for compress and plan" in capsys.readouterr().err


def test_names_that_cores_would_take_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": matrix(32, 32, 0), "a.cores.1": torch.ones(2)}, tmp_path / "net.safetensors")
    with pytest.raises(PlanError, match=r"called as TT-cores would be: a\.cores\.1"):
        compress_file(
            tmp_path / "net.safetensors", tmp_path / "out.safetensors", Recipe(arch="none", ranks=2)
        )
    assert [each.name for each in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "other.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "adapter.safetensors",
        "x-9.safetensors",
    ],
)
def test_force_does_not_take_the_folder_of_another_checkpoint(
    shards: Path, tmp_path: Path, name: str
) -> None:
    compress_file(shards, tmp_path / "out", GOAL)
    before = content(tmp_path / "out")
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds what this command does not write: {name}"):
        compress_file(shards, tmp_path / "out", GOAL.override(seed=5), force=True)
    assert content(tmp_path / "out") == {**before, name: b"mine"}
    assert not (tmp_path / "out.partial").exists()


def test_force_does_not_take_another_kind_for_an_earlier_run(
    shards: Path, compressed: Path, tmp_path: Path
) -> None:
    """The names of shards are the same everywhere: a dense checkpoint is not what compressing has written."""
    for source, force_over in ((shards, shards), (compressed, compressed)):
        other = tmp_path / f"other-{source.name}"
        shutil.copytree(force_over, other)
        before = content(other)
        act = compress_file if source == shards else expand_file
        with pytest.raises(CheckpointError, match=r"does not write: x-1.safetensors, x-2.safetensors"):
            act(source, other, *[GOAL] * (source == shards), force=True)
        assert content(other) == before


def test_an_output_folder_that_is_in_use_needs_force(shards: Path, compressed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    with pytest.raises(CheckpointError, match="--force"):
        compress_file(shards, tmp_path / "out", GOAL)
    with pytest.raises(CheckpointError, match="--force"):
        expand_file(compressed, tmp_path / "out")
    compress_file(shards, tmp_path / "out", GOAL, force=True)
    assert content(tmp_path / "out") == {**content(compressed), "notes": b""}
    with pytest.raises(CheckpointError, match="that are to be read"):
        compress_file(shards, shards, GOAL, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is not a folder"):
        compress_file(shards, tmp_path / "file", GOAL, force=True)


# ------------------------------------------------------------------------------------------------ stopping and going on


def stop_in(patch: pytest.MonkeyPatch, function: str, after: int, act: Callable[[], None]) -> None:
    """Make `act` happen at one of the calls of a function that the compression uses."""
    module: Any = {"write_safetensors": work, "encode_index": writing}.get(function, tensorwise)
    whole, calls = getattr(module, function), iter(range(1000))

    def counted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == after:
            act()
        return whole(*arguments, **options)

    patch.setattr(module, function, counted)


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(source: Path, output: Path, function: str, after: int) -> str:
    """What is said when Ctrl-C comes there."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, function, after, interrupt)
        with pytest.raises(KeyboardInterrupt) as error:
            compress_file(source, output, GOAL)
    return str(error.value)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child(source: Path, output: Path, function: str, after: int, rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(as_torchrun(rank, size, port))
    if function and rank == size - 1:
        stop_in(pytest.MonkeyPatch(), function, after, die)
    compress_file(source, output, GOAL)


def run_children(
    source: Path, output: Path, size: int, function: str = "", after: int = 0
) -> list[int | None]:
    """Exit codes of so many processes, the last of which is killed where a function is named."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arguments = [(source, output, function, after, rank, size, port) for rank in range(size)]
    children = [context.Process(target=child, args=each) for each in arguments]
    for each in children:
        each.start()
    for each in children:
        each.join(100)
        each.kill()
    return [each.exitcode for each in children]


def results(folder: Path) -> dict[str, int]:
    """When each was finished."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*-0*.safetensors")}


@pytest.mark.parametrize(
    ("function", "after", "finished"),
    [("write_safetensors", 2, 2), ("decompose", 0, 7), ("decompose", 4, 11), ("write_shards", 0, 14)],
)
def test_killed_it_goes_on_from_the_last_finished_tensor(
    shards: Path, compressed: Path, tmp_path: Path, function: str, after: int, finished: int
) -> None:
    output, kept = tmp_path / "net-tt", tmp_path / "net-tt.partial"
    assert run_children(shards, output, 1, function, after) == [-signal.SIGKILL]
    assert not output.exists()
    before = results(kept)
    assert len(before) == finished
    assert str(kept) in interrupted(shards, output, "write_shards", 0)
    assert results(kept).items() >= before.items()
    compress_file(shards, output, GOAL)
    assert content(output) == content(compressed)
    assert [each.name for each in tmp_path.iterdir()] == ["net-tt"]


def test_interrupted_while_writing_the_folder_needs_no_force(
    shards: Path, compressed: Path, tmp_path: Path
) -> None:
    interrupted(shards, tmp_path / "net-tt", "encode_index", 0)
    assert len(content(tmp_path / "net-tt")) == 3
    compress_file(shards, tmp_path / "net-tt", GOAL)
    assert content(tmp_path / "net-tt") == content(compressed)


@pytest.mark.parametrize("sharded", [False, True])
def test_stopped_when_all_is_written_it_needs_no_force(
    file: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """The output is there, and so is the folder of the run that wrote it."""
    source = shards if sharded else file
    output = tmp_path / ("net-tt" if sharded else "net-tt.safetensors")
    remove = work._remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "_remove", lambda folder: interrupt() if output.exists() else remove(folder))
        with pytest.raises(KeyboardInterrupt):
            compress_file(source, output, GOAL)
    written = content(output) if sharded else output.read_bytes()
    compress_file(source, output, GOAL)
    assert (content(output) if sharded else output.read_bytes()) == written
    assert not output.with_name(f"{output.name}.partial").exists()
    with pytest.raises(CheckpointError, match="exists"):
        compress_file(source, output, GOAL)


def test_the_command_line_says_how_to_go_on(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, "decompose", 3, interrupt)
        code, text = run(capsys, file, "--ratio", 2.5)
    assert (code, text.strip()) == (
        130,
        "ttcompress: interrupted; the same command once more goes on from net-tt.safetensors.partial",
    )
    code, text = run(capsys, file, "--ratio", 2.6)
    assert code == 2
    assert "ratio was 2.5, is 2.6" in text
    assert "--force" in text
    cli.main(["compress", str(file), "--arch", "none", "--ratio", "2.5"])
    assert [each.name for each in tmp_path.iterdir()] == ["net-tt.safetensors"]


@pytest.mark.parametrize(
    ("change", "differs"),
    [({"dtype": "float16"}, "dtype"), ({"seed": 3}, "seed"), ({"format": "lowrank"}, "format")],
)
def test_what_another_run_has_left_is_not_taken(
    shards: Path, tmp_path: Path, change: dict[str, Any], differs: str
) -> None:
    interrupted(shards, tmp_path / "out", "decompose", 3)
    recipe = GOAL.override(**change)
    with pytest.raises(CheckpointError, match=f"left from another command .*{differs} was"):
        compress_file(shards, tmp_path / "out", recipe)
    compress_file(shards, tmp_path / "out", recipe, force=True)
    compress_file(shards, tmp_path / "fresh", recipe)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["thesis.tex", "cores-1.safetensors", "model.safetensors", "figures"])
@pytest.mark.parametrize("with_key", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_someone_else_is_not_removed(
    shards: Path, tmp_path: Path, name: str, with_key: bool, force: bool
) -> None:
    """Whether a run has worked in it or not."""
    interrupted(shards, tmp_path / "out", "decompose", 3)
    other, folder = GOAL.override(seed=3), tmp_path / "out.partial"
    if not with_key:
        (folder / "run.json").unlink()
    (folder / name).mkdir()
    before = results(folder)
    with pytest.raises(
        CheckpointError, match=f"is not what a stopped run has left: it holds {name}; move it away"
    ):
        compress_file(shards, tmp_path / "out", other, force=force)
    assert (folder / name).exists()
    assert results(folder) == before


def test_a_folder_without_a_key_is_not_removed(shards: Path, tmp_path: Path) -> None:
    interrupted(shards, tmp_path / "out", "decompose", 3)
    (tmp_path / "out.partial" / "run.json").unlink()
    before = results(tmp_path / "out.partial")
    with pytest.raises(CheckpointError, match=r"it has no run.json of another run"):
        compress_file(shards, tmp_path / "out", GOAL, force=True)
    assert results(tmp_path / "out.partial") == before


def test_what_is_put_into_the_folder_of_a_run_stays_there(shards: Path, tmp_path: Path) -> None:
    interrupted(shards, tmp_path / "out", "decompose", 3)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    compress_file(shards, tmp_path / "out", GOAL)
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("text", ["", "5", "[]", "{", "[" * 5000])
def test_damaged_keys_are_refused(shards: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run.json: cannot be read"):
        compress_file(shards, tmp_path / "out", GOAL)
    assert (folder / "run.json").read_text() == text


# ------------------------------------------------------------------------------------------------------------ processes


def test_two_processes_write_what_one_does(shards: Path, compressed: Path, tmp_path: Path) -> None:
    output = tmp_path / "net-tt"
    killed = run_children(shards, output, 2, "decompose", 1)
    assert killed[1] == -signal.SIGKILL
    assert killed[0] not in (0, None)
    before = results(tmp_path / "net-tt.partial")
    assert 9 <= len(before) < 14
    assert run_children(shards, output, 2) == [0, 0]
    assert content(output) == content(compressed)
    assert [each.name for each in tmp_path.iterdir()] == ["net-tt"]


def test_processes_of_one_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in as_torchrun(3, 1000, 29500).items():
        monkeypatch.setenv(name, value)
    with fixed_threads():
        assert torch.get_num_threads() == 1


def test_variables_of_a_shell_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with fixed_threads():
        before = torch.get_num_threads()
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1000")
        with fixed_threads():
            assert torch.get_num_threads() == before


# --------------------------------------------------------------------------------------------------------------- memory

WATCHED = """
import re, sys, threading, time
from pathlib import Path
import torch
from ttcompress.commands import weights_only as tensorwise
from ttcompress.recipe import Recipe
from ttcompress.tt.decompose import TTSVD

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

def random_cores(layer, weight):
    return TTSVD(tuple(torch.rand(shape) for shape in layer.core_shapes.values()), 0.5)

tensorwise.decompose = random_cores
start = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
tensorwise.compress_weights(Path(sys.argv[1]), Path(sys.argv[2]), Recipe(arch="none", ranks=200, format="lowrank"))
print(peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """150 MB in, 118 MB out: neither weights nor cores are in memory together. What a decomposition takes is aside."""
    tensors = {f"layers.{k}.weight": torch.randn(512, 512) for k in range(144)}
    homes = {name: f"x-{k // 36}.safetensors" for k, name in enumerate(tensors)}
    write(tmp_path / "net", tensors, homes)
    command = [sys.executable, "-c", WATCHED, tmp_path / "net", tmp_path / "out"]
    growth = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0 < growth < 60
    assert stored_bytes(tmp_path / "out") > 115e6
