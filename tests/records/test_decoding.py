"""What comes from outside: any wrong field is refused in one line that names it, and nothing wrong is accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from effort import lines_at_most
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import EDGES, MISSING, SMALL, Place, changed, mutated

from ttcompress.errors import CheckpointError, PlanError
from ttcompress.files.header import read_metadata
from ttcompress.planning.plan_file import read_plan
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report

OLDER = Path(__file__).with_name("older")
FILE: dict[str, Any] = read_metadata(OLDER / "trained.safetensors")
CONV: dict[str, Any] = read_metadata(OLDER / "conv.safetensors")
# Reading FILE, writing it and reading it again takes 18,000.
LINES = 100_000
PLAN: dict[str, Any] = json.loads((OLDER / "plan.json").read_text())

WRONG: dict[Place, list[tuple[object, str]]] = {
    ("layers",): [
        (MISSING, "layers is missing"),
        ({}, "layers must be a list, not {}"),
        ([3], "layers[0] must be an object, not 3"),
    ],
    ("layers", 0, "tt_ranks"): [
        (MISSING, "layers[0].tt_ranks is missing"),
        ("a", 'layers[0].tt_ranks must be a list, not "a"'),
        ([2, 2, 2], "layers[0]: 2 modes take 1 inner TT-ranks, not [2, 2, 2]"),
    ],
    ("layers", 0, "tt_ranks", 1): [
        ("a", 'layers[0].tt_ranks[1] must be a whole number, not "a"'),
        (True, "layers[0].tt_ranks[1] must be a whole number, not true"),
        (2.5, "layers[0].tt_ranks[1] must be a whole number, not 2.5"),
        (0, "layers[0].tt_ranks[1] must be a whole number from 1, not 0"),
        (-1, "layers[0].tt_ranks[1] must be a whole number from 1, not -1"),
        (2**40 + 1, "layers[0].tt_ranks[1] must be a whole number up to 1099511627776, not 1099511627777"),
        (nan, "layers[0].tt_ranks[1] must be a finite number, not NaN"),
        (2**70, "layers[0].tt_ranks[1] must be a whole number below 2^63, not 1180591620717411303424"),
    ],
    ("layers", 0, "fqn"): [
        (None, "layers[0].fqn must be a text, not null"),
        ("\ud800", r'layers[0].fqn must be a text without lone surrogates, not "\ud800"'),
        ("fc3", 'layers and kept_parameters must name "fc3.weight" once, not twice'),
    ],
    ("layers", 0, "kind"): [
        (
            "lstm",
            'layers[0].kind must be linear, embedding, conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d or weight, not "lstm"',
        ),
        (
            "linear\n",
            r'layers[0].kind must be linear, embedding, conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d or weight, not "linear\n"',
        ),
        (MISSING, "layers[0].kind is missing"),
    ],
    ("layers", 0, "format"): [("tucker", "layers[0]: unknown format 'tucker'")],
    ("layers", 0, "in_modes"): [([64], "layers[0]: out_modes, in_modes and window_modes differ in length")],
    ("layers", 0, "weight_dtype"): [("int8", "layers[0]: fc1: weight_dtype must be one of float16,")],
    ("layers", 0, "core_dtype"): [("int4", "layers[0]: fc1: core_dtype must be one of float16,")],
    ("layers", 0, "execution"): [("gpu", "layers[0]: fc1: execution must be one of auto,")],
    ("layers", 0, "predicted_error"): [
        (-0.5, "layers[0].predicted_error must be a number from 0"),
        (inf, "layers[0].predicted_error must be a finite number, not Infinity"),
    ],
    ("layers", 0, "spec", "in_features"): [
        (0, "layers[0].spec.in_features must be a whole number from 1, not 0")
    ],
    ("layers", 0, "spec", "bias"): [(1, "layers[0].spec.bias must be true or false, not 1")],
    ("layers", 0, "spec", "evil"): [(1, "layers[0].spec.evil is not known")],
    ("kept_parameters", 0, "name"): [
        ("fc1.weight", 'layers and kept_parameters must name "fc1.weight" once, not twice')
    ],
    ("kept_parameters", 0, "params"): [
        (-1, "kept_parameters[0].params must be a whole number from 0, not -1")
    ],
    ("notes",): [("abc", 'notes must be a list, not "abc"'), ([3], "notes[0] must be a text, not 3")],
    ("multiply_adds",): [
        ([3], "multiply_adds must be a list of length 2, not [3]"),
        ([3, 0], "multiply_adds[1] must be a whole number from 1, not 0"),
    ],
    ("latency",): [({"dense": 1.0}, "latency.compressed is missing")],
}
"""Fields that files and plans share."""
WRONG_FILE: dict[Place, list[tuple[object, str]]] = {
    ("layers", 0, "output_error", "sweeps"): [
        ("x", "every entry of layers[0].output_error must be a number, not {"),
        (nan, "layers[0].output_error.sweeps must be a finite number, not NaN"),
    ],
    ("layers", 0, "params_after"): [(3, "layers[0].params_after must be 672, as the shapes have it, not 3")],
    ("layers", 2, "params_before"): [(True, "layers[2].params_before must be a whole number, not true")],
    ("layers", 2, "params_after"): [(3, "layers[2].params_after must be 320, as the shapes have it, not 3")],
    ("layers", 2, "kept"): [(None, "layers[2].kept must be a text, not null")],
    ("params_before",): [(3, "params_before must be 3466, as the shapes have it, not 3")],
    ("compression",): [(3.5, "compression must be 2.19")],
    ("version",): [(1, "version must be a text, not 1")],
    ("seed",): [
        (-1, "seed must be a whole number from 0, not -1"),
        (2**63, "seed must be a whole number below 2^63"),
    ],
    ("source", "file"): [([], "source.file must be a text, not []")],
    ("recipe",): [([], "recipe must be an object, not []")],
    ("recipe", "x"): [({"a.b": [nan]}, 'recipe.x["a.b"][0] must be a finite number, not NaN')],
    ("tied",): [
        ({"a": 3}, 'every entry of tied must be a text, not {"a": 3}'),
        ({"a.weight": "b.weight"}, 'tied["a.weight"] must be a parameter of the network, not "b.weight"'),
        ({"fc1.bias": "fc2.bias"}, 'tied must not name "fc1.bias", a parameter of its own'),
    ],
    ("bytes_after",): [
        (MISSING, "bytes_after is missing"),
        (True, "bytes_after must be a whole number, not true"),
    ],
    ("architecture", "kind"): [
        ("os", 'architecture.kind must be zoo, torchvision, factory, transformers or timm, not "os"')
    ],
    ("architecture", "arguments"): [
        (
            {"weights": "DEFAULT"},
            'every entry of architecture.arguments must be a whole number, not {"weights": "DEF',
        )
    ],
    ("preprocessing", "std"): [
        ([0.0], "preprocessing.std[0] must be a number above 0"),
        ([0.5, 0.5], "preprocessing: mean and std must have the same length"),
        ([], "preprocessing.std must be a list of length from 1, not []"),
    ],
    ("preprocessing", "input_size"): [([8, 8], "preprocessing.input_size must be a list of length 3")],
    ("accuracy", "dense"): [(101.0, "accuracy.dense must be a number up to 100")],
    ("accuracy", "interval"): [([1.0], "accuracy.interval must be a list of length 2, not [1.0]")],
    ("accuracy", "metric"): [(3, "accuracy.metric must be a text, not 3")],
    ("calibration", "stages", 0, "kept"): [
        ("yes", 'calibration.stages[0].kept must be true or false, not "yes"')
    ],
    ("search", 0, "ratio"): [(True, "search[0].ratio must be a number, not true")],
    ("finetuning", "best"): [(9, "finetuning.best must be an epoch of finetuning.history, not 9")],
    ("finetuning", "history", 1, "epoch"): [
        (3, "finetuning.history must have the epochs from 0 on, not [0, 3]")
    ],
    ("finetuning", "before", "n"): [(0, "finetuning.before.n must be a whole number from 1, not 0")],
    ("bench", "batches", 1, "layers", 0, "multiply_adds", "dense"): [
        (1.5, "bench.batches[1].layers[0].multiply_adds.dense must be a whole number, not 1.5")
    ],
}
cases = [(path, value, says) for path, entries in WRONG.items() for value, says in entries]
file_cases = [(path, value, says) for path, entries in WRONG_FILE.items() for value, says in entries]


@pytest.mark.parametrize(("path", "value", "says"), cases + file_cases)
def test_a_wrong_field_of_a_file_is_named(path: Place, value: object, says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Report.from_json(changed(FILE, path, value))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("path", "value", "says"), cases)
def test_a_wrong_field_of_a_plan_is_named_with_the_file(
    path: Place, value: object, says: str, tmp_path: Path
) -> None:
    if path[:1] == ("layers",) and says.endswith('"fc3.weight" once, not twice'):
        says = says.replace("fc3", "fc2")
        value = "fc2"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(changed(PLAN, path, value)))
    with pytest.raises(PlanError) as error:
        read_plan(file)
    assert says in str(error.value)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("padding",), "full", 'layers[0].spec.padding must be same or valid, not "full"'),
        (("padding",), [1], "layers[0].spec.padding must be"),
        (("kernel_size",), [3, 3, 3], "layers[0].spec.kernel_size must be a list of length 2, not [3, 3, 3]"),
        (("kernel_size",), [2**40, 2**40], "layers[0]"),
        (("stride", 0), 0, "layers[0].spec.stride[0] must be a whole number from 1, not 0"),
        (
            ("padding_mode",),
            "mirror",
            "layers[0].spec.padding_mode must be zeros, reflect, replicate or circular,",
        ),
    ],
)
def test_a_wrong_geometry_is_named(path: Place, value: object, says: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Report.from_json(changed(CONV, ("layers", 0, "spec", *path), value))
    assert says in str(error.value)


def test_layers_with_more_parameters_than_json_can_count_are_refused() -> None:
    data = changed(PLAN, ("layers", 0, "spec"), {"in_features": 2**40, "out_features": 2**40, "bias": True})
    data["layers"][0].update(in_modes=[2**40, 1], out_modes=[1, 2**40], tt_ranks=[1])
    with pytest.raises(PlanError, match=r"layers\[0\] must have at most 2\^53 parameters"):
        CompressionPlan.from_json(data)


def test_keys_that_only_later_versions_know_are_ignored() -> None:
    data = changed(FILE, ("news",), {"any": [1]})
    data["layers"][0]["news"] = data["accuracy"]["news"] = data["kept_parameters"][0]["news"] = 1
    assert Report.from_json(data).plan == Report.from_json(FILE).plan


@pytest.mark.parametrize("key", ["calibration", "search", "finetuning", "bench", "notes", "architecture"])
def test_files_from_before_a_key_are_read(key: str) -> None:
    assert Report.from_json(changed(FILE, (key,), MISSING)).plan == Report.from_json(FILE).plan


@pytest.mark.parametrize("key", ["predicted_error", "output_error", "params_before"])
def test_layers_from_before_a_key_are_read(key: str) -> None:
    Report.from_json(changed(FILE, ("layers", 0, key), MISSING))


def check_quick(read: Callable[[dict[str, Any]], Report | CompressionPlan], data: dict[str, Any]) -> None:
    """It is one clear line, or it is valid and stays as it is; and few lines are run."""
    with lines_at_most(LINES):
        try:
            record = read(data)
        except (CheckpointError, PlanError) as error:
            message = str(error)
            if "\n" in message or len(message) > 1000:
                raise AssertionError(message) from error
        else:
            written = record.to_json()
            again = read(json.loads(json.dumps(written, allow_nan=False)) | {"schema": data["schema"]})
            assert again == record
            assert again.to_json() == written
            str(record)


many = settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(st.sampled_from([FILE, CONV]), st.data())
def test_any_other_value_in_a_file_is_refused_or_valid(source: dict[str, Any], data: st.DataObject) -> None:
    check_quick(Report.from_json, mutated(source, data))


@many
@given(st.data())
def test_any_other_value_in_a_plan_is_refused_or_valid(data: st.DataObject) -> None:
    check_quick(CompressionPlan.from_json, {"schema": None, **mutated(PLAN, data)})


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        SMALL | EDGES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
    )
)
def test_any_json_in_the_place_of_a_part(value: object) -> None:
    for key in ("layers", "recipe", "finetuning", "news"):
        check_quick(Report.from_json, changed(FILE, (key,), value))


def test_json_that_is_nested_deeply_is_refused() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    with pytest.raises(CheckpointError, match=r"^news(\[0\])+ is nested too deeply$"):
        Report.from_json({**FILE, "news": deep})
