"""Plain networks: the same results from torch's own layers, through every tool that takes stock networks."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import ttcompress
from ttcompress.commands.compress import compress_file
from ttcompress.errors import TTCompressError
from ttcompress.files.header import PLAIN_KEY
from ttcompress.files.writing import write_dense, write_safetensors
from ttcompress.layers.base import TTLayer
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.plain import ContractedForm, ContractedLinear, StockForm, plain_forms
from ttcompress.networks.zoo import Mlp
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.tt.shapes import tensorize_shape

if TYPE_CHECKING:
    from command_line import Done

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2), "bias": False},
    {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": (1, 5), "padding": (0, 2), "padding_mode": "circular"},
    {"kernel_size": 1, "stride": 2},
]


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("weight_format", "geometry"), [*product(("chain", "naive", "lowrank", "matrix"), GEOMETRIES)]
)
@torch.no_grad()
def test_every_form_of_a_convolution_computes_the_same(weight_format: str, geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = TTConv2d.from_dense(nn.Conv2d(6, 10, **geometry), weight_format, 3).eval()
    x = torch.randn(2, 6, 9, 8)
    forms = plain_forms(layer)
    assert forms[0].is_dense
    assert len(forms) > 1 or weight_format == "matrix"
    for form in forms:
        built = form.build(layer, torch.float32)
        assert difference(built(x), layer(x)) < 1e-5
        stock = [module for module in built.modules() if not isinstance(module, nn.Sequential)]
        assert {type(each) for each in stock} == {nn.Conv2d}


LINEARS = [
    ("lowrank", None, None, 5),
    ("matrix", (2, 3, 4), (4, 3, 5), 6),
    ("matrix", (4, 6), (6, 10), 3),
    # Padded: 24 of 25 outputs, 60 of 64 inputs.
    ("matrix", (5, 5), (8, 8), 4),
    ("matrix", (24,), (60,), 1),
    ("matrix", (1, 24), (60, 1), 7),
    ("matrix", (2, 2, 3, 2, 1), (2, 2, 3, 5, 1), 9),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weight_format", "outs", "ins", "rank"), LINEARS)
@torch.no_grad()
def test_every_form_of_a_linear_computes_the_same(
    weight_format: str, outs: tuple[int, ...] | None, ins: tuple[int, ...] | None, rank: int, bias: bool
) -> None:
    torch.manual_seed(0)
    modes = tensorize_shape(weight_format, (24, 60), outs, ins)
    layer = TTLinear.from_dense(nn.Linear(60, 24, bias), modes, rank).eval()
    for shape in ((60,), (7, 60), (2, 3, 60)):
        x = torch.randn(shape)
        for form in plain_forms(layer):
            built = form.build(layer, torch.float32)
            assert built(x).shape == layer(x).shape
            assert difference(built(x), layer(x)) < 1e-5


def test_one_cut_between_inputs_and_outputs_is_two_linears() -> None:
    layer = TTLinear.from_dense(nn.Linear(60, 24), tensorize_shape("matrix", (24, 60), (1, 24), (60, 1)), 7)
    assert [type(form) for form in plain_forms(layer)] == [StockForm, StockForm]
    layer = TTLinear.from_dense(nn.Linear(60, 24), tensorize_shape("matrix", (24, 60), (4, 6), (6, 10)), 7)
    assert [type(form) for form in plain_forms(layer)] == [StockForm, ContractedForm]


def test_contraction_goes_from_both_ends() -> None:
    ends = set()
    for outs, ins in (((4, 64), (64, 4)), ((64, 4), (4, 64))):
        modes = tensorize_shape("matrix", (256, 256), outs, ins)
        layer = TTLinear.from_dense(nn.Linear(256, 256), modes, 2).eval()
        _, form = plain_forms(layer)
        assert isinstance(form, ContractedForm)
        ends.add(form.plan.from_last)
        x = torch.randn(3, 256)
        assert difference(form.build(layer, torch.float32)(x), layer(x)) < 1e-5
    assert ends == {True, False}


def test_a_forced_execution_decides() -> None:
    layer = TTConv2d.from_dense(nn.Conv2d(6, 10, 3), "chain", 3)
    assert len(plain_forms(layer)) == 4
    layer.execution = "dense"  # type: ignore[assignment]
    assert [form.is_dense for form in plain_forms(layer)] == [True]
    layer.execution = "chain"  # type: ignore[assignment]
    (form,) = plain_forms(layer)
    assert [tuple(each.weight.shape) for each in form.build(layer, torch.float32)] == [  # type: ignore[union-attr]
        (3, 6, 1, 1),
        (3, 3, 3, 3),
        (10, 3, 1, 1),
    ]


# --------------------------------------------------------------------------------------------------------- networks


class Shared(nn.Module):
    """One layer under two names, one frozen and with an attribute of its own, one that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.again = self.one
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.frozen.depth = 3
        self.idle = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.again(self.one(x)))


