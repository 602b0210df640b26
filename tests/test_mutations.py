"""Compressed files, plans and recipes with a field or two of another value or type, through the whole command.

A command ends with 0, or with 2 and one line, after a bounded number of lines, in bounded memory; and where it ends with 0, all who read the
same file understand the same network.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done, run_command, succeeded
from effort import lines_at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import VALUES, mutated
from safetensors.torch import load_file, save_file

import ttcompress
from ttcompress.files.header import read_metadata
from ttcompress.networks.surgery import expand_layers
from ttcompress.options import RUN_OPTIONS

OLDER = Path(__file__).parent / "records" / "older"
LINES, BYTES = 10**6, 2**30
RECIPE: dict[str, Any] = {
    "ranks": 2, "seed": 3, "dtype": "float16", "exec": "contract", "include": ["fc1", "re:fc2"], "exclude": ["fc3"],
    "layers": [{"match": "fc1", "format": "matrix", "in_modes": [8, 8], "out_modes": [4, 4], "ranks": [3]}],
}  # fmt: skip
pytestmark = [pytest.mark.usefixtures("one_thread", "little_memory"), pytest.mark.slow]
CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]


def many(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=CHECKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for digits, dense and compressed in floating point and in codes, and its plan."""
    path = tmp_path_factory.mktemp("mutations")
    torch.manual_seed(0)
    shapes = {"fc1": (16, 64), "fc2": (16, 16), "fc3": (10, 16)}
    weights = {f"{fqn}.weight": torch.randn(shape) for fqn, shape in shapes.items()}
    torch.save(
        {**weights, **{f"{fqn}.bias": torch.randn(out) for fqn, (out, _) in shapes.items()}}, path / "mlp.pt"
    )

    for name, dtype in (("tt", "float32"), ("int8", "int8")):
        words = (
            "--ranks",
            "2",
            "--dtype",
            dtype,
            "--data",
            "digits",
            "--limit",
            "20",
            "-o",
            f"{name}.safetensors",
        )
        succeeded("compress", "mlp.pt", *words, cwd=path)
    (path / "older.safetensors").write_bytes((OLDER / "trained.safetensors").read_bytes())
    succeeded("plan", "mlp.pt", "--ranks", "2", "-o", "plan.json", cwd=path)
    return path


@pytest.fixture(scope="module")
def little_memory(folder: Path) -> Iterator[None]:
    """No more than a gigabyte beyond what is there already."""
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def ended(*words: object, cwd: Path) -> Done:
    """What a command did, which is well or in one line, and soon."""
    with lines_at_most(LINES):
        done = run_command(*words, cwd=cwd)
    assert done.code in (0, 2), done
    if done.code == 2:
        assert done.out == ""
        assert done.err.startswith("ttcompress: ")
        assert done.err.count("\n") == 1
        assert len(done.err) < 2000
    assert "internal error" not in done.err
    return done


def check_agreement(file: Path, folder: Path) -> None:
    """What is loaded and what is expanded is the same network, where both can be had."""
    dense = folder / "dense.pt"
    dense.unlink(missing_ok=True)
    expanded = ended("expand", file, "-o", dense, cwd=folder)
    assert dense.exists() == (expanded.code == 0)
    try:
        # In double precision, as `expand` computes.
        loaded = expand_layers(ttcompress.load(file).double()).state_dict()
    except ttcompress.TTCompressError:
        return

    assert expanded.code == 0
    state = torch.load(dense, weights_only=True)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(loaded[name].double(), tensor.double(), rtol=1e-5, atol=1e-5)


@many(800)
@given(st.sampled_from(["tt", "int8", "older"]), st.data())
def test_metadata(folder: Path, name: str, data: st.DataObject) -> None:
    source, path = folder / f"{name}.safetensors", folder / "mutated.safetensors"
    metadata = mutated(read_metadata(source), data)
    save_file(load_file(source), path, {"format": "pt", "ttcompress": json.dumps(metadata)})

    codes = {command: ended(command, path, *more, cwd=folder).code for command, more in (
        ("report", ()), ("evaluate", ("--data", "digits", "--limit", "20")),
    )}  # fmt: skip
    check_agreement(path, folder)
    if codes["evaluate"] == 0:
        assert codes["report"] == 0
        ttcompress.load(path)


@many(500)
@given(st.data())
def test_plans(folder: Path, data: st.DataObject) -> None:
    path, output = folder / "mutated.json", folder / "planned.safetensors"
    output.unlink(missing_ok=True)
    path.write_text(json.dumps(mutated(json.loads((folder / "plan.json").read_text()), data)))

    planned = ended("plan", "mlp.pt", "--plan", path, "--json", cwd=folder)
    done = ended("compress", "mlp.pt", "--plan", path, "-o", output, cwd=folder)
    assert planned.code == done.code
    assert output.exists() == (done.code == 0)
    if done.code == 0:
        assert planned.json["params_after"] == read_metadata(output)["params_after"]
        check_agreement(output, folder)


def as_toml(value: object) -> str:
    """A value as TOML has it; nothing for None, which it has not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return "" if value is None else repr(value)


@many(800)
@given(st.data())
def test_recipes(folder: Path, data: st.DataObject) -> None:
    path, output = folder / "mutated.toml", folder / "cooked.safetensors"
    output.unlink(missing_ok=True)
    recipe = mutated(RECIPE, data)
    if data.draw(st.booleans()):
        recipe = {**recipe, data.draw(st.sampled_from(sorted(RUN_OPTIONS))): data.draw(VALUES)}
    text = "\n".join(f"{json.dumps(key)} = {as_toml(value)}" for key, value in recipe.items())
    path.write_bytes(text.encode(errors="surrogatepass"))

    done = ended("compress", "mlp.pt", "--recipe", path, "-o", output, cwd=folder)
    assert output.exists() == (done.code == 0)
    if done.code == 0:
        check_agreement(output, folder)
