"""docs/results.md is what the script makes of the results, and its own rows are what the tables of the papers say."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from ttcompress.errors import TTCompressError
from ttcompress.recipe import Recipe

ROOT = Path(__file__).parents[1]


KEYS = ("error", "dense_error", "decomposed", "calibrated")


@pytest.fixture(scope="module")
def papers() -> Iterator[ModuleType]:
    """`python -m scripts.papers` as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield importlib.import_module("scripts.papers.__main__")


def test_the_page_and_its_pictures_are_generated(papers: ModuleType) -> None:
    rows = papers.read(papers.RESULTS)
    assert papers.PAGE.read_text() == papers.page(rows)
    for name, chart in papers.charts(rows).items():
        assert (papers.DOCS / name).read_text() == chart
        assert f"({name})" in papers.page(rows)


def test_the_readme_has_five_lines_of_it(papers: ModuleType) -> None:
    rows = papers.read(papers.RESULTS)
    assert papers.with_headlines(papers.README.read_text(), rows) == papers.README.read_text()
    lines = importlib.import_module("scripts.papers.headlines").headlines(rows)
    assert len(lines) == 5
    page = papers.page(rows)
    for line in lines:
        assert all(figure in page for figure in re.findall(r"\d+\.\d\d\b", line)), line


def test_another_figure_changes_the_page(papers: ModuleType) -> None:
    rows = papers.read(papers.RESULTS)
    page = papers.page(rows)
    for index, row in enumerate(rows):
        name = next(key for key in ("file_bytes", "forward", "compressed", "error") if key in row["ours"])
        changed = {**row, "ours": {**row["ours"], name: 1.5 * row["ours"][name]}}
        assert papers.page([*rows[:index], changed, *rows[index + 1 :]]) != page, row["row"]


