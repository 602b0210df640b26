"""A file whose metadata and tensors do not belong together is refused by whoever reads it, before it is read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_command, succeeded
from torch import nn

import ttcompress
from ttcompress.commands.expand import expand_file
from ttcompress.errors import CheckpointError
from ttcompress.files.compressed import MOST_TIMES, SMALL, check_size, stored_report
from ttcompress.files.header import TensorInfo
from ttcompress.files.shards import INDEX_SUFFIX, read_index
from ttcompress.records.layers import LinearSpec
from ttcompress.records.plan import CompressionPlan, LayerPlan
from ttcompress.records.report import Report
from ttcompress.tt.shapes import tensorize_shape

OLDER = Path(__file__).parents[1] / "records" / "older"
CORE, KEPT, BIAS = "fc1.cores.0", "fc3.weight", "fc2.bias"
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class File:
    """The three parts of a compressed file, to be changed."""

    header: dict[str, Any]
    metadata: Any
    data: bytes

    @classmethod
    def read(cls, path: Path) -> File:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        metadata = json.loads(header["__metadata__"]["ttcompress"])
        return cls(header, metadata, content[8 + length :])

    def write(self, path: Path) -> Path:
        text = self.metadata if isinstance(self.metadata, str) else json.dumps(self.metadata)
        self.header["__metadata__"]["ttcompress"] = text
        start = json.dumps(self.header).encode()
        path.write_bytes(struct.pack("<Q", len(start)) + start + self.data)
        return path

    def fill(self, name: str, value: float) -> None:
        """Make the first entry of a float32 tensor this one."""
        start, _ = self.header[name]["data_offsets"]
        self.data = self.data[:start] + np.float32(value).tobytes() + self.data[start + 4 :]

    def add(self, name: str, *shape: int) -> None:
        """One more float32 tensor, of zeros."""
        more = bytes(4 * int(np.prod(shape)))
        span = [len(self.data), len(self.data) + len(more)]
        self.header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": span}
        self.data += more

    def layer(self, fqn: str) -> dict[str, Any]:
        found: dict[str, Any] = next(each for each in self.metadata["layers"] if each["fqn"] == fqn)
        return found

    def forget_totals(self) -> None:
        """Drop what would give a change of the counts away."""
        for total in ("params_before", "params_after", "compression"):
            del self.metadata[total]

    def leave_out(self, list_name: str, key: str, name: str) -> None:
        """Drop an entry of the metadata."""
        self.metadata[list_name] = [each for each in self.metadata[list_name] if each[key] != name]
        self.forget_totals()

    def miscount(self, name: str, params: int) -> None:
        """State another number of entries of a kept parameter."""
        next(each for each in self.metadata["kept_parameters"] if each["name"] == name)["params"] = params
        self.forget_totals()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tt.safetensors and int8.safetensors of a network for digits, made by the command."""
    path = tmp_path_factory.mktemp("compressed")
    torch.manual_seed(0)
    widths = (64, 32, 32, 10)
    state = {}
    for number, (width, out) in enumerate(pairwise(widths), 1):
        state[f"fc{number}.weight"], state[f"fc{number}.bias"] = torch.randn(out, width), torch.randn(out)
    torch.save(state, path / "mlp.pt")
    for name, dtype in (("tt", "float32"), ("int8", "int8"), ("half", "float16")):
        words = (
            "compress",
            "mlp.pt",
            "--arch",
            "mlp",
            "--ranks",
            "4",
            "--dtype",
            dtype,
            "-o",
            f"{name}.safetensors",
        )
        succeeded(*words, cwd=path)
    return path


def refusals(file: Path, folder: Path, readers: tuple[str, ...]) -> list[str]:
    """What each command says of a file that it has to refuse, leaving nothing behind."""
    options = {
        "report": [], "expand": ["-o", "dense.pt"], "evaluate": ["--data", "digits"], "export": ["--onnx", "net.onnx"],
        "finetune": ["--train", "digits", "-o", "trained.safetensors"], "bench": ["--input-size", "64"],
    }  # fmt: skip
    before = sorted(folder.iterdir())
    said = []
    for reader in readers:
        done = run_command(reader, file, *options[reader], cwd=folder)
        assert (reader, done.code, done.out) == (reader, 2, "")
        assert done.err.startswith(f"ttcompress: {file}: ")
        assert done.err.count("\n") == 1
        said.append(done.err)
    with pytest.raises(CheckpointError):
        ttcompress.load(file)
    assert sorted(folder.iterdir()) == before
    return said