def convolutional(width: int = 64) -> nn.Sequential:
    """Large enough for factors to pay; the last Linear is contracted."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(),
        nn.Linear(4 * width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10),
    )  # fmt: skip


def compressed(**options: Any) -> nn.Module:
    rules = [
        LayerRule("2", format="chain", ranks=4),
        LayerRule("5", format="lowrank", ranks=4),
        LayerRule("9", format="lowrank", ranks=4),
        LayerRule("11", format="matrix", out_modes=(16, 32), in_modes=(32, 16), ranks=2),
    ]
    return ttcompress.compress(convolutional(), layers=rules, **options)[0].eval()


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def both() -> tuple[nn.Module, nn.Module]:
    model = compressed()
    return model, ttcompress.to_plain(model, input_size=(3, 16, 16), batch_size=32)


@torch.no_grad()
def test_a_network_computes_the_same_and_stays_as_it_is(both: tuple[nn.Module, nn.Module]) -> None:
    model, plain = both
    assert difference(plain(IMAGES), model(IMAGES)) < 1e-5
    assert any(isinstance(module, TTLayer) for module in model.modules())
    assert not any(isinstance(module, TTLayer) for module in plain.modules())
    made = {type(plain.get_submodule(name)) for name in ("2", "5", "9", "11")}
    assert made == {nn.Sequential, ContractedLinear}
    # Nothing is shared, nothing held twice.
    pointers = [{each.data_ptr() for each in side.parameters()} for side in (model, plain)]
    assert not pointers[0] & pointers[1]
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def test_measured_forms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from ttcompress.measure import timing

    monkeypatch.setattr(timing, "SECONDS", 0.01)
    model = compressed()
    plain = ttcompress.to_plain(model, example=IMAGES, tune=True)
    assert difference(plain(IMAGES), model(IMAGES)) < 1e-5


def test_modes_gradients_and_names_go_along() -> None:
    torch.manual_seed(0)
    model, _ = ttcompress.compress(Shared().train(), include=["*"], ranks=4, format="lowrank")
    model.again.eval()
    plain: Any = ttcompress.to_plain(model, input_size=(64,), batch_size=4096)
    assert plain.one is plain.again
    assert (plain.training, plain.one.training, plain.frozen.training) == (True, False, True)
    assert plain.frozen.depth == 3
    assert not any(parameter.requires_grad for parameter in plain.frozen.parameters())
    assert all(parameter.requires_grad for parameter in plain.one.parameters())
    # A layer that does not run keeps its factors, whatever they cost.
    assert isinstance(plain.idle, nn.Sequential)
    assert not isinstance(ttcompress.to_plain(model, input_size=(64,)).one, nn.Sequential)


def test_narrow_cores_become_weights_of_the_networks_type() -> None:
    model = compressed(dtype="float16")
    plain = ttcompress.to_plain(model, input_size=(3, 16, 16))
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    half = ttcompress.to_plain(compressed().bfloat16(), input_size=(3, 16, 16))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_layer_by_itself() -> None:
    layer = TTLinear.from_dense(nn.Linear(2048, 2048), "lowrank", 4)
    assert [type(each) for each in ttcompress.to_plain(layer)] == [nn.Linear, nn.Linear]  # type: ignore[arg-type]


class Peeking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2048, 2048)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


def test_what_cannot_be_plain_is_refused_in_one_line() -> None:
    model = compressed()
    with pytest.raises(TTCompressError, match=r"2 costs depends on the size of an input.* input_size"):
        ttcompress.to_plain(model)
    with pytest.raises(TTCompressError, match="batch_size takes numbers from 1 on"):
        ttcompress.to_plain(model, input_size=(3, 16, 16), batch_size=0)
    with pytest.raises(TTCompressError, match="does not take"):
        ttcompress.to_plain(model, input_size=(5, 16, 16))
    peeking, _ = ttcompress.compress(Peeking(), include=["*"], ranks=4, format="lowrank")
    with pytest.raises(TTCompressError, match=r"does not run with stock layers .*'Sequential' object has no"):
        ttcompress.to_plain(peeking, input_size=(2048,))


# ------------------------------------------------------------------------------------------------------------- tools


@torch.no_grad()
def test_it_compiles_without_a_break_and_for_every_batch(both: tuple[nn.Module, nn.Module]) -> None:
    from torch._dynamo.testing import CompileCounter

    model, plain = both
    torch.compiler.reset()
    graphs = CompileCounter()
    compiled = torch.compile(plain, fullgraph=True, backend=graphs)
    for batch in (3, 2, 1):
        assert difference(compiled(IMAGES[:batch]), model(IMAGES[:batch])) < 1e-5
    assert graphs.frame_count <= 3


@torch.no_grad()
def test_it_is_exported_and_traced(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, plain = both
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(plain, (IMAGES[:2],), dynamic_shapes=any_batch)
    torch.export.save(program, tmp_path / "plain.pt2")
    traced = torch.jit.trace(plain, IMAGES[:2])
    for runs in (torch.export.load(tmp_path / "plain.pt2").module(), traced):
        assert difference(runs(IMAGES), model(IMAGES)) < 1e-5


@torch.no_grad()
def test_its_linears_are_quantised_to_int8(both: tuple[nn.Module, nn.Module]) -> None:
    model, plain = both
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, torch.qint8)
    assert not any(
        isinstance(module, nn.Linear) and type(module) is nn.Linear for module in quantised.modules()
    )
    assert difference(quantised(IMAGES), model(IMAGES)) < 0.1


@torch.no_grad()
def test_it_goes_to_onnx(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, plain = both
    any_batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        plain,
        (IMAGES[:2],),
        tmp_path / "plain.onnx",
        input_names=["x"],
        dynamic_shapes=any_batch,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": IMAGES.numpy()})
    assert difference(torch.from_numpy(found), model(IMAGES)) < 1e-4


# ------------------------------------------------------------------------------------------------------------- files


WIDTHS = {"width0": 784, "width1": 1024, "width2": 1024, "width3": 10}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One layer is two Linears in its plain form, one is contracted, one dense."""
    torch.manual_seed(0)
    write_dense(tmp_path / "mlp.pt", Mlp(**WIDTHS).state_dict())
    rules = [
        LayerRule("fc1", format="lowrank", ranks=8),
        LayerRule("fc2", format="matrix", out_modes=(32, 32), in_modes=(32, 32), ranks=2),
    ]
    compress_file(tmp_path / "mlp.pt", tmp_path / "net-tt.safetensors", Recipe(layers=tuple(rules)))
    return tmp_path / "net-tt.safetensors"


