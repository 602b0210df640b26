"""docs/results.md is what the script makes of the results, and its own rows are what the tables of the papers say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def papers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("papers", ROOT / "scripts" / "papers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules["papers"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated(papers: ModuleType) -> None:
    page = papers.page(papers.read(papers.RESULTS), papers.read(papers.FINETUNED))
    assert papers.PAGE.read_text() == page


def test_another_figure_changes_the_page(papers: ModuleType) -> None:
    rows = papers.read(papers.RESULTS)
    page = papers.page(rows, [])
    for index, row in enumerate(rows):
        name = next(key for key in ("file_bytes", "forward", "compressed") if key in row["ours"])
        changed = {**row, "ours": {**row["ours"], name: 3 * row["ours"][name]}}
        assert papers.page([*rows[:index], changed, *rows[index + 1 :]], []) != page, row["row"]


def test_rows_are_not_run_twice(
    papers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["papers.py", "cost", "--row", "TT, modes 3", "--results", str(results)])
    papers.main()
    papers.main()
    (row,) = papers.read(results)
    # 4096 = 16 x 16 x 16: r (16 16) + r (16 16) r + (16 16) r at rank 4, and the bias.
    assert row["ours"]["params"] == 4 * 256 + 16 * 256 + 4 * 256 + 4096
    assert row["ours"]["forward"] > 0 < row["ours"]["backward"]
    assert row["ours"]["saved_bytes"] >= 4 * papers.ROWS * 4096
    assert capsys.readouterr().out.count("TT, modes 3") == 1


def test_published_counts_agree_with_ours(papers: ModuleType) -> None:
    """Every compression of Novikov et al. 2015, table 2, as the paper prints it: cut or rounded."""
    rows = [row for row in papers.read(papers.RESULTS) if row["group"] == "vgg"]
    assert len(rows) == 16
    for row in rows:
        paper, ours = row["paper"], row["ours"]
        assert abs(ours["layers"] - paper["layers"]) <= 1
        assert abs(ours["network"] - paper["network"]) <= 0.1