def renamed(old: str, new: str) -> Callable[[File], None]:
    return lambda file: file.header.update({new: file.header.pop(old)})


def shaped(name: str, *shape: int) -> Callable[[File], None]:
    return lambda file: file.header[name].update(shape=list(shape))


def typed(name: str, dtype: str) -> Callable[[File], None]:
    return lambda file: file.header[name].update(dtype=dtype)


LIES: dict[str, tuple[str, Callable[[File], object], str]] = {
    "a core renamed": ("tt", renamed(CORE, "fc1.cores.9"), f"lacks {CORE}"),
    "a core of another order": ("tt", shaped("fc1.cores.1", 4, 4, 2, 1, 4), "fc1.cores.1 is F32 4x4x2x1x4"),
    "a core of whole numbers": ("tt", typed(CORE, "I32"), f"{CORE} is I32"),
    "a core of the other half precision": ("half", typed(CORE, "BF16"), f"{CORE} is BF16"),
    "scales that are whole numbers": ("int8", typed("fc1.core_scales.0", "U32"), "fc1.core_scales.0 is U32"),
    "codes without a sign": ("int8", typed(CORE, "U8"), f"{CORE} is U8"),
    "a scale renamed": ("int8", renamed("fc1.core_scales.1", "fc1.scales.1"), "lacks fc1.core_scales.1"),
    "a bias renamed": ("tt", renamed(BIAS, "fc2.b"), f"lacks {BIAS}"),
    "a bias of another number": (
        "tt",
        lambda file: file.miscount(BIAS, 31),
        f"{BIAS} has 32 entries, not 31",
    ),
    "a kept weight transposed": ("tt", shaped(KEPT, 32, 10), "other names, types or shapes"),
    "a kept weight flat": ("tt", shaped(KEPT, 320), "other names, types or shapes"),
    "a kept weight as whole numbers": ("tt", typed(KEPT, "I32"), "other names, types or shapes"),
    "one tensor more": ("tt", lambda file: file.add("fc9.bias", 3), "other names, types or shapes"),
    "an empty tensor more": ("tt", lambda file: file.add("mask", 0), "other names, types or shapes"),
    "one core more": ("tt", lambda file: file.add("fc1.cores.7", 1), "other names, types or shapes"),
    "a replaced weight beside its cores": (
        "tt",
        lambda file: file.add("fc1.weight", 32, 64),
        "fc1.weight is not to be",
    ),
    "a layer left out": (
        "tt",
        lambda file: file.leave_out("layers", "fqn", "fc1"),
        "other names, types or shapes",
    ),
    "a layer listed twice": (
        "tt",
        lambda file: file.metadata["layers"].append(file.layer("fc1")),
        "once, not twice",
    ),
    "a kept layer left out": ("tt", lambda file: file.leave_out("layers", "fqn", "fc3"), "other names"),
    "a bias left out": ("tt", lambda file: file.leave_out("kept_parameters", "name", BIAS), "other names"),
    "layers that changed names": (
        "tt",
        lambda file: file.layer("fc2").update(fqn="fc5"),
        "lacks fc5.cores.0",
    ),
    "another type of the weight": (
        "int8",
        lambda file: file.layer("fc1").update(weight_dtype="float16"),
        "types",
    ),
    "a tied name invented": ("tt", lambda file: file.metadata.update(tied={"fc4.bias": BIAS}), "other names"),
    "a tied name that is stored": (
        "tt",
        lambda file: file.metadata.update(tied={BIAS: "fc1.bias"}),
        "parameter of its own",
    ),
    "a layout that is none": ("tt", lambda file: file.metadata.update(layout="0" * 63), "layout"),
    "a layout of another file": ("tt", lambda file: file.metadata.update(layout="0" * 64), "other names"),
}
# What loads without the layout is what files looked like before there was one.
SEEN_BY_NAMES = (
    "a core renamed", "a core of another order", "a scale renamed", "a bias renamed", "a bias of another number",
    "one core more", "a replaced weight beside its cores", "a layer left out",
)  # fmt: skip


