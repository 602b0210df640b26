"""Plan files that are none, and plans whose numbers are those of another network: one line, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Done, succeeded

from ttcompress.errors import PlanError
from ttcompress.planning.plan_file import read_plan

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of three layers, and a plan for it."""
    path = tmp_path_factory.mktemp("plans")
    shapes = {"fc1": (32, 64), "fc2": (32, 32), "fc3": (10, 32)}
    weights = {f"{fqn}.weight": torch.randn(shape) for fqn, shape in shapes.items()}
    torch.save(
        {**weights, **{f"{fqn}.bias": torch.zeros(out) for fqn, (out, _) in shapes.items()}}, path / "mlp.pt"
    )
    succeeded("plan", "mlp.pt", "--ranks", "2", "-o", "plan.json", cwd=path)
    return path


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a readable plan"),
        (b"\x89PNG\r\n\x1a\n", "is no text in UTF-8"),
        (b'{"schema"', "not a readable plan"),
        (b"[" * 100_000, "not a readable plan"),
        (b'{"schema":' * 100_000, "not a readable plan"),
        (b"9" * 5000, "not a readable plan"),
        (b'"ttcompress-plan/1"', "not a plan of schema"),
        (b'{"schema": "ttcompress-plan/2"}', "not a plan of schema"),
        (b'{"schema": "ttcompress-plan/1", "schema": "ttcompress-plan/1"}', 'the key "schema" comes twice'),
        (b'{"schema": "ttcompress-plan/1"}', "layers is missing"),
        (
            b'{"schema": "ttcompress-plan/1", "layers": [], "kept_parameters": [], "x": 1e999}',
            "x must be a finite number",
        ),
        (
            b'{"schema": "ttcompress-plan/1", "layers": [], "kept_parameters": []}',
            "from 1 to 2^53 parameters",
        ),
    ],
)
def test_contents_that_are_no_plan(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as error:
        read_plan(path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    for path in (
        tmp_path,
        tmp_path / "none.json",
        tmp_path / ("x" * 300),
        Path("/dev/null"),
        tmp_path / "a\0b",
    ):
        with pytest.raises(PlanError) as error:
            read_plan(path)
        assert "cannot be read: " in str(error.value)


def entry(plan: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    entries = plan["kept_parameters"] if key == "name" else plan["layers"]
    found: dict[str, Any] = next(each for each in entries if each[key] == name)
    return found


def swapped_counts(plan: dict[str, Any]) -> None:
    """The total is right."""
    entry(plan, "name", "fc1.bias")["params"] += 5
    entry(plan, "name", "fc3.bias")["params"] -= 5


def kept_layer_of_another_size(plan: dict[str, Any]) -> None:
    entry(plan, "fqn", "fc3")["params_before"] += 7
    entry(plan, "name", "fc3.bias")["params"] -= 7


def a_bias_of_no_layer(plan: dict[str, Any]) -> None:
    entry(plan, "name", "fc1.bias")["name"] = "fc7.bias"


def a_bias_left_out(plan: dict[str, Any]) -> None:
    plan["kept_parameters"].remove(entry(plan, "name", "fc2.bias"))


@pytest.mark.parametrize("of_weights_only", [False, True])
@pytest.mark.parametrize(
    "edit",
    [swapped_counts, kept_layer_of_another_size, a_bias_of_no_layer, a_bias_left_out],
    ids=lambda edit: edit.__name__,
)
def test_a_plan_that_counts_otherwise_is_refused(
    edit: Callable[[dict[str, Any]], None], of_weights_only: bool, folder: Path, run: Run, tmp_path: Path
) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    edit(plan)
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    more = ["--arch", "none"] if of_weights_only else []

    for arguments in (["plan"], ["compress", "-o", "small.safetensors"]):
        done = run(*arguments, folder / "mlp.pt", "--plan", "edited.json", *more)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert "the plan" in done.err
        assert [each.name for each in tmp_path.iterdir()] == ["edited.json"]


def test_counts_of_edited_layers_are_made_anew(folder: Path, run: Run, tmp_path: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    entry(plan, "fqn", "fc1").update(tt_ranks=[1], params_after=999_999)
    plan["compression"] = 1e6
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    done = run("compress", folder / "mlp.pt", "--plan", "edited.json", "-o", "small.safetensors", "--json")
    assert done.code == 0, done.err
    assert entry(done.json, "fqn", "fc1")["params_after"] < 999
    assert run("report", "small.safetensors").code == 0
