"""Which module may import which, and what the quick commands may load: DESIGN as a table."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ttcompress

PACKAGE = Path(ttcompress.__file__).parent
EVERYWHERE = {"errors", "records", "version"}
"""What every package may import."""
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "tt": set(),
    "files": {"torchrun"},
    "data": set(),
    "torchrun": set(),
    "processes": {"torchrun"},
    "records": {"tt"},
    "options": {"tt"},
    "recipe": {"options"},
    "settings": {"options", "recipe"},
    "runtime": {"torchrun"},
    "layers": {"tt"},
    "report": {"files"},
    "networks": {"layers", "files", "tt"},
    "train": {"networks", "layers", "data", "files", "processes"},
    "measure": {"data", "networks", "layers", "files", "tt"},
    "calibrate": {"networks", "layers", "data", "runtime", "tt"},
    "planning": {"measure", "networks", "layers", "files", "recipe", "tt"},
    "commands": {
        "calibrate", "data", "files", "layers", "measure", "networks", "options", "planning", "processes", "recipe",
        "runtime", "settings", "torchrun", "train", "tt",
    },
    "terminal": set(),
    "cli_options": {"options", "recipe"},
    "cli_pages": {"files", "report"},
    "cli": {
        "cli_options", "cli_pages", "commands", "files", "measure", "options", "planning", "recipe", "report", "runtime", "terminal",
        "torchrun",
    },
    "__init__": {"commands", "layers", "networks", "recipe", "report", "tt"},
    "__main__": {"cli"},
}  # fmt: skip
"""By package, or module beside the packages: the others that it may import."""
OUTSIDE_ONLY_IN = {
    "click": {"cli", "cli_options", "cli_pages", "terminal"}, "cloup": {"cli", "cli_options", "cli_pages"},
    "jinja2": {"report.html"}, "matplotlib": {"report.canvas", "report.pictures"}, "rich": {"report.text", "terminal"},
    "onnx": {"networks.onnx_files"}, "onnx_ir": {"networks.onnx_files"}, "onnxruntime": {"networks.onnx_files"},
    "onnxscript": {"networks.onnx_files"}, "huggingface_hub": {"networks.transformers_models"},
    "timm": {"networks.timm_models"},
    "transformers": {"networks.text_reading", "networks.transformers_models"},
}  # fmt: skip
WITHOUT_TORCH = {
    "__init__", "__main__", "cli", "cli_options", "cli_pages", "errors", "options", "recipe", "records", "report", "settings",
    "terminal", "torchrun", "version",
}  # fmt: skip
WITHOUT_TORCH_MODULES = {"files.header", "files.model_folder", "files.output", "files.shards", "tt.shapes"}


@cache
def _modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


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
    """The module of ours that an imported name is of."""
    if not name.startswith("ttcompress"):
        return None
    tail = name.removeprefix("ttcompress").lstrip(".")
    known = _modules()
    while tail and tail not in known:
        if f"{tail}.__init__" in known:
            return f"{tail}.__init__"
        tail = tail.rpartition(".")[0]
    return tail or "__init__"


@cache
def _arrows() -> dict[str, set[str]]:
    """By module, the modules of ours that it imports anywhere in it."""
    return {
        name: {own for imported in _imports(path) if (own := _own(imported))} - {name}
        for name, path in _modules().items()
    }


def _package(module: str) -> str:
    return module.partition(".")[0]


def test_table_lists_exactly_the_packages() -> None:
    assert set(MAY_IMPORT) == {_package(module) for module in _modules()}


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_package_imports_only_what_the_table_allows(package: str) -> None:
    found = {
        _package(other)
        for module, others in _arrows().items()
        if _package(module) == package
        for other in others
    }
    assert found - {package} <= MAY_IMPORT[package] | EVERYWHERE


def test_table_allows_nothing_that_is_not_used() -> None:
    for package, allowed in MAY_IMPORT.items():
        found = {
            _package(to) for module, tos in _arrows().items() if _package(module) == package for to in tos
        }
        assert allowed <= found, package


def test_no_circle_between_packages_or_modules() -> None:
    # The package's own lazy exports point up to the commands; nobody below takes anything from it.
    arrows = {module: others for module, others in _arrows().items() if module != "__init__"}
    assert not any("__init__" in others for others in arrows.values())
    packages: dict[str, set[str]] = {}
    for module, others in arrows.items():
        packages.setdefault(_package(module), set()).update(map(_package, others))
    for package, others in packages.items():
        others.discard(package)
    # `records` may be imported by everyone, so that the integers of `tt.shapes` that it holds may not import it back.
    for graph in (arrows, packages):
        tuple(TopologicalSorter(graph).static_order())


def test_modules_are_looked_up_by_name_only_where_that_is_known() -> None:
    # Both wait for their first use: the exports of the package, and the view of a report, which stands above records.
    users = {name for name, path in _modules().items() if "importlib.import_module" in _imports(path)}
    assert users == {"__init__", "records.report", "tt.__init__"}


def test_only_one_package_hands_names_on() -> None:
    speaking = {name for name, path in _modules().items() if name.endswith(".__init__") and _imports(path)}
    assert speaking <= {"tt.__init__"}


@pytest.mark.parametrize("library", sorted(OUTSIDE_ONLY_IN))
def test_edge_libraries_stay_at_the_edge(library: str) -> None:
    users = {
        name for name, path in _modules().items() if any(i.split(".")[0] == library for i in _imports(path))
    }
    assert users == OUTSIDE_ONLY_IN[library]


LIGHT = [name for name in _modules() if _package(name) in WITHOUT_TORCH or name in WITHOUT_TORCH_MODULES]


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_import_torch(module: str) -> None:
    roots = {imported.split(".")[0] for imported in _imports(_modules()[module])}
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
    assert not loaded & {"torch", "numpy", "torchvision", "safetensors", "matplotlib", "jinja2"}


def test_package_exports_resolve_and_are_few() -> None:
    assert len(ttcompress.__all__) <= 26
    assert all(getattr(ttcompress, name) is not None for name in ttcompress.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ttcompress.no_such_name