@pytest.mark.parametrize(
    "lie", [lie for lie in LIES if lie not in ("a bias of another number", "a bias left out and stored")]
)
def test_metadata_and_tensors_that_disagree_are_refused_by_every_reader(
    lie: str, folder: Path, tmp_path: Path
) -> None:
    of, tell, says = LIES[lie]
    file = File.read(folder / f"{of}.safetensors")
    tell(file)
    path = file.write(tmp_path / "lie.safetensors")
    for said in refusals(path, tmp_path, ("report", "expand", "evaluate", "export", "finetune", "bench")):
        assert says in said


@pytest.mark.parametrize("lie", SEEN_BY_NAMES)
def test_older_files_are_compared_as_far_as_they_say(lie: str, folder: Path, tmp_path: Path) -> None:
    of, tell, _ = LIES[lie]
    file = File.read(folder / f"{of}.safetensors")
    del file.metadata["layout"]
    ttcompress.load(file.write(tmp_path / "older.safetensors"))
    tell(file)
    path = file.write(tmp_path / "lie.safetensors")
    refusals(path, tmp_path, ("report", "expand"))


def twice(text: str, key: str) -> str:
    """JSON in which a key of some object comes twice, the second time with the same value."""
    start = text.index(f'"{key}":')
    _, end = json.JSONDecoder().raw_decode(text, start + len(key) + 3)
    return f"{text[:end]},{text[start:end]}{text[end:]}"


@pytest.mark.parametrize("key", ["layers", "schema", "fqn", "in_features", "sha256", "tied"])
def test_a_key_that_comes_twice_in_the_metadata(key: str, folder: Path, tmp_path: Path) -> None:
    file = File.read(folder / "tt.safetensors")
    file.metadata = twice(json.dumps(file.metadata, separators=(",", ":")), key)
    for said in refusals(file.write(tmp_path / "lie.safetensors"), tmp_path, ("report", "expand")):
        assert f'the key "{key}" comes twice' in said


@pytest.mark.parametrize("key", [CORE, "shape", "__metadata__", "ttcompress"])
def test_a_key_that_comes_twice_in_the_header(key: str, folder: Path, tmp_path: Path) -> None:
    file = File.read(folder / "tt.safetensors")
    start = twice(json.dumps(file.header, separators=(",", ":")), key).encode()
    path = tmp_path / "lie.safetensors"
    path.write_bytes(struct.pack("<Q", len(start)) + start + file.data)
    for said in refusals(path, tmp_path, ("report", "expand")):
        assert f'the key "{key}" comes twice' in said


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize(
    ("of", "name"),
    [("tt", CORE), ("int8", "fc1.core_scales.0"), ("tt", BIAS), ("tt", KEPT), ("int8", "fc3.bias")],
)
def test_values_that_are_not_finite_are_refused_by_whoever_reads_them(
    of: str, name: str, value: float, folder: Path, tmp_path: Path
) -> None:
    file = File.read(folder / f"{of}.safetensors")
    file.fill(name, value)
    path = file.write(tmp_path / "lie.safetensors")
    for said in refusals(path, tmp_path, ("expand", "evaluate", "export", "finetune", "bench")):
        assert f"holds NaN or Inf in {name}" in said


def masked() -> nn.Module:
    net = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    net.register_buffer("mask", torch.full((3, 3), -inf).triu(1))
    return net


