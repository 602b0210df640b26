"""Which module may import which, and what the quick commands may load: DESIGN as a table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ttcompress

PACKAGE = Path(ttcompress.__file__).parent
EVERYWHERE = {"errors", "types"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"layers", "network", "pipeline", "report", "tt.decompose", "tt.shapes"},
    "__main__": {"cli"},
    "errors": set(),
    "types": {"tt.shapes"},
    "header": set(),
    "shards": {"header"},
    "weights": set(),
    "tt.__init__": set(),
    "tt.shapes": set(),
    "tt.cost": {"tt.shapes"},
    "tt.contract": {"tt.cost"},
    "tt.arithmetic": {"tt.contract"},
    "tt.unfolding": {"tt.shapes"},
    "tt.quantize": set(),
    "tt.decompose": {"tt.arithmetic", "tt.contract", "tt.quantize", "tt.shapes", "tt.unfolding"},
    "tt.whiten": {"tt.decompose", "tt.shapes"},
    "tt.fit": {"tt.contract", "tt.whiten"},
    "layers": {"tt.arithmetic", "tt.contract", "tt.cost", "tt.decompose", "tt.shapes"},
    "recipe": {"tt.shapes"},
    "allocate": {"tt.cost", "tt.shapes"},
    "usage": {"evaluate", "tt.cost"},
    "timing": set(),
    "latency": {"evaluate", "surgery", "timing"},
    "candidates": {"layers", "weights"},
    "plan": {
        "allocate", "candidates", "checkpoint", "recipe", "tt.cost", "tt.decompose", "tt.shapes", "tt.whiten", "usage",
        "weights",
    },
    "calibrate": {
        "evaluate", "layers", "surgery", "tt.contract", "tt.decompose", "tt.fit", "tt.shapes", "tt.whiten",
    },
    "refine": {"augment", "calibrate", "layers", "tt.whiten"},
    "stages": {"calibrate", "layers", "refine", "surgery", "tt.decompose"},
    "compression": {
        "calibrate", "evaluate", "latency", "plan", "recipe", "runtime", "stages", "surgery", "tt.shapes",
        "tt.whiten", "usage",
    },
    "surgery": {"layers", "tt.decompose", "tt.quantize"},
    "checkpoint": {"header", "shards"},
    "zoo": set(),
    "models": {"zoo"},
    "data": {"augment"},
    "augment": set(),
    "stream": {"augment", "data"},
    "distributed": set(),
    "optimize": {"layers"},
    "train": {"checkpoint", "distributed", "layers", "optimize", "stream"},
    "runtime": {"recipe"},
    "sources": {"calibrate", "data", "evaluate", "network", "recipe", "runtime"},
    "finetune": {
        "__init__", "checkpoint", "compression", "data", "distributed", "evaluate", "network", "recipe", "runtime",
        "shards", "sources", "stream", "surgery", "train", "tt.decompose",
    },
    "evaluate": set(),
    "export": {"checkpoint", "evaluate", "header", "network"},
    "bench": {"checkpoint", "evaluate", "header", "layers", "network", "surgery", "timing", "usage"},
    "report": {"header", "shards"},
    "network": {"checkpoint", "header", "models", "shards", "surgery", "tt.quantize", "weights"},
    "summary": {"__init__", "compression", "network", "recipe"},
    "work": {"checkpoint", "distributed", "header", "plan"},
    "tensorwise": {
        "__init__", "checkpoint", "compression", "distributed", "header", "network", "recipe", "runtime", "shards",
        "summary", "surgery", "work",
    },
    "pipeline": {
        "checkpoint", "compression", "evaluate", "header", "network", "plan", "recipe", "runtime", "shards", "sources",
        "stages", "summary", "tensorwise", "tt.contract",
    },
    "demo": {"checkpoint", "data", "models"},
    "cli": {
        "__init__", "bench", "checkpoint", "demo", "export", "finetune", "pipeline", "plan", "recipe", "report",
        "runtime", "shards",
    },
}  # fmt: skip
OUTSIDE_ONLY_IN = {
    "click": {"cli"}, "rich": {"cli", "report"},
    "onnx": {"export"}, "onnx_ir": {"export"}, "onnxruntime": {"export"}, "onnxscript": {"export"},
}  # fmt: skip
WITHOUT_TORCH = {
    "__init__",
    "__main__",
    "cli",
    "errors",
    "header",
    "recipe",
    "report",
    "shards",
    "tt.__init__",
    "tt.shapes",
    "types",
}


def _modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> set[str]:
    """Dotted names a module imports; `from a import b` counts as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(name: str) -> str | None:
    if not name.startswith("ttcompress"):
        return None
    tail = name.removeprefix("ttcompress").lstrip(".")
    known = _modules()
    while tail and tail not in known:
        tail = tail.rpartition(".")[0]
    return tail or "__init__"


def test_table_lists_exactly_the_modules() -> None:
    assert set(MAY_IMPORT) == set(_modules())


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_module_imports_only_what_the_table_allows(name: str) -> None:
    own = {_own(imported) for imported in _imports(_modules()[name])} - {None}
    assert own <= MAY_IMPORT[name] | EVERYWHERE


@pytest.mark.parametrize("library", sorted(OUTSIDE_ONLY_IN))
def test_edge_libraries_stay_at_the_edge(library: str) -> None:
    users = {name for name, path in _modules().items() if any(i.split(".")[0] == library for i in _imports(path))}
    assert users == OUTSIDE_ONLY_IN[library]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_light_modules_do_not_import_torch(name: str) -> None:
    roots = {imported.split(".")[0] for imported in _imports(_modules()[name])}
    assert not roots & {"torch", "numpy", "torchvision", "safetensors"}


def _loaded(arguments: list[str]) -> set[str]:
    code = (
        "import sys, ttcompress.cli as cli\n"
        f"try: cli.main({arguments!r})\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "print('LOADED', *(name for name in sys.modules if '.' not in name))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(result.stdout.split("LOADED", 1)[1].split())


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from torch import nn

    path = tmp_path_factory.mktemp("light") / "net-tt.safetensors"
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    module, report = ttcompress.compress(net, ranks=2)
    assert isinstance(module, torch.nn.Module)
    ttcompress.save(module, report, path)
    return path


@pytest.mark.parametrize("line", ["--help", "--version", "compress --help", "report", "report --json"])
def test_quick_commands_load_neither_torch_nor_numpy(line: str, compressed: Path) -> None:
    arguments = line.split()
    loaded = _loaded([*arguments, str(compressed)] if arguments[0] == "report" else arguments)
    assert "click" in loaded
    assert not loaded & {"torch", "numpy", "torchvision", "safetensors"}


def test_package_exports_resolve_and_are_few() -> None:
    assert len(ttcompress.__all__) <= 10
    assert all(getattr(ttcompress, name) is not None for name in ttcompress.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ttcompress.no_such_name
