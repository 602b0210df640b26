"""Recipes: every file in recipes/ against the integers of the papers, every error path, precedence, immutability."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from ttcompress.commands.compress import plan_file
from ttcompress.errors import PlanError
from ttcompress.options import RULE_KINDS, RUN_OPTIONS
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.tt.shapes import tensorize_shape

RECIPES = Path(__file__).parents[1] / "recipes"
FINETUNED = [
    ("resnet20", 2),
    ("resnet20", 3),
    ("resnet20", 4),
    ("resnet20", 6.8),
    ("resnet32", 2.8),
    ("resnet32", 5),
]
VGG_WEIGHTS = {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096)}
# Parameters of the replaced layers, from the ranks and modes of Novikov et al. 2015.
NOVIKOV_ROWS = {
    "tt4-fc-fc": [2016],
    "tt2-fc-fc": [528],
    "tt1-fc-fc": [144],
    "tt4-tt4-fc": [2016, 1152],
    "mr1-fc-fc": [29184],
    "mr5-fc-fc": [5 * 29184],
    "mr50-fc-fc": [50 * 29184],
}
FULL = """
arch = "vgg16"
key = "ema"
ranks = [2, 3]
conv-ranks = 8
format = "auto"
rank_multiple = 8
any_time = false
exec = "contract"
tune = false
input-size = [3, 32, 32]
in-modes = [2, 3]
out_modes = [3, 2]
include = ["features.*"]
exclude = ["re:^classifier"]
data = "cifar10:data@test"
limit = 100
val = "npz:val.npz"
calib = "images:photos"
calib-images = 512
effort = "max"
max-drop = 1
train = "cifar10:data@train"
teacher = "resnet32.th"
epochs = 30
lr = 0.05
optimizer = "sgd"
schedule = "step"
warm-up = 2
weight-decay = 0
clip = 5
ema = 0.999
label-smoothing = 0.1
distill = 1
temperature = 4
augment = "flip"
mixup = 0.2
cutmix = 1
precision = "bfloat16"
channels-last = true
compile = false
accumulate = 2
deterministic = true
from-scratch = false
mean = [0, 0.5]
std = [1, 0.25]
dtype = "float16"
device = "cpu"
batch-size = 32
seq-len = 64
outputs = ["logits"]
workers = 0
seed = 7
[[layers]]
match = "classifier.0"
format = "matrix"
in-modes = [2, 2]
out_modes = [3, 3]
ranks = 4
[[layers]]
match = "classifier.3"
"""


def read(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return Recipe.from_toml(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    """The parts of the one-line message that a recipe is refused with."""
    with pytest.raises(PlanError) as caught:
        read(tmp_path, text)
    where, _, rest = str(caught.value).partition("recipe.toml: ")
    assert where == f"{tmp_path}/"
    assert "\n" not in rest
    return rest.split("; ")


def rule_params(rule: LayerRule) -> int:
    shape = VGG_WEIGHTS[rule.match]
    modes = tensorize_shape(str(rule.format), shape, rule.out_modes or None, rule.in_modes or None)
    assert (prod(modes.out_modes), prod(modes.in_modes)) == shape
    assert rule.ranks is not None
    return modes.num_params(modes.expand_ranks(rule.ranks))


def test_the_folder_holds_one_recipe_a_row() -> None:
    networks = [f"{net}-{row}" for net in ("vgg16", "vgg19") for row in NOVIKOV_ROWS]
    networks += [f"{net}-{ratio}x" for net in ("resnet20", "resnet32") for ratio in (2, 3)]
    networks += [f"{net}-{ratio}x-finetuned" for net, ratio in FINETUNED]
    assert sorted(path.stem for path in RECIPES.glob("*.toml")) == sorted(networks)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    head = path.read_text(encoding="utf-8").split("arch =")[0].splitlines()
    assert recipe.arch == path.stem.split("-")[0]
    assert 1 <= len(head) <= 2
    assert all(line.startswith("# ") for line in head)
    assert f"ttcompress compress {recipe.arch}." in "".join(head)
    assert f"--recipe recipes/{path.name}" in "".join(head)


@pytest.mark.parametrize("net", ["vgg16", "vgg19"])
@pytest.mark.parametrize(("row", "counts"), NOVIKOV_ROWS.items())
def test_vgg_rows_have_the_parameters_of_the_paper(net: str, row: str, counts: list[int]) -> None:
    recipe = Recipe.from_toml(RECIPES / f"{net}-{row}.toml")
    assert [rule_params(rule) for rule in recipe.layers] == counts
    assert recipe.target == "ranks"


MNIST_MODES = {
    "32x32": (32, 32),
    "4x8x8x4": (4, 8, 8, 4),
    "4_5": (4,) * 5,
    "2x2x8x8x2x2": (2, 2, 8, 8, 2, 2),
    "2_10": (2,) * 10,
}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("mnist/*.toml")), ids=lambda path: path.stem)
def test_mnist_recipes_are_what_their_names_say(path: Path) -> None:
    recipe = Recipe.from_toml(path)
    first, rank = recipe.layers[0], int(path.stem.rpartition("r")[2])
    assert {rule.ranks for rule in recipe.layers} == {rank}
    name = path.stem.rpartition("-")[0]
    assert recipe.arch == ("mlp-784-625-10" if name == "t3f" else "mlp-1024-1024-10")
    if name in MNIST_MODES:
        assert first.in_modes == first.out_modes == MNIST_MODES[name]
        assert prod(first.in_modes) == 1024
    elif not name:
        assert (first.format, first.in_modes) == ("lowrank", ())
    else:
        assert [rule.match for rule in recipe.layers] == (["fc1"] if name == "t3f" else ["fc1", "fc2"])
    head = path.read_text(encoding="utf-8").split("arch =")[0]
    assert f"ttcompress finetune --recipe recipes/mnist/{path.name} --from-scratch" in head


@pytest.mark.parametrize("path", sorted(RECIPES.glob("cifar10/*.toml")), ids=lambda path: path.stem)
def test_cifar10_recipes_are_the_rows_of_the_papers(path: Path) -> None:
    """Garipov et al. 2016, table 1: at least the compression of the name, at most 2 % more; wide: the logged counts."""
    recipe = Recipe.from_toml(path)
    head = path.read_text(encoding="utf-8").split("arch =")[0]
    assert f"ttcompress finetune --recipe recipes/cifar10/{path.name} --from-scratch" in head
    if path.stem.startswith("wide"):
        (first, second), rank = plan_file(None, recipe).plan.layers, int(path.stem.removeprefix("wide-r"))
        assert first.params_after == 32 * rank + 4 * 32 * rank**2 + 24 * rank
        assert second.params_after == 32 * rank + 4 * 32 * rank**2 + 32 * rank
        if rank == 10:
            assert (first.params_after, second.params_after) == (13_360, 13_440)
        return
    assert (recipe.schedule, recipe.epochs, recipe.warm_up, recipe.batch_size) == ("step", 100, 0, 100)
    assert recipe.lr == (0.03 if "tt-conv-tt-fc" in path.stem else 0.1)
    if path.stem.endswith("-released"):
        paper = {"conv": 3.230, "conv-fc": 41.65}[recipe.arch or ""]
        # conv: 8,337 + 14,769 + 3 x 27,201 in TT form and 4,288 dense.
        clipped = {"conv": 557_248 / 108_997, "conv-fc": 46.5}[recipe.arch or ""]
        asked, feasible = (plan_file(None, replace(recipe, from_scratch=each)).plan for each in (True, None))
        assert asked.compression == pytest.approx(paper, rel=2e-4)
        assert feasible.compression == pytest.approx(clipped, rel=2e-3)
        assert not any(layer.note for layer in asked.layers)
        assert all("clipped" in layer.note for layer in feasible.layers)
    elif found := re.search(r"-([\d.]+)x$", path.stem):
        # From scratch, as the file says, TT-ranks are taken as they are: these must be feasible ones.
        for from_scratch in (True, None):
            plan = plan_file(None, replace(recipe, from_scratch=from_scratch)).plan
            assert 1 <= plan.compression / float(found[1]) <= 1.02
            form = "naive" if "naive" in path.stem else "matrix"
            assert {layer.tensorization.format for layer in plan.layers} == {form}
            assert len(plan.layers) == (5 if form == "naive" else len(recipe.layers))
            assert "conv1" in {kept.name.removesuffix(".weight") for kept in plan.kept}
    else:
        assert path.stem == recipe.arch
        assert not recipe.has_target


def test_fc6_and_fc7_together_have_3168_parameters() -> None:
    recipe = Recipe.from_toml(RECIPES / "vgg16-tt4-tt4-fc.toml")
    assert sum(map(rule_params, recipe.layers)) == 3168


@pytest.mark.parametrize(("net", "ratio"), FINETUNED)
def test_finetuned_rows_are_those_of_the_table_script(net: str, ratio: float) -> None:
    """Its defaults, so that one recipe and one row are the same run."""
    recipe = Recipe.from_toml(RECIPES / f"{net}-{ratio}x-finetuned.toml")
    assert recipe == Recipe(arch=net, ratio=ratio, epochs=30, seed=0)


@pytest.mark.parametrize("net", ["resnet20", "resnet32"])
@pytest.mark.parametrize("ratio", [2, 3])
def test_resnet_recipes_state_the_ratio_of_their_name(net: str, ratio: int) -> None:
    recipe = Recipe.from_toml(RECIPES / f"{net}-{ratio}x.toml")
    assert (recipe.target, recipe.ratio) == ("ratio", ratio)


def test_all_options_are_read_with_hyphens_or_underscores(tmp_path: Path) -> None:
    assert read(tmp_path, FULL) == Recipe(
        arch="vgg16",
        key="ema",
        ranks=(2, 3),
        conv_ranks=8,
        rank_multiple=8,
        any_time=False,
        format="auto",
        exec="contract",
        tune=False,
        input_size=(3, 32, 32),
        in_modes=(2, 3),
        out_modes=(3, 2),
        max_drop=1.0,
        limit=100,
        val="npz:val.npz",
        calib="images:photos",
        calib_images=512,
        effort="max",
        include=("features.*",),
        exclude=("re:^classifier",),
        data="cifar10:data@test",
        train="cifar10:data@train",
        teacher="resnet32.th",
        epochs=30,
        lr=0.05,
        optimizer="sgd",
        schedule="step",
        warm_up=2.0,
        weight_decay=0.0,
        clip=5.0,
        ema=0.999,
        label_smoothing=0.1,
        distill=1.0,
        temperature=4.0,
        augment="flip",
        mixup=0.2,
        cutmix=1.0,
        precision="bfloat16",
        channels_last=True,
        compile=False,
        accumulate=2,
        deterministic=True,
        from_scratch=False,
        mean=(0.0, 0.5),
        std=(1.0, 0.25),
        dtype="float16",
        device="cpu",
        batch_size=32,
        seq_len=64,
        outputs=("logits",),
        workers=0,
        seed=7,
        layers=(LayerRule("classifier.0", "matrix", (2, 2), (3, 3), 4), LayerRule("classifier.3")),
    )


def test_to_json_holds_what_is_stated_and_nothing_else(tmp_path: Path) -> None:
    assert Recipe().to_json() == {}
    recipe = read(
        tmp_path, "ratio = 4\nworkers = 0\ninclude = ['a']\n[[layers]]\nmatch = 'x'\nranks = [1, 2]"
    )
    assert json.loads(json.dumps(recipe.to_json())) == {
        "ratio": 4.0,
        "workers": 0,
        "include": ["a"],
        "layers": [{"match": "x", "ranks": [1, 2]}],
    }
    other_targets = {"eps", "ratio", "params", "macs_ratio", "latency_ratio"}
    assert set(read(tmp_path, FULL).to_json()) == {field.name for field in fields(Recipe)} - other_targets


def test_the_same_options_are_the_same_recipe_wherever_they_come_from(tmp_path: Path) -> None:
    parsed = read(tmp_path, "ratio = 2\nranks = [4, 4]\nmean = [0]")
    given = Recipe().override(ratio=2.0, ranks=[4, 4], mean=(0.0,))
    assert parsed == given
    assert hash(parsed) == hash(given)
    assert json.dumps(parsed.to_json()) == json.dumps(given.to_json())


def test_recipes_cannot_be_changed() -> None:
    names = ["a"]
    recipe = Recipe(include=names, layers=(LayerRule("x"),))  # type: ignore[arg-type]
    names.append("b")
    assert recipe.include == ("a",)
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        recipe.layers[0].match = "y"  # type: ignore[misc]
    assert recipe.override(seed=3) is not recipe
    assert recipe.seed is None


WRONG_VALUES: list[tuple[str, Any, str]] = [
    ("ratio", 0.5, "--ratio must be above 1, not 0.5"),
    ("ratio", 1, "--ratio must be above 1, not 1"),
    ("ratio", float("inf"), "--ratio must be above 1, not inf"),
    ("ratio", True, "--ratio must be above 1, not True"),
    ("eps", 0.0, "--eps must be above 0 and below 1, not 0.0"),
    ("eps", 1, "--eps must be above 0 and below 1, not 1"),
    ("eps", float("nan"), "--eps must be above 0 and below 1, not nan"),
    ("eps", "0.1", "--eps must be above 0 and below 1, not '0.1'"),
    ("params", 0, "--params must be a whole number above 0, not 0"),
    ("params", 1.5, "--params must be a whole number above 0, not 1.5"),
    ("params", True, "--params must be a whole number above 0, not True"),
    ("ranks", 0, "--ranks must be a whole number above 0 or a list of them, not 0"),
    ("ranks", [4, True], "--ranks must be a whole number above 0 or a list of them, not [4, True]"),
    ("ranks", [], "--ranks must be a whole number above 0 or a list of them, not []"),
    ("conv_ranks", [3, 0], "--conv-ranks must be a whole number above 0 or a list of them, not [3, 0]"),
    ("format", "tucker", "--format must be one of auto, matrix, chain, naive, lowrank, not 'tucker'"),
    ("in_modes", [2, 0], "--in-modes must be a list of whole numbers above 0, not [2, 0]"),
    ("out_modes", 4, "--out-modes must be a list of whole numbers above 0, not 4"),
    ("dtype", "int4", "--dtype must be one of float16, bfloat16, float32, float64, int8, not 'int4'"),
    ("include", "a", "--include must be a list of patterns, not 'a'"),
    ("exclude", ["a", 1], "--exclude must be a list of patterns, not ['a', 1]"),
    ("arch", "", "--arch must be a text, not ''"),
    ("data", 3, "--data must be a text, not 3"),
    ("device", 0, "--device must be a text, not 0"),
    ("mean", ["x"], "--mean must be a list of numbers, not ['x']"),
    ("std", [1, 0], "--std must be a list of numbers above 0, not [1, 0]"),
    ("batch_size", 0, "--batch-size must be a whole number above 0, not 0"),
    ("workers", -1, "--workers must be a whole number, 0 or above, not -1"),
    ("seed", -1, "--seed must be a whole number from 0 to below 2**63, not -1"),
    ("seed", False, "--seed must be a whole number from 0 to below 2**63, not False"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG_VALUES)
def test_values_out_of_range_are_refused_from_the_command_line_and_from_toml(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as caught:
        Recipe(**{name: value})
    assert str(caught.value) == message
    literal = repr(value).lower() if isinstance(value, bool | float) else repr(value).replace("True", "true")
    assert problems(tmp_path, f"{name} = {literal}") == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks = 1", "match must be a pattern, not ''"),
        ("match = ''", "match must be a pattern, not ''"),
        ("match = 3", "match must be a pattern, not 3"),
        ("match = 'x'\nformat = 'cp'", "format must be one of auto, matrix, chain, naive, lowrank, not 'cp'"),
        ("match = 'x'\nin_modes = 4", "in_modes must be a list of whole numbers above 0, not 4"),
        ("match = 'x'\nout_modes = [4, 0]", "out_modes must be a list of whole numbers above 0, not [4, 0]"),
        ("match = 'x'\nranks = true", "ranks must be a whole number above 0 or a list of them, not True"),
        ("match = 'x'\nmodes = [2]", "unknown key 'modes', the nearest is 'in_modes'"),
    ],
)
def test_errors_in_layer_tables_name_the_table(text: str, message: str, tmp_path: Path) -> None:
    assert problems(tmp_path, f"[[layers]]\nmatch = 'ok'\n[[layers]]\n{text}") == [f"[[layers]] 2: {message}"]


def test_every_problem_is_listed_sorted(tmp_path: Path) -> None:
    text = "seed = -1\nrtio = 4\neps = 2\nbatch-size = 1\nbatch_size = 2\n[[layers]]\nranks = 0\nmach = 'x'"
    found = problems(tmp_path, text)
    assert found == sorted(found)
    assert found == [
        "'batch_size' is given twice",
        "--eps must be above 0 and below 1, not 2",
        "--seed must be a whole number from 0 to below 2**63, not -1",
        "[[layers]] 1: match must be a pattern, not ''",
        "[[layers]] 1: ranks must be a whole number above 0 or a list of them, not 0",
        "[[layers]] 1: unknown key 'mach', the nearest is 'match'",
        "unknown key 'rtio', the nearest is 'ratio'",
    ]
    with pytest.raises(PlanError, match=r"^--eps .*; --seed .*$"):
        Recipe(seed=-1, eps=2)


@pytest.mark.parametrize("text", ["layers = 3", "layers = [3]", "[layers]\nmatch = 'x'"])
def test_layers_that_are_no_tables_are_refused(text: str, tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, text)
    assert problem.startswith("layers must be tables that begin with [[layers]]")


def test_files_that_cannot_be_read_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.toml: cannot be read: No such file"):
        Recipe.from_toml(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        Recipe.from_toml(tmp_path)
    assert problems(tmp_path, "ratio = ")[0].startswith("not a TOML file: ")
    (tmp_path / "binary.toml").write_bytes(b"\x80\x04\x95")
    with pytest.raises(PlanError, match=r"binary\.toml: is no text in UTF-8"):
        Recipe.from_toml(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("stated", "target"),
    [
        ({"ranks": 4}, "ranks"),
        ({"conv_ranks": 4}, "ranks"),
        ({"ranks": 4, "conv_ranks": (2, 3)}, "ranks"),
        ({"eps": 0.1}, "eps"),
        ({"ratio": 4}, "ratio"),
        ({"params": 100}, "params"),
        ({"layers": (LayerRule("a", ranks=1), LayerRule("b", ranks=(2, 2)))}, "ranks"),
        ({"ratio": 4, "layers": (LayerRule("a", ranks=1),)}, "ratio"),
    ],
)
def test_one_target_is_what_the_run_aims_at(stated: dict[str, Any], target: str) -> None:
    assert Recipe(**stated).target == target


@pytest.mark.parametrize(
    ("stated", "got"),
    [
        ({}, "none"),
        ({"eps": 0.1, "ratio": 2}, "--eps and --ratio"),
        ({"params": 9, "conv_ranks": 2, "ranks": 1}, "--ranks and --conv-ranks and --params"),
        ({"layers": (LayerRule("a", ranks=1), LayerRule("b"))}, "none"),
    ],
)
def test_no_target_or_several_are_refused(stated: dict[str, Any], got: str) -> None:
    targets = (
        "--ranks/--conv-ranks, --eps, --ratio, --params, --macs-ratio, --latency-ratio, --max-drop, --plan"
    )
    expected = f"state exactly one of {targets}: got {got}"
    with pytest.raises(PlanError) as caught:
        _ = Recipe(**stated).target
    assert str(caught.value) == expected


def test_the_command_line_beats_the_recipe_option_by_option() -> None:
    recipe = Recipe(arch="vgg16", ratio=3, include=("a",), seed=5, workers=2, layers=(LayerRule("x"),))
    nothing = recipe.override(arch=None, ratio=None, include=(), exclude=[], seed=None)
    assert nothing == recipe
    assert recipe.override(include=["b", "c"], seed=0, workers=0) == Recipe(
        arch="vgg16", ratio=3, include=("b", "c"), seed=0, workers=0, layers=(LayerRule("x"),)
    )


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        ({"ratio": 3}, {"eps": 0.1}, {"eps": 0.1}),
        ({"eps": 0.1}, {"params": 9}, {"params": 9}),
        ({"ranks": 4, "conv_ranks": 8}, {"ratio": 2}, {"ratio": 2}),
        ({"ranks": 4, "conv_ranks": 8}, {"ranks": 2}, {"ranks": 2, "conv_ranks": 8}),
        ({"params": 9}, {"conv_ranks": (2, 3)}, {"conv_ranks": (2, 3)}),
        ({"ratio": 2}, {"macs_ratio": 3}, {"macs_ratio": 3}),
        ({"macs_ratio": 3}, {"latency_ratio": 1.5}, {"latency_ratio": 1.5}),
        ({"params": 9}, {"eps": 0.1, "ratio": 2}, {"eps": 0.1, "ratio": 2}),
    ],
)
def test_a_target_on_the_command_line_displaces_the_others(
    recipe: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert Recipe(**recipe, seed=1).override(**given) == Recipe(**expected, seed=1)


def test_options_from_the_command_line_are_checked() -> None:
    with pytest.raises(PlanError, match=r"^--ratio must be above 1, not 0\.5$"):
        Recipe(arch="vgg16").override(ratio=0.5)


def test_recipes_need_no_torch() -> None:
    code = "import sys, ttcompress.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ODD = {
    "true": "true", "a text": "'x'", "an empty text": "''", "nan": "nan", "infinity": "-inf", "a date": "2024-05-01",
    "a time": "07:32:00", "a moment": "1979-05-27T07:32:00Z", "an empty list": "[]", "a list in a list": "[[1]]",
    "a mixed list": "[1, 'x', 2.5]", "a list of dates": "[1979-05-27]", "a list of tables": "[{a = 1}]",
    "a table": "{a = 1}",
    "a nested table": "{a = {b = {c = []}}}", "minus one": "-1", "2^63": str(2**63), "400 digits": "1" + "0" * 400,
    "5,000 hexadecimal digits": "0x" + "f" * 5000, "a huge real number": "1e999",
    "a list of huge numbers": f"[0x{'f' * 5000}]",
    "a long text": f"'{'x' * 5000}'",
}  # fmt: skip
"""Values that few options take; those that one does are none of its problems."""


@pytest.mark.parametrize("name", [*RUN_OPTIONS, "layers"])
def test_any_odd_value_of_any_option_is_one_line_or_is_taken(name: str, tmp_path: Path) -> None:
    said = [refusal(tmp_path, f"{name} = {value}") for value in ODD.values()]
    assert len(list(filter(None, said))) >= len(ODD) - 6
    for message in filter(None, said):
        assert message.startswith(f"{tmp_path / 'recipe.toml'}: ")
        assert "\n" not in message
        assert len(message) < 500


def refusal(tmp_path: Path, text: str) -> str:
    """What a recipe is refused with, if it is."""
    try:
        read(tmp_path, text)
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", RULE_KINDS)
def test_any_odd_value_of_a_rule_names_the_rule(name: str, tmp_path: Path) -> None:
    for value in ODD.values():
        text = f"[[layers]]\nmatch = 'a'\n[[layers]]\n{name} = {value}\n"
        message = refusal(tmp_path, text if name == "match" else f"{text}match = 'b'")
        if message:
            assert message.startswith(f"{tmp_path / 'recipe.toml'}: [[layers]] 2: ")
            assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\0r\0", "is no text in UTF-8"),
        ("größe = 4".encode("latin-1"), "is no text in UTF-8"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "not a TOML file"),
        (b"a = " + b"{b=" * 5000 + b"1" + b"}" * 5000, "not a TOML file"),
        (b"ranks = 4\nranks = 5", "not a TOML file"),
        (b"ranks = 1_0__0", "not a TOML file"),
        (b"[layers.a]\nranks = 4", "layers must be tables"),
        (b"[ranks]\nfc1 = 4", "--ranks must be a whole number"),
        (b"[[ranks]]\nfc1 = 4", "--ranks must be a whole number"),
        (b"'' = 4", "unknown key ''"),
        (b"'a\\u001bb' = 4", "unknown key"),
        (b"batch_size = 4\nbatch-size = 4", "'batch_size' is given twice"),
    ],
)
def test_contents_that_are_no_recipe(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(PlanError) as error:
        Recipe.from_toml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert says in str(error.value)
    assert "\x1b" not in str(error.value)


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    for path, says in (
        (Path("/dev/zero"), "Not an ordinary file"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(PlanError, match=says):
            Recipe.from_toml(path)
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(PlanError, match=r"has over 100,000,000 bytes"):
        Recipe.from_toml(tmp_path / "large.toml")


@pytest.mark.parametrize("name", ["ratio", "lr", "seed", "workers", "params"])
def test_odd_values_from_python_are_refused(name: str) -> None:
    odd: list[object] = [10**400, -(10**400), 2**63, 16**5000, True, "4", [4], 1 + 2j, Path("x")]
    for value in odd:
        with pytest.raises(PlanError) as error:
            Recipe(**{name: value})  # type: ignore[arg-type]
        assert str(error.value).startswith(f"--{name} must be ")
        assert len(str(error.value)) < 200
