"""Pages in a real browser: nothing to complain of, nothing asked for, nothing cut off, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser_path, open_browser
from pages import bare_page, full_page, full_report

from ttcompress.report.entries import Entry
from ttcompress.report.html import render

pytestmark = pytest.mark.skipif(browser_path() is None, reason="needs a browser: apt-get install chromium")

SERIES = [full_report(f"net-{ratio}x.safetensors").to_json() for ratio in (1.5, 2, 3, 4, 6)]
PAGES = {
    "full": [full_page()],
    "bare": [bare_page()],
    "several": [full_page(), *SERIES],
    "long": [
        full_report(names=tuple(f"model.language_model.layers.{k}.self_attention.q_proj" for k in range(60))).to_json()
    ],
}  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs"
SEEN = """[...document.querySelectorAll("section, section *")].filter((each) => {
  if (each.closest(".scroll") || each.closest("svg")) return false;
  const box = each.getBoundingClientRect();
  return box.width && (box.left < -1 || box.right > innerWidth + 1) && getComputedStyle(each).position !== "absolute";
}).map((each) => each.tagName + "." + each.className)"""
SORTED = """(() => {
  const table = document.querySelector("table.sortable.sticky");
  const heads = [...table.tHead.rows[0].cells];
  const place = heads.findIndex((head) => head.textContent.startsWith("after"));
  heads[place].querySelector("button").click();
  return [...table.tBodies[0].rows].map((row) => row.cells[place].querySelector("data"))
    .filter((each) => each).map((each) => Number(each.value));
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {}
    for name, data in PAGES.items():
        made[name] = folder / f"{name}.html"
        made[name].write_text(
            render([Entry(each, number) for number, each in enumerate(data)], "ttcompress report")
        )
    return made


@pytest.mark.parametrize("width", [400, 800, 1600])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wrong_and_nothing_cut_off(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    seen = browser.look(pages[name], width, dark=width == 800, ask={"outside": SEEN})
    assert (seen.complaints, seen.requests, seen.overflow, seen.values["outside"]) == ([], [], 0, [])


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("page", sorted(DOCS.glob("*.html")), ids=lambda page: page.stem)
def test_pages_of_real_runs_are_whole_too(browser: Browser, page: Path, width: int) -> None:
    seen = browser.look(page, width, dark=width == 400, ask={"outside": SEEN})
    assert (seen.complaints, seen.requests, seen.overflow, seen.values["outside"]) == ([], [], 0, [])


def test_a_click_on_a_head_sorts(browser: Browser, pages: dict[str, Path]) -> None:
    seen = browser.look(pages["full"], ask={"numbers": SORTED})
    numbers = seen.values["numbers"]
    assert numbers == sorted(numbers, reverse=True)
    assert len(set(numbers)) > 1
    assert seen.complaints == []


def test_without_scripts_everything_is_there(browser: Browser, pages: dict[str, Path]) -> None:
    words = "document.body.innerText.length"
    with_scripts = browser.look(pages["full"], ask={"words": words})
    without = browser.look(pages["full"], scripts=False, ask={"words": words})
    assert without.values["words"] >= 0.95 * with_scripts.values["words"]
    assert without.complaints == []


def test_light_dark_and_paper_differ(browser: Browser, pages: dict[str, Path]) -> None:
    ask = {
        "paper": "getComputedStyle(document.querySelector('section')).backgroundColor",
        "ink": "getComputedStyle(document.body).color",
        "line": "getComputedStyle(document.querySelector('figure svg text')).fill",
    }
    light = browser.look(pages["full"], ask=ask).values
    dark = browser.look(pages["full"], dark=True, ask=ask).values
    printed = browser.look(pages["full"], dark=True, media="print", ask=ask).values
    assert all(light[name] != dark[name] for name in ("ink", "line"))
    assert printed["ink"] == light["ink"]
    assert printed["line"] == light["line"]


def test_one_width_of_a_picture_is_shown(browser: Browser, pages: dict[str, Path]) -> None:
    ask = {
        "shown": "[...document.querySelectorAll('#curve figure > div')].map((each) => each.offsetWidth > 0)"
    }
    assert browser.look(pages["full"], 1600, ask=ask).values["shown"] == [True, False]
    assert browser.look(pages["full"], 400, ask=ask).values["shown"] == [False, True]
