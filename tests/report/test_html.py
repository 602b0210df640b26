"""The page: every number is that of the JSON, nothing is invented, nothing of a name is taken for markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pages import Page, at, bare_page, full_page, full_report, numbers_in

from ttcompress.files.header import METADATA_KEY, canonical_json
from ttcompress.records.common import Json
from ttcompress.records.report import Report
from ttcompress.report.entries import FORMS, Entry
from ttcompress.report.html import render

EVERYTHING = ["summary", "curve", "layers", "spectra", "stages", "samples", "training", "times", "notes"]
EVIL = '<script>alert("x")</script>&amp;$x_1^2$ "quoted" \'single\' --> \x1b[31m'
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def page_of(*data: Json, **words: Any) -> Page:
    entries = [Entry(each, number, [PIXEL] if number == 0 else ()) for number, each in enumerate(data)]
    return Page(render(entries, **words))


@pytest.fixture(scope="module")
def full() -> Page:
    return page_of(full_page(), command="ttcompress compress net.th --ratio 2")


def several() -> list[Json]:
    others = [full_report(f"net-{ratio}x.safetensors").to_json() for ratio in (2, 3)]
    return [full_page(), *others, bare_page()]


def test_sections_come_in_the_order_of_interest(full: Page) -> None:
    assert full.sections == EVERYTHING
    assert page_of(*several()).sections == EVERYTHING


@pytest.mark.parametrize("data", [[full_page()], several(), [bare_page()]], ids=["full", "several", "bare"])
def test_every_number_is_that_of_the_json(data: list[Json]) -> None:
    printed = json.loads(json.dumps(data))
    page = page_of(*data)
    shown = page.all("data")
    assert len(shown) > 20

    for each in shown:
        value, exact = at(printed, str(each.get("data-json"))), float(str(each.get("value")))
        if other := each.get("data-minus"):
            value -= at(printed, other)
        if other := each.get("data-over"):
            value /= at(printed, other)
        assert exact == value
        text = "".join(each.itertext())
        assert text in {form(value) for form in FORMS.values()}


def test_no_number_stands_there_that_is_not_marked_as_one_of_the_json(full: Page) -> None:
    data = full_page()
    said = full.words("data", "svg", "code", "h1")
    named = json.dumps([data["notes"], data["layers"], data["kept_parameters"], data["finetuning"]])
    layers = [layer for layer in data["layers"] if "kept" not in layer]
    allowed = {
        *numbers_in(named), *(text for layer in layers for text in numbers_in(Entry(data).modes(layer))),
        # Confidence intervals, the legend of the shares, counts of rows, places of cuts, sizes of batches.
        "95", "2", "5", "10", "20", "1", "4", "3", "32",
    }  # fmt: skip
    assert [number for number in numbers_in(said) if number not in allowed] == []


def test_what_is_known_is_said(full: Page) -> None:
    words = full.words()
    for text in (
        "net.th",
        "1.7x",
        "90.57\xa0%",
        "91.73\xa0%",
        "94.80\xa0%",
        "1.1\xa0MB",
        "544.9\xa0kB",
        "66.8\xa0s",
    ):
        assert text in words, text
    for text in (
        "ttcompress compress net.th --ratio 2",
        "cd" * 32,
        "ab" * 32,
        "first convolution",
        "ranks clipped",
    ):
        assert text in words, text
    assert "Not measured" not in words


def test_several_files_say_what_each_lost_where_one_of_them_knows() -> None:
    accuracy = full_page()["accuracy"]
    unknown = {**full_page(), "accuracy": {**accuracy, "lost_interval": None}}
    heading = "lost, 95 % interval"

    page = page_of(full_page(), unknown)
    table = [["".join(cell.itertext()) for cell in row] for row in page.all("tr")[:3]]
    column = table[0].index(heading)
    assert [row[column] for row in table] == [heading, "0.81 to 1.51", "\N{EN DASH}"]

    without_dense = {**full_page(), "accuracy": {**accuracy, "dense": None}}
    assert heading not in page_of(unknown, without_dense).words()


def test_what_is_not_known_is_left_out() -> None:
    page = page_of(bare_page())
    assert page.sections == ["summary", "layers", "notes"]
    words = page.words()
    assert "Not measured: accuracy (--data)" in words
    assert "%" not in re.sub("[^%]*interval", "", page.words("section")).partition("Not measured")[0]


@pytest.mark.parametrize(
    ("without", "section"),
    [
        ("calibration", "stages"), ("finetuning", "training"), ("bench", "times"), ("page", "spectra"), ("page", "samples"),
    ],
)  # fmt: skip
def test_each_section_hangs_on_what_it_shows(without: str, section: str) -> None:
    data = full_page()
    data[without] = {} if without == "page" else None
    page = page_of(data)
    assert section not in page.sections
    assert set(page.sections) == set(EVERYTHING) - (
        {section} if without != "page" else {"spectra", "samples"}
    )


def test_the_curve_needs_a_prediction_or_a_measurement() -> None:
    data = full_page()
    for gone in ("prediction", "accuracy"):
        data[gone] = None
        assert ("curve" in page_of(data).sections) == (gone == "prediction")
        data["search"] = []


def test_pictures_have_words_and_tables_beside_them(full: Page) -> None:
    for section in full.all("section"):
        pictures = [each for each in section.iter() if str(each.tag).endswith("}svg")]
        assert all(each.get("role") == "img" and each.get("aria-label") for each in pictures)
        if pictures:
            assert any(str(each.tag).endswith("}table") for each in section.iter())
            assert any(str(each.tag).endswith("}details") for each in section.iter())
    assert all(image.get("alt") for image in full.all("img"))
    assert len(full.all("svg")) == 2 * 5 + 3


def test_names_of_parts_are_unique_and_used(full: Page) -> None:
    names = re.findall(r'\bid="([^"]+)"', full.text)
    assert len(set(names)) == len(names)
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', full.text)
    assert {name for found in referred for name in found if name} <= set(names)


def test_equal_reports_make_equal_pages() -> None:
    assert page_of(full_page()).text == page_of(full_page()).text


def test_nothing_is_fetched(full: Page) -> None:
    for attribute in re.findall(r'(?:src|href|action|data)="([^"]*)"', full.text):
        assert attribute.startswith(("#", "data:"))
    assert "@import" not in full.text
    assert not re.search(r"url\((?!#)", full.text)
    assert len(full.all("link")) == len(full.all("link", rel="icon")) == 1


def _evil(data: Any) -> Any:
    """The same with every text that a user gives made as bad as can be."""
    fixed = {
        "format",
        "kind",
        "by",
        "schema",
        "version",
        "execution",
        "dtype",
        "weight_dtype",
        "memory_format",
        "what",
    }
    if isinstance(data, dict):
        return {
            _evil(key) if key in ("a.conv1", "a.conv2") else key: value if key in fixed else _evil(value)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_evil(each) for each in data]
    return f"{data}{EVIL}" if isinstance(data, str) else data


def test_names_are_texts_wherever_they_come_from() -> None:
    data = _evil(full_page())
    page = page_of(data, {**data, "file": EVIL}, command=f"ttcompress {EVIL}", title=EVIL)
    alone = page_of(data, command=f"ttcompress {EVIL}")
    for each in (page, alone):
        assert len(each.all("script")) == 1
        assert 'alert("x")' not in each.all("script")[0].text
        assert '<script>alert("x")</script>' in each.words()
        assert "\x1b" not in each.text
        assert "a.conv1<script>" in each.words()


def test_a_command_has_no_folder_of_this_machine() -> None:
    from ttcompress.cli_pages import without_folders

    words = [
        "/home/me/net.pt", "cifar10:/data/cifar10", "imagefolder:/data/x@val", "--data=npz:/a/b.npz", "~/x/y.pt", "C:\\a\\b.pt",
        "/data/folder/",
    ]  # fmt: skip
    for word in words:
        assert not re.search(r"home|/data|/a|~|C:|\\", without_folders(word)), word
    for word in ("--ratio", "2.5", "layer*.conv1", "re:a/b", "data/net.pt", "cifar10:data/cifar10"):
        assert without_folders(word) == word


def test_another_figure_than_accuracy_is_called_by_its_name() -> None:
    data = full_page()
    data["accuracy"] = {
        "metric": "perplexity",
        "dense": 17.25,
        "compressed": 18.5,
        "n": None,
        "interval": None,
    }
    data["search"] = []
    words = page_of(data).words()
    assert "perplexity" in words
    assert "18.5" in words
    assert "18.50" not in words
    assert "top-1" not in words


def test_layers_of_kinds_that_nobody_knows_yet_are_shown() -> None:
    data = full_page()
    strange = {
        "fqn": "wte", "kind": "embedding", "format": "matrix", "out_modes": [4, 4], "in_modes": [8, 2], "window_modes": [1, 1],
        "tt_ranks": [1, 5, 1], "params_before": 1024, "params_after": 200, "spec": {"whatever": 1},
    }  # fmt: skip
    data["layers"] = [*data["layers"], strange]
    assert "wte" in page_of(data).words()


def test_a_measurement_alone_makes_a_page_too() -> None:
    result = {
        "accuracy": 91.73,
        "top5": 99.66,
        "n": 10_000,
        "interval": [91.17, 92.25],
        "data": "cifar10@test",
    }
    page = page_of({"file": "net.th", "evaluation": result, "page": {"seconds": 9.87}})
    assert page.sections == ["summary", "notes"]
    assert "91.73\xa0%" in page.words()


def test_hundreds_of_layers_are_no_problem() -> None:
    names = tuple(f"model.layers.{k}.mlp.down_proj" for k in range(560))
    page = page_of(full_report(names=names).to_json())
    assert len(page.text) < 1_500_000
    assert "model.layers.559.mlp.down_proj" in page.words()


def _sparse(path: Path, report: Report) -> None:
    """A file of 10 GB that takes no room."""
    from ttcompress.files.compressed import core_infos
    from ttcompress.files.header import TensorInfo, encode_header

    tensors = {**core_infos(report), "huge": TensorInfo("F32", (2_500_000_000,))}
    tensors |= {kept.name: TensorInfo("F32", (kept.params,)) for kept in report.kept}
    metadata = {"format": "pt", METADATA_KEY: canonical_json(report.metadata())}
    start, _ = encode_header(tensors, metadata)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + sum(info.num_bytes for info in tensors.values()))


def test_of_a_file_of_ten_gigabytes_only_the_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.safetensors"
    _sparse(file, replace(full_report(), file=None, file_bytes=None))
    assert file.stat().st_size > 10_000_000_000
    code = (
        "import sys, ttcompress.cli as cli\n"
        f"try: cli.main(['report', {str(file)!r}, '--html', {str(tmp_path / 'page.html')!r}])\n"
        "except SystemExit as error: assert not error.code, error.code\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "(peak,) = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print('USED', peak, 'torch' in loaded, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kilobytes, torch, pyplot = done.stdout.split("USED", 1)[1].split()
    assert int(kilobytes) < 200_000
    assert (torch, pyplot) == ("False", "False")
    page = Page((tmp_path / "page.html").read_text())
    assert "10.0\xa0GB" in page.words()
    assert str(tmp_path) not in page.text


def test_what_is_drawn_is_what_is_in_the_table(full: Page) -> None:
    """Ten marks of four points and more: a drawing without data would have none."""
    (curve, *_) = [each for each in full.all("svg") if "compression" in str(each.get("aria-label"))]
    marks = [each for each in curve.iter() if str(each.tag).endswith("}use")]
    assert len(marks) >= 4
