"""ONNX files: what onnxruntime computes from them, what is in them, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import run_command
from torch import Tensor, nn

import ttcompress
from ttcompress import cli
from ttcompress.commands import export
from ttcompress.commands.compress import compress_file
from ttcompress.errors import ArchitectureError, DataError, ExportError, TTCompressError
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.networks import onnx_files
from ttcompress.networks.zoo import Mlp
from ttcompress.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

MERGING = {"MatMul", "Gather", "Transpose", "Unsqueeze", "Einsum"}
"""What is left where cores are made into kernels at run time; `chain` and `lowrank` need none of it."""
GEOMETRIES = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(7, 10, 3, stride=2, padding=1),
        nn.Conv2d(10, 12, 3, padding="same", dilation=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 13, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(13, 9, (2, 3), padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten(),
        nn.Linear(216, 37), nn.ReLU(), nn.Linear(37, 5),
    )
"""


def builder(folder: Path, source: str) -> tuple[str, Callable[[], nn.Module]]:
    """A file with a function `build`: its reference, and the function."""
    (folder / "net.py").write_text(source)
    names: dict[str, Any] = {}
    exec(source, names)
    return f"{folder / 'net.py'}:build", names["build"]


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Mlp(width0=784, width1=300, width2=10).to(dtype)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a dense checkpoint of the MNIST net in it."""
    monkeypatch.chdir(tmp_path)
    write_dense(tmp_path / "mlp.pt", mlp().state_dict())
    return tmp_path


@pytest.fixture
def compressed(folder: Path) -> Path:
    compress_file(folder / "mlp.pt", folder / "small.safetensors", Recipe(ranks=4))
    return folder / "small.safetensors"


def found(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(["output"], {"input": x.numpy()})
    return torch.from_numpy(output)


def difference(
    path: Path, model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> float:
    """The largest at batches that the tool itself does not try, over the largest output."""
    worst = 0.0
    for batch in (1, 2, 5, 7):
        x = torch.rand(batch, *shape).to(dtype)
        with torch.no_grad():
            wanted = model(x)
        output = found(path, x)
        assert output.dtype == wanted.dtype
        worst = max(worst, float((output - wanted).abs().max() / wanted.abs().max()))
    return worst


def weight_bytes(path: Path) -> int:
    return sum(len(each.raw_data) for each in onnx.load(path).graph.initializer)


def check_standard(path: Path, shape: tuple[int, ...]) -> None:
    """Default domain only, one input and one output under their names, a batch of any size."""
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 18)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    (given,), (returned,) = model.graph.input, model.graph.output
    assert (given.name, returned.name) == ("input", "output")
    sizes = given.type.tensor_type.shape.dim
    assert (sizes[0].dim_param, [size.dim_value for size in sizes][1:]) == ("batch", list(shape))
    assert returned.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(each.external_data for each in model.graph.initializer)


@pytest.mark.parametrize("weight_format", ["matrix", "chain", "naive", "lowrank"])
def test_every_format_and_geometry(weight_format: str, folder: Path) -> None:
    """Channels and features that do not factor, so that `matrix` is padded; no layer is rebuilt to its dense size."""
    torch.manual_seed(0)
    reference, build = builder(folder, GEOMETRIES)
    linear = weight_format in ("matrix", "lowrank")
    options = {"ranks": 3, "include": ["*"]} if linear else {"exclude": ["9", "11"], "include": ["*"]}
    small, report = ttcompress.compress(build().eval(), conv_ranks=3, format=weight_format, **options)
    assert len(report.plan.layers) >= (5 if linear else 4)
    ttcompress.save(small, report, folder / "small.safetensors")
    done = export.export_file(
        Path("small.safetensors"), Path("out.onnx"), arch=reference, input_size=(7, 9, 8)
    )
    assert difference(folder / "out.onnx", small, (7, 9, 8)) < 1e-5
    assert done.difference is not None
    assert done.difference < 1e-5
    assert weight_bytes(folder / "out.onnx") < report.bytes_after + 2000
    assert done.tensor_bytes == report.bytes_after
    assert (weight_format != "chain") or not MERGING & set(done.operators)
    check_standard(folder / "out.onnx", (7, 9, 8))


def test_the_command_says_what_it_wrote(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["export", compressed.name, "--onnx", "out.onnx"])
    out, err = capsys.readouterr()
    assert err == ""
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert [name for name, _ in lines] == ["file", "input", "operators", "difference"]
    assert lines[0][1].startswith("out.onnx, ")
    assert lines[1][1] == "float32 (batch, 1, 28, 28)"
    assert lines[2][1].startswith("opset 18: ")
    assert float(lines[3][1].split()[0]) < 1e-5
    cli.main(["export", compressed.name, "--onnx", "out.onnx", "--force", "--json", "--input-size", "784"])
    done = json.loads(capsys.readouterr().out)
    path = compressed.with_name("out.onnx")
    assert done["file"] == "out.onnx"
    assert done["file_bytes"] == path.stat().st_size
    assert done["input_shape"] == [784]
    assert sum(done["operators"].values()) == len(onnx.load(path).graph.node)
    assert list(compressed.parent.glob(".*")) == []


def test_same_file_same_bytes_without_paths_with_the_normalisation(compressed: Path, folder: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        export.export_file(compressed, folder / name)
    content = (folder / "one.onnx").read_bytes()
    assert content == (folder / "two.onnx").read_bytes()
    for path in (folder, Path(ttcompress.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in content
    assert b".py" not in content
    (entry,) = onnx.load(folder / "one.onnx").metadata_props
    assert entry.key == "preprocessing"
    assert json.loads(entry.value) == read_metadata(compressed)["preprocessing"]


def test_a_dense_checkpoint(folder: Path) -> None:
    done = export.export_file(folder / "mlp.pt", folder / "out.onnx")
    assert done.operators["Gemm"] == 2
    assert done.operators["Relu"] == 1
    assert difference(folder / "out.onnx", mlp(), (1, 28, 28)) < 1e-5
    assert 0 < done.file_bytes - done.tensor_bytes < 2000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_cores_of_another_type_than_the_network(dtype: str, folder: Path) -> None:
    compress_file(folder / "mlp.pt", folder / "small.safetensors", Recipe(ranks=4, dtype=dtype))
    done = export.export_file(folder / "small.safetensors", folder / "out.onnx")
    assert done.dtype == "float32"
    assert difference(folder / "out.onnx", ttcompress.load(folder / "small.safetensors"), (1, 28, 28)) < 1e-5
    check_standard(folder / "out.onnx", (1, 28, 28))
    assert weight_bytes(folder / "out.onnx") < done.tensor_bytes + 1000


@pytest.mark.parametrize(
    ("dtype", "computes_in", "tolerance"),
    [(torch.float16, "float16", 1e-2), (torch.bfloat16, "float32", 3e-2), (torch.float64, "float32", 1e-5)],
)
def test_a_network_of_another_type(
    folder: Path, dtype: torch.dtype, computes_in: str, tolerance: float
) -> None:
    write_dense(folder / "mlp.pt", mlp(dtype).state_dict())
    compress_file(folder / "mlp.pt", folder / "small.safetensors", Recipe(ranks=4))
    done = export.export_file(folder / "small.safetensors", folder / "out.onnx")
    assert done.dtype == computes_in
    model = ttcompress.load(folder / "small.safetensors")
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        wanted = model(x.to(dtype)).float()
    output = found(folder / "out.onnx", x.to(getattr(torch, computes_in))).float()
    assert float((output - wanted).abs().max() / wanted.abs().max()) < tolerance


def test_a_published_network(checkpoints: Path, tmp_path: Path) -> None:
    """The file is as large as the compressed one, and its layers are convolutions alone."""
    small = tmp_path / "small.safetensors"
    compress_file(checkpoints / "resnet20-12fca82f.th", small, Recipe(ratio=3, format="chain"))
    done = export.export_file(small, tmp_path / "out.onnx")
    assert done.input_shape == (3, 32, 32)
    assert difference(tmp_path / "out.onnx", ttcompress.load(small), (3, 32, 32)) < 1e-5
    assert done.file_bytes < small.stat().st_size
    assert not MERGING & set(done.operators)
    check_standard(tmp_path / "out.onnx", (3, 32, 32))


def refused(source: Path, message: str, kind: type[TTCompressError] = ExportError, **options: Any) -> None:
    """An error that says `message` in one line; nothing is written."""
    before = {path: path.read_bytes() for path in source.parent.iterdir() if path.is_file()}
    with pytest.raises(kind, match=message) as caught:
        export.export_file(source, source.with_name("out.onnx"), **options)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in source.parent.iterdir() if path.is_file()} == before


def test_an_existing_file_stays(compressed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compressed.with_name("out.onnx").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", compressed.name, "--onnx", "out.onnx"])
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err
        == "ttcompress: out.onnx: exists; choose another name, or --force to replace it\n"
    )
    assert compressed.with_name("out.onnx").read_text() == "mine"


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_extra(missing: str, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    refused(compressed, rf"^export needs {missing}: pip install 'ttcompress\[onnx\]'$")


def test_without_onnxruntime_there_is_no_comparison(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    cli.main(["export", compressed.name, "--onnx", "out.onnx"])
    assert "difference  not measured: onnxruntime is not installed\n" in capsys.readouterr().out
    check_standard(compressed.with_name("out.onnx"), (1, 28, 28))


def test_the_size_of_an_input_has_to_be_known_and_right(folder: Path) -> None:
    write_dense(folder / "mlp.pt", Mlp(width0=64, width1=128, width2=10).state_dict())
    refused(folder / "mlp.pt", "size of an input is not known; give it with --input-size", ArchitectureError)
    refused(folder / "mlp.pt", "numbers from 1 on, not 3,0", ArchitectureError, input_size=(3, 0))
    refused(folder / "mlp.pt", r"does not take images of shape \(65,\)", DataError, input_size=(65,))
    done = export.export_file(folder / "mlp.pt", folder / "out.onnx", input_size=(1, 8, 8))
    assert done.input_shape == (1, 8, 8)


def test_a_difference_is_an_error(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = export._run
    monkeypatch.setattr(export, "_run", lambda *given: [[y + 3e-4 * y.abs().max()] for (y,) in run(*given)])
    refused(compressed, r"onnxruntime differs from torch by 0\.0003 of the largest output, more than 0\.0001")
    monkeypatch.setattr(
        export, "_run", lambda *given: [[y * ([1, np.nan][len(y) > 1])] for (y,) in run(*given)]
    )
    refused(compressed, "differs from torch by nan")
    monkeypatch.setattr(export, "_run", lambda *given: [[y[:, :9]] for (y,) in run(*given)])
    refused(compressed, r"onnxruntime returns \(1, 9\), torch \(1, 10\)")


def test_more_than_one_file_holds(compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", 10_000)
    refused(compressed, "bytes of tensors; an ONNX file holds 10,000 at most")


BRANCHES = """
from torch import nn