def expanded(run: Callable[..., Done], file: Path, *options: object) -> Path:
    out = file.with_name("plain.safetensors")
    done = run("expand", file, "--factors", "-o", out, *options)
    assert (done.code, done.err) == (0, "")
    assert "1 layers as rows of factors, 0 dense" in done.out
    assert "ContractedLinear: fc2" in done.out
    return out


@torch.no_grad()
def test_a_file_of_factors_is_loaded_by_name_alone(file: Path, run: Callable[..., Done]) -> None:
    out = expanded(run, file)
    x = torch.randn(4, 784)
    wanted = ttcompress.load(file)(x)
    loaded, at_once = ttcompress.load(out), ttcompress.load(file, plain=True)
    for plain in (loaded, at_once):
        assert not any(isinstance(module, TTLayer) for module in plain.modules())
        assert difference(plain(x), wanted) < 1e-5
        assert not plain.training
    assert all(
        torch.equal(one, other) for one, other in zip(loaded.parameters(), at_once.parameters(), strict=True)
    )
    # Twice the same bytes, and every other verb takes the file.
    before = out.read_bytes()
    assert expanded(run, file, "--force").read_bytes() == before
    assert run("export", out, "--onnx", "plain.onnx").code == 0
    for verb in (("expand", out, "-o", "again.pt"), ("report", out), ("compress", out, "--ranks", "2")):
        done = run(*verb)
        assert (done.code, "made by expand --factors; name the" in done.err) == (2, True)


