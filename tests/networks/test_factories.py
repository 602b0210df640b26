"""Networks of the user's own: whatever their code does ends in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ttcompress
from ttcompress.cli import main
from ttcompress.errors import ArchitectureError, TTCompressError
from ttcompress.networks import architectures, known_keys
from ttcompress.networks.factories import is_factory, load_factory

pytestmark = pytest.mark.usefixtures("one_thread")
BODY = "nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))"


def written(folder: Path, body: str, name: str = "net.py") -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"import sys, torch\nfrom torch import nn\n{body}\n")
    return file


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert "internal error" not in err
    assert len(err.splitlines()) == 1
    return err


FAILING = {
    "exits": "def build(): sys.exit(0)",
    "exits on import": "raise SystemExit",
    "another exception": "class Stop(BaseException): pass\ndef build(): raise Stop('now')",
    "generator exit": "def build(): raise GeneratorExit",
    "own error without words": "def build(): raise KeyError",
    "lazy": "def build(): return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))",
    "lazy norm": "def build(): return nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())",
    "circle": f"def build():\n  net = {BODY}\n  net[1].parent = net\n  return net",
    "deep circle": f"def build():\n  net = {BODY}\n  net.add_module('all', nn.ModuleList([net]))\n  return net",
    "state dict": "class N(nn.Linear):\n  def state_dict(self, *a, **k): raise LookupError('x')\n"
    "def build(): return N(3, 3)",
    "class": "def build(): return nn.Linear",
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_factory_that_fails_is_one_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, FAILING[kind])
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).state_dict(),
        tmp_path / "c.pt",
    )
    output = tmp_path / "o.safetensors"
    words = [
        "compress",
        str(tmp_path / "c.pt"),
        "--arch",
        f"{file}:build",
        "--ratio",
        "1.2",
        "-o",
        str(output),
    ]
    assert "net.py" in refused(words, capsys)
    assert not output.exists()
    with pytest.raises(TTCompressError):
        ttcompress.compress(
            architectures.build(architectures.resolve(f"{file}:build"), load_factory(f"{file}:build"))
        )


def test_a_file_imports_its_neighbours_early_and_late(tmp_path: Path) -> None:
    written(tmp_path, "WIDTH = 64", "neighbour_early.py")
    written(tmp_path, "WIDTH = 10", "neighbour_late.py")
    written(tmp_path, "", "neighbour_package/__init__.py")
    written(tmp_path, "from neighbour_early import WIDTH as inner", "neighbour_package/parts.py")
    body = (
        "from neighbour_early import WIDTH\nfrom neighbour_package.parts import inner\n"
        "def build():\n  import neighbour_late\n  return nn.Linear(inner, neighbour_late.WIDTH)"
    )
    factory = load_factory(f"{written(tmp_path, body)}:build")
    assert factory().weight.shape == (10, 64)


def test_a_factory_may_be_named_as_that_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, "", "owned_models/__init__.py")
    written(tmp_path, f"def build(): return {BODY}", "owned_models/small.py")
    monkeypatch.chdir(tmp_path)
    reference = "owned_models.small:build"
    assert is_factory(reference)
    torch.save(load_factory(reference)().state_dict(), "c.pt")
    main(["compress", "c.pt", "--arch", reference, "--include", "*", "--ratio", "1.2", "-o", "o.safetensors"])
    assert "owned_models.small:build" in str(ttcompress.read_report("o.safetensors").architecture)
    main(["evaluate", "o.safetensors", "--arch", reference, "--data", "digits"])
    capsys.readouterr()
    assert "has no function 'other'" in refused(
        ["plan", "c.pt", "--arch", "owned_models.small:other"], capsys
    )
    for unknown in ("owned_models.large:build", "owned_models", "no.such.module:build"):
        assert "unknown architecture" in refused(["plan", "c.pt", "--arch", unknown, "--ratio", "2"], capsys)


@pytest.mark.parametrize(
    "reference", ["mlp-1000000-1000000", "zoo:mlp-784-2000000-2000000-10", "mlp-9-2000000000"]
)
def test_networks_without_measure_are_refused(reference: str) -> None:
    with pytest.raises(ArchitectureError, match="at most 10,000,000,000"):
        architectures.build(architectures.resolve(reference), device="cpu")


def test_the_table_of_keys_is_that_of_the_networks() -> None:
    if not known_keys.is_complete():
        # A network that is new there is looked for by building it, which takes longer and is no fault.
        pytest.skip("of another torchvision: `python -m scripts.torchvision_keys` writes the table anew")
    assert known_keys.unknown(architectures.names("torchvision")) == []
    for name in ("alexnet", "resnet18", "vgg11_bn", "swin_t", "googlenet"):
        model = architectures.build(architectures.resolve(f"torchvision:{name}"))
        assert name in known_keys.with_keys(known_keys.keys_of(model.state_dict()))


def test_networks_that_the_table_lacks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: forms for name, forms in known_keys._table()[1].items() if name != "resnet18"}
    monkeypatch.setattr(known_keys, "_table", lambda: ("0", kept))
    shapes = {
        key: tuple(value.shape)
        for key, value in architectures.build(architectures.resolve("resnet18")).state_dict().items()
    }
    assert architectures.infer(shapes).name == "resnet18"


FOREIGN = {
    "pitch": {f"conv{i}.layer.weight": (8, 8, 3, 3) for i in range(12)},
    "tokens": {"wte.weight": (100, 8), **{f"h.{i}.attn.weight": (8, 8) for i in range(12)}},
    "features": {f"features.{i}.weight": (5, 5) for i in range(16)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_unknown_networks_are_refused_without_building_any(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    real = architectures.build

    def count(architecture: object, *more: object) -> nn.Module:
        built.append(architecture)
        return real(architecture, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(architectures, "build", count)
    with pytest.raises(ArchitectureError, match="has the checkpoint's keys") as error:
        architectures.infer(FOREIGN[kind])
    assert "nearest" not in str(error.value)
    assert "--arch none" in str(error.value)
    assert len([each for each in built if each.kind == "torchvision"]) <= 3  # type: ignore[attr-defined]


def test_what_holds_no_network_and_what_transformers_wrote_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, tmp_path / "stats.pt")
    assert "holds no network" in refused(["compress", str(tmp_path / "stats.pt"), "--ratio", "2"], capsys)
    torch.save({f"h.{i}.weight": torch.ones(8, 8) for i in range(3)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    assert "transformers" in refused(
        ["compress", str(tmp_path / "pytorch_model.bin"), "--ratio", "2"], capsys
    )