class Net(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y

def build():
    return Net(4, 3)
"""
SEVERAL = BRANCHES.replace("y if y.sum() > 0 else -y", '{"boxes": y, "heads": [2 * y[:, None], y.argmax(1)]}')
FIXED_BATCH = BRANCHES.replace("y if y.sum() > 0 else -y", "y.reshape(2, 3)")


def test_each_of_several_outputs_has_its_name(folder: Path) -> None:
    reference, build = builder(folder, SEVERAL)
    model = build()
    write_dense(folder / "net.pt", model.state_dict())
    arguments = ("--arch", reference, "--input-size", "4", "--onnx", "net.onnx")
    done = run_command("export", "net.pt", *arguments, cwd=folder)
    assert (done.code, done.err) == (0, "")

    session = onnxruntime.InferenceSession(folder / "net.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["boxes", "heads.0", "heads.1"]
    x = torch.randn(3, 4)
    with torch.no_grad():
        wanted = model(x)
    boxes, first, second = (torch.from_numpy(each) for each in session.run(None, {"input": x.numpy()}))
    torch.testing.assert_close(boxes, wanted["boxes"])
    torch.testing.assert_close(first, wanted["heads"][0])
    assert second.tolist() == wanted["heads"][1].tolist()


@pytest.mark.parametrize(
    ("source", "message", "kind"),
    [
        (BRANCHES, "torch cannot export the network: ", ExportError),
        (FIXED_BATCH, r"does not take images of shape \(4,\): shape '\[2, 3\]' is invalid", DataError),
    ],
    ids=["branches", "fixed batch"],
)
def test_networks_that_do_not_export(
    source: str, message: str, kind: type[TTCompressError], folder: Path
) -> None:
    reference, build = builder(folder, source)
    write_dense(folder / "net.pt", build().state_dict())
    refused(folder / "net.pt", message, kind, arch=reference, input_size=(4,))


def test_operators_outside_the_standard_are_named() -> None:
    import onnx_ir

    nodes = [
        onnx.helper.make_node("Relu", ["x"], ["y"]),
        onnx.helper.make_node("Gelu", ["y"], ["z"], domain="my.own"),
    ]
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xz"]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("my.own", 1)]
    model = onnx_ir.serde.deserialize_model(onnx.helper.make_model(graph, opset_imports=opsets))
    with pytest.raises(ExportError, match=r"not of the ONNX standard: my\.own::Gelu$"):
        onnx_files.operators(model)
