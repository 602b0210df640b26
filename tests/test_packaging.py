"""What is handed out: the wheel is complete, holds nothing else, and the sdist builds the same one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

import pytest
import torch

from ttcompress.networks.zoo import Mlp
from ttcompress.version import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
EVERY_MODULE = """
import pkgutil, sys
import ttcompress

names = [each.name for each in pkgutil.walk_packages(ttcompress.__path__, "ttcompress.")]
for name in names:
    if not name.endswith(".__main__"):
        __import__(name)

ours = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "ttcompress"]
print(*ours, sep="\\n")
"""
TEMPLATES = ROOT / "ttcompress/report/templates"


def elsewhere() -> dict[str, str]:
    """The environment without what would lead a new process to this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def done(*command: object, cwd: Path) -> str:
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=elsewhere(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def build(source: Path, into: Path, *kinds: str) -> None:
    done(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", into, source, cwd=into)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "--wheel", "--sdist")
    return folder


@pytest.fixture(scope="module")
def wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; of the running one it sees the packages, but not what points to this checkout.

    A path in a .pth file is searched after the environment's own packages, and .pth files found there, such as those
    of an editable installation, are not read.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    python = environment / "bin" / "python"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", wheel]
    done(sys.executable, "-m", "pip", "--python", python, *install, cwd=environment)

    (packages,) = environment.glob("lib/python*/site-packages")
    running = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "running.pth").write_text("\n".join(running))
    return environment


def sources() -> set[str]:
    return {str(path.relative_to(ROOT)) for path in ROOT.glob("ttcompress/**/*.py")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {
            name for name in archive.namelist() if not name.startswith(f"ttcompress-{__version__}.dist-info/")
        }
    templates = {f"ttcompress/report/templates/{each.name}" for each in TEMPLATES.iterdir()}
    assert names == sources() | templates | {
        "ttcompress/py.typed",
        "ttcompress/networks/torchvision_keys.json",
    }


def test_what_the_package_imports_is_declared(wheel: Path) -> None:
    """By the wheel, outside of its extras for work on the project."""
    metadata = PathDistribution(ZipPath(wheel, f"ttcompress-{__version__}.dist-info/"))  # type: ignore[arg-type]
    declared = {
        re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        for requirement in metadata.requires or []
        if "extra ==" not in requirement
        or re.search(r"extra == ['\"](onnx|timm|transformers)['\"]", requirement)
    }
    text = "\n".join((ROOT / name).read_text() for name in sources())
    imported = set(re.findall(r"^\s*(?:import|from) ([a-z]\w*)", text, re.MULTILINE))
    providers = packages_distributions()
    used = {
        provider.lower().replace("_", "-")
        for module in imported - sys.stdlib_module_names - {"ttcompress"}
        for provider in providers.get(module, [module])
    }
    assert used - declared == set()


def test_the_sdist_builds_the_same_wheel(folder: Path, wheel: Path, tmp_path: Path) -> None:
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    build(tmp_path / f"ttcompress-{__version__}", tmp_path, "--wheel")
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


def test_the_sdist_holds_what_its_tests_need(folder: Path) -> None:
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for pattern in ("tests/**/*.py", "recipes/*", "docs/*", "scripts/**/*.py"):
        assert {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if path.is_file()} <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"} <= names


def test_every_module_of_the_installed_wheel_is_its_own(installed: Path, tmp_path: Path) -> None:
    files = done(installed / "bin" / "python", "-c", EVERY_MODULE, cwd=tmp_path).split()
    (packages,) = installed.glob("lib/python*/site-packages")
    wanted = {packages / name for name in sources()} - {packages / "ttcompress" / "__main__.py"}
    assert {Path(file) for file in files} == wanted


def test_the_installed_command_compresses_and_reports(installed: Path, tmp_path: Path) -> None:
    torch.save(Mlp(width0=64, width1=96, width2=80, width3=10).state_dict(), tmp_path / "mlp.pt")
    ttcompress = installed / "bin" / "ttcompress"
    assert __version__ in done(ttcompress, "--version", cwd=tmp_path)
    shown = json.loads(done(ttcompress, "compress", "mlp.pt", "--ranks", 3, "--json", cwd=tmp_path))
    read = json.loads(done(ttcompress, "report", "mlp-tt.safetensors", "--json", cwd=tmp_path))
    assert read["params_after"] == shown["params_after"] < shown["params_before"]