@torch.no_grad()
def test_a_network_of_ones_own_is_built_by_its_factory(file: Path, run: Callable[..., Done]) -> None:
    model = ttcompress.load(file)
    report = replace(ttcompress.read_report(file), architecture=None, preprocessing=None)
    ttcompress.save(model, report, file, force=True)
    file.with_name("net.py").write_text(
        f"from ttcompress.networks.zoo import Mlp\ndef build():\n    return Mlp(**{WIDTHS})\n"
    )
    done = run("expand", file, "--factors", "-o", "other.safetensors")
    assert (done.code, "records no architecture" in done.err) == (2, True)
    out = expanded(run, file, "--arch", f"{file.with_name('net.py')}:build")
    x = torch.randn(4, 784)
    assert difference(ttcompress.load(out, factory=lambda: Mlp(**WIDTHS))(x), model(x)) < 1e-5
    with pytest.raises(TTCompressError, match="records no architecture"):
        ttcompress.load(out)
    with pytest.raises(TTCompressError, match="without fc2"):
        ttcompress.load(out, factory=lambda: Mlp(width0=784, width1=10))


def test_what_files_of_factors_refuse(file: Path, run: Callable[..., Done]) -> None:
    for arguments, message in (
        ((file, "--factors", "-o", "plain.pt"), "end the name in .safetensors"),
        ((file, "--factors", "-o", file, "--force"), "is the file that is to be read"),
        ((file, "--factors", "-o", "plain.safetensors", "--batch-size", "0"), "--batch-size"),
        ((file, "--factors", "-o", "plain.safetensors", "--input-size", "3"), "does not take"),
        ((file, "-o", "dense.pt", "--tune"), "--tune needs --factors"),
        ((file.with_name("mlp.pt"), "--factors", "-o", "plain.safetensors"), "not a safetensors file"),
    ):
        done = run("expand", *arguments)
        assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err
    assert not list(Path.cwd().glob("*plain*"))