def test_what_was_not_finite_when_it_was_written_is_read(tmp_path: Path) -> None:
    """Masks are full of it; a bias may hold it, a core may not."""
    net = masked()
    net[2].bias.data[1] = nan  # type: ignore[union-attr,operator,index]
    small, report = ttcompress.compress(net, ranks=2, include=["0"])
    path = tmp_path / "masked.safetensors"
    ttcompress.save(small, report, path)

    assert File.read(path).metadata["non_finite"] == ["2.bias", "mask"]
    loaded = ttcompress.load(path, factory=masked)
    assert torch.equal(loaded.mask, net.mask)  # type: ignore[arg-type]
    expand_file(path, tmp_path / "dense.pt")
    assert torch.load(tmp_path / "dense.pt")["2.bias"].isnan().sum() == 1

    small[0].cores[0].data[0] = nan  # type: ignore[index,union-attr]
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 0\.cores\.0"):
        ttcompress.save(small, report, tmp_path / "broken.safetensors")
    assert not (tmp_path / "broken.safetensors").exists()


def bomb(power: int, bias: bool = False) -> Report:
    """Of one weight of 2^power x 2^power, in cores of two by two at rank 1."""
    spec = LinearSpec(2**power, 2**power, bias)
    modes = tensorize_shape("matrix", spec.weight_shape, [2] * power, [2] * power)
    layer = LayerPlan("fc1", spec, modes, (1,) * (power + 1), "float32")
    return Report(CompressionPlan((layer,), ()), 1, 1, "0")


@pytest.mark.parametrize("power", [15, 16, 20])
def test_a_few_bytes_that_stand_for_gigabytes_are_shown_but_not_expanded(
    power: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bomb(power)
    file = File({"__metadata__": {"format": "pt"}}, report.metadata(), b"")
    for name in report.layers[0].core_shapes:
        file.add(name, 1, 2, 2, 1, 1)
    path = file.write(tmp_path / "bomb.safetensors")
    assert path.stat().st_size < 6000
    assert f"{4**power:,} -> {4 * power}" in succeeded("report", path, cwd=tmp_path)
    for said in refusals(path, tmp_path, ("expand",)):
        assert f"stands for {4 * 4**power:,} bytes of dense weights, over 10,000 times" in said
        assert "TTCOMPRESS_TRUST=1" in said


def test_the_limit_is_where_it_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide layers of a real network have biases; the rows of the paper are small beside a gigabyte."""
    check_size(bomb(14), {"fc1.cores.0": TensorInfo("F32", (1,))})
    assert SMALL == 4 * 4**14

    enough = 4 * 4**16 // MOST_TIMES // 4 + 1
    check_size(bomb(16), {"x": TensorInfo("F32", (enough,))})
    with pytest.raises(CheckpointError, match="stands for"):
        check_size(bomb(16), {"x": TensorInfo("F32", (enough - 1,))})
    monkeypatch.setenv("TTCOMPRESS_TRUST", "1")
    check_size(bomb(16), {"x": TensorInfo("F32", (1,))})


def test_a_network_far_wider_than_its_tensors_is_not_built(folder: Path, tmp_path: Path) -> None:
    file = File.read(folder / "tt.safetensors")
    file.metadata["architecture"]["arguments"]["width1"] = 10**9
    for said in refusals(file.write(tmp_path / "wide.safetensors"), tmp_path, ("report", "evaluate")):
        assert "architecture.arguments.width1 is 1,000,000,000" in said


@pytest.mark.parametrize("name", ["conv", "int8", "linear", "trained"])
def test_files_from_before_the_layout_are_read(name: str) -> None:
    path = OLDER / f"{name}.safetensors"
    assert "layout" not in File.read(path).metadata
    stored_report(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("pipe.safetensors", "pipe.json", "pipe.toml"):
        os.mkfifo(tmp_path / name)
    torch.save({"fc1.weight": torch.zeros(4, 4)}, tmp_path / "c.pt")
    for words in (
        ("report", "pipe.safetensors"),
        ("compress", "c.pt", "--plan", "pipe.json"),
        ("plan", "c.pt", "--recipe", "pipe.toml"),
    ):
        done = run_command(*words, cwd=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "ordinary file" in done.err


@pytest.mark.parametrize("key", ["weight_map", "a", "metadata"])
def test_a_key_that_comes_twice_in_an_index(key: str, tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "x-1.safetensors"}}
    path = tmp_path / f"x{INDEX_SUFFIX}"
    path.write_text(twice(json.dumps(index, separators=(",", ":")), key))
    with pytest.raises(CheckpointError, match=f'the key "{key}" comes twice'):
        read_index(path)