def test_rows_are_not_run_twice(
    papers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    command = ["papers", "cost", "--row", "TT, modes 3", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    papers.main()
    with pytest.raises(SystemExit, match=r"results\.jsonl has it; name another file"):
        papers.main()
    monkeypatch.setattr(sys, "argv", [*command[:3], "TT modes 3", *command[4:]])
    with pytest.raises(SystemExit, match="no such row; close to it are 'TT, modes 3'"):
        papers.main()
    (row,) = papers.read(results)
    # 4096 = 16 x 16 x 16: r (16 16) + r (16 16) r + (16 16) r at rank 4, and the bias.
    assert row["ours"]["params"] == 4 * 256 + 16 * 256 + 4 * 256 + 4096
    assert row["ours"]["forward"] > 0 < row["ours"]["backward"]
    assert row["ours"]["saved_bytes"] >= 4 * importlib.import_module("scripts.papers.cost").ROWS * 4096
    assert capsys.readouterr().out.count("TT, modes 3") == 1


def test_the_page_says_how_to_run_a_row_again(
    papers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every printed command is taken as it stands, and says what its row needs."""
    commands = re.findall(r"^    python -m scripts.papers (.*)$", papers.PAGE.read_text(), re.MULTILINE)
    assert len(commands) == len(papers.GROUPS)
    ran: list[str] = []
    for command in commands:
        group, *rest = shlex.split(command)
        runs = [(name, partial(never, ran, name)) for name, _ in papers.GROUPS[group].runs(papers.Where())]
        monkeypatch.setitem(
            papers.GROUPS, group, replace(papers.GROUPS[group], runs=lambda where, runs=runs: runs)
        )
        options = [str(tmp_path / "results.jsonl") if each == "FILE" else each for each in rest]
        monkeypatch.setattr(sys, "argv", ["papers", group, *options])
        with pytest.raises(SystemExit, match="as asked"):
            papers.main()
        assert ran.pop() == rest[rest.index("--row") + 1]


def never(ran: list[str], name: str) -> None:
    ran.append(name)
    raise TTCompressError("as asked")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"), [(1, 2, "1 of 1"), (2, 1, "0 of 1"), (1.5, 1.6, "0 of 1")]
)
def test_wins_are_counted_beyond_noise(papers: ModuleType, ours: float, theirs: float, said: str) -> None:
    """0.1 points of 10,000 images are half a standard error, a whole point is 5."""
    rows = [{"ours": {"error": each}, "n": 10_000} for each in (ours, theirs)]
    counted = importlib.import_module("scripts.papers.rows").wins([rows, [rows[0], None]])
    worse, within = int(ours == 2), int(ours == 1.5)
    assert counted == f"{said} rows better, {worse} worse, {within} within two standard errors"


def test_the_row_of_a_dense_network_says_in_which_precision_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = importlib.import_module("scripts.papers.training")

    def from_scratch(output: Path, recipe: Recipe, data: str) -> SimpleNamespace:
        output.touch()
        return SimpleNamespace(finetuning={"precision": "bfloat16", "epochs": recipe.epochs})

    monkeypatch.setattr(training, "from_scratch", from_scratch)
    monkeypatch.setattr(
        training, "evaluate_file", lambda file, recipe: (SimpleNamespace(top1=90.5, n=10_000), None)
    )
    file = training.dense(tmp_path / "dense.pt", Recipe(), "cifar10:none", 3)
    row = training.dense_measured(file, "cifar10:none")
    assert row == {"ours": {"error": 9.5}, "n": 10_000, "precision": "bfloat16"}


@pytest.mark.parametrize(("epochs", "is_compared"), [(30, True), (5, False)])
def test_rows_of_unequal_epochs_are_not_compared(epochs: int, is_compared: bool) -> None:
    garipov = importlib.import_module("scripts.papers.garipov")
    common = {"n": 10_000, "minutes": 1.0, "epochs": 30}
    rows = [
        {**common, "row": "baseline", "ours": {"error": 10.0}},
        {**common, "row": "some, from pretrained", "ours": {**dict.fromkeys(KEYS, 12.0), "compression": 3.2}},
        {
            **common,
            "row": "some, from scratch",
            "ours": {"error": 20.0, "compression": 3.2},
            "epochs": epochs,
        },
    ]
    lines = "\n".join(garipov.section("conv", {"some": 89.0}, rows))
    assert ("at equal total epochs" in lines) == is_compared
    assert ("80.00 (-10.00)" in lines) == is_compared
    assert "88.00 (-2.00)" in lines


def test_each_row_is_compared_with_the_baseline_of_its_epochs() -> None:
    garipov = importlib.import_module("scripts.papers.garipov")
    scratch = {"row": "some, from scratch", "epochs": 5, "ours": {"error": 20.0, "compression": 3.2}}
    trained = {
        "row": "some, from pretrained",
        "epochs": 30,
        "ours": dict.fromkeys((*KEYS, "compression"), 12.0),
    }
    baselines = [
        {"row": "baseline", "epochs": epochs, "ours": {"error": error}}
        for epochs, error in ((30, 10.0), (5, 25.0))
    ]
    rows = [{"n": 10_000, "minutes": 1.0, **row} for row in (*baselines, scratch, trained)]
    lines = "\n".join(garipov.section("conv", {"some": 89.0}, rows))
    assert "80.00 (+5.00)" in lines
    assert "88.00 (-2.00)" in lines
    assert "| baseline | 90.7 | 1 | 5 | 75.00 |" in lines
    assert "| baseline | 90.7 | 1 | 30 | 90.00 |" in lines
    assert "standard error 0.4 to 0.6 points" in " ".join(lines.split())


def test_every_row_names_a_recipe_that_is_there(papers: ModuleType) -> None:
    for row in papers.read(papers.RESULTS):
        if "recipe" in row:
            assert (ROOT / "recipes" / f"{row['recipe']}.toml").is_file(), row["row"]


def test_published_counts_agree_with_ours(papers: ModuleType) -> None:
    """Every compression of Novikov et al. 2015, table 2, as the paper prints it: cut or rounded."""
    rows = [row for row in papers.read(papers.RESULTS) if row["group"] == "vgg"]
    assert len(rows) == 16
    for row in rows:
        paper, ours = row["paper"], row["ours"]
        assert abs(ours["layers"] - paper["layers"]) <= 1
        assert abs(ours["network"] - paper["network"]) <= 0.1


def test_a_chart_has_its_points_where_they_belong(papers: ModuleType) -> None:
    plot = importlib.import_module("scripts.papers.plot")
    series = {"a & b": [(10, 2), (1000, 1)], "c": [(100, 99)]}
    drawn = plot.chart("title <1>", "x", "y", series, most=4)
    assert plot.chart("title <1>", "x", "y", series, most=4) == drawn
    picture = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"

    def marks(number: int) -> list[tuple[float, float]]:
        (group,) = (each for each in picture.iter(f"{space}g") if each.get("id") == f"series-{number}")
        return [(float(each.get("x", 0)), float(each.get("y", 0))) for each in group.iter(f"{space}use")]

    (left, middle), (right, low) = marks(0)
    ((between, top),) = marks(1)
    assert between == pytest.approx((left + right) / 2, abs=0.1)
    # Of 4 in all: 2, 1, and what lies above the axis at its end.
    assert low - middle == pytest.approx((middle - top) / 2, abs=0.1)
    assert {"title <1>", "a & b", "c"} <= {each.text for each in picture.iter(f"{space}text")}


def test_empty_results_make_an_empty_page(papers: ModuleType) -> None:
    assert papers.page([]).splitlines()[0] == "# Results"
    assert papers.charts([]) == {}