def _rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    with safe_open(path, "pt") as held:
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        described = json.loads(held.metadata()[PLAIN_KEY])
    change(described)
    write_safetensors(path.with_name("changed.safetensors"), tensors, described, key=PLAIN_KEY)
    return path.with_name("changed.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("layers"), "layers is missing"),
        (lambda data: data["layers"]["fc1"][0].update({"class": "Module"}), "class must be Linear"),
        (lambda data: data["layers"]["fc1"][0]["arguments"].update(in_features=-1), "in_features must be"),
        (lambda data: data["layers"]["fc1"][0]["arguments"].update(in_features=7), "does not fit"),
        (lambda data: data["layers"]["fc1"][0]["arguments"].update(device="cuda"), "device is not known"),
        (
            lambda data: data["layers"]["fc2"][0]["arguments"].update(
                groups=[[1, 32, 32, 3], [2, 32, 32, 1]]
            ),
            "groups",
        ),
        (
            lambda data: data["layers"]["fc2"][0]["arguments"].update(
                groups=[[1, 2**40, 2**40, 2], [2, 9, 9, 1]]
            ),
            "damaged",
        ),
        (lambda data: data["layers"].update(fc9=data["layers"].pop("fc1")), "without fc9"),
        (lambda data: data["layers"].pop("fc1"), "does not fit"),
        (lambda data: data["architecture"]["arguments"].update(width1=10**9), "width1 is 1,000,000,000"),
        (lambda data: data["layers"].update(fc3=[]), "fc3"),
    ],
)
def test_descriptions_that_do_not_fit_are_one_line(
    file: Path, run: Callable[..., Done], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    changed = _rewritten(expanded(run, file), change)
    done = run("evaluate", changed, "--data", "digits")
    assert (done.code, message in done.err, done.err.count("\n")) == (2, True, 1), done.err


@torch.no_grad()
def test_the_page_shows_how_to_rebuild_without_this_package(file: Path, run: Callable[..., Done]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    (code,) = re.findall(r"(    def rebuilt.*?)\n\n(?! )", page, re.DOTALL)
    names: dict[str, Any] = {"json": json, "nn": nn, "safe_open": safe_open}
    exec(compile(re.sub("^    ", "", code, flags=re.MULTILINE), "format.md", "exec"), names)
    rules = (LayerRule("fc[12]", format="lowrank", ranks=8),)
    compress_file(file.with_name("mlp.pt"), file, Recipe(layers=rules), force=True)
    out = file.with_name("plain.safetensors")
    assert run("expand", file, "--factors", "-o", out).code == 0
    x = torch.randn(4, 784)
    assert difference(names["rebuilt"](Mlp(**WIDTHS), out)(x), ttcompress.load(file)(x)) < 1e-5


# ----------------------------------------------------------------------------------------------------- other kinds


class Tied(nn.Module):
    """A table that is the output layer too, with attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 32, padding_idx=3)
        self.body = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 200, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.table(ids)))
        return logits


IDS = torch.tensor([[3, 199, 0], [7, 7, 120]])
OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "signals": (
        lambda: nn.Sequential(
            nn.Conv1d(20, 64, 9, 2, 4), nn.ReLU(), nn.Conv1d(64, 64, 9, padding="same"), nn.Conv1d(64, 20, 3)
        ),
        torch.randn(2, 20, 40, generator=torch.Generator().manual_seed(0)),
    ),
    "generator": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(32, 64, 4, 2, 1, output_padding=1),
            nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False),
        ),
        torch.randn(2, 32, 6, 6, generator=torch.Generator().manual_seed(0)),
    ),
    "videos": (
        lambda: nn.Sequential(nn.Conv3d(3, 32, 3, (1, 2, 2), 1), nn.Conv3d(32, 32, 3, padding=1)),
        torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.Linear(24, 48), nn.GRU(48, 48, 2, batch_first=True)),
        torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)),
    ),
    "tied": (Tied, IDS),
}


@pytest.mark.parametrize("format", ["lowrank", "chain", "matrix"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_becomes_stock_layers(name: str, format: str, tmp_path: Path) -> None:
    build, x = OTHERS[name]
    torch.manual_seed(0)
    ranks = {"ranks": 3, "conv_ranks": 3}
    formats = {} if name in ("recurrent", "tied") and format == "chain" else {"format": format}
    compressed, report = ttcompress.compress(build().eval(), include=["*"], **ranks, **formats)  # type: ignore[arg-type]
    ttcompress.save(compressed, report, tmp_path / "net.safetensors")
    wanted = run_of(compressed, x)

    example = {} if name == "tied" else {"input_size": tuple(x.shape[1:])}
    plain = ttcompress.to_plain(copy.deepcopy(compressed), **example)  # type: ignore[arg-type]
    assert not any(isinstance(module, TTLayer) for module in plain.modules())
    assert not any(".cores." in key or "_cores." in key for key in plain.state_dict())
    torch.testing.assert_close(run_of(plain, x), wanted, rtol=1e-4, atol=1e-5)

    again = ttcompress.load(tmp_path / "net.safetensors", factory=build, plain=True, **example)  # type: ignore[arg-type]
    torch.testing.assert_close(run_of(again, x), wanted, rtol=1e-4, atol=1e-5)


def run_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(x)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def test_a_table_and_its_output_layer_hold_the_long_factor_once() -> None:
    compressed, report = ttcompress.compress(Tied().eval(), ranks=4, format="lowrank", include=["table"])
    assert report.tied == {"head.weight": "table.weight"}
    plain = ttcompress.to_plain(compressed)
    assert plain.table[0].weight is plain.head[1].weight
    assert plain.table[0].weight.shape == (200, 4)
