"""Reports as text: every number that is in the JSON is shown, and shown right."""

from __future__ import annotations

import os
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from ttcompress import cli
from ttcompress.errors import CheckpointError
from ttcompress.files.compressed import core_infos
from ttcompress.files.header import TensorInfo, canonical_json, encode_header
from ttcompress.files.writing import write_safetensors
from ttcompress.records.common import format_compression
from ttcompress.records.layers import ConvSpec, LinearSpec
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Accuracy, Architecture, Comparison, Preprocessing, Report
from ttcompress.report.text import format_bytes, read_report, render, render_side_by_side, with_file
from ttcompress.tt.shapes import tensorize_shape

FC6 = tensorize_shape("matrix", (4096, 25088), (4, 4, 4, 4, 4, 4), (2, 7, 8, 8, 7, 4))
CONV = ConvSpec(64, 128, (3, 3), (2, 2), (1, 1))
PLAN = CompressionPlan(
    layers=(
        LayerPlan(
            "classifier.0",
            LinearSpec(25088, 4096, True),
            FC6,
            (1, 4, 4, 4, 4, 4, 1),
            "float32",
            relative_error=0.98765,
        ),
        LayerPlan(
            "features.5",
            CONV,
            tensorize_shape("chain", (128, 64, 3, 3)),
            (1, 24, 48, 1),
            "float32",
            relative_error=1.234e-6,
            note="TT-ranks 24,480 clipped to the feasible 24,48",
        ),
    ),
    kept=(
        KeptParameter("classifier.6.weight", 4_096_000, "last Linear", "linear"),
        KeptParameter("features.0.weight", 1_728, "first convolution", "conv2d"),
        KeptParameter("classifier.0.bias", 4_096, "bias"),
    ),
    notes=("no rank choice lies within 2 %",),
)
ACCURACY = Comparison(
    Accuracy(91.73, 99.7, 10_000, (91.1737, 92.2543)),
    Accuracy(88.25, 99.12, 10_000, (87.6, 88.87)),
    93.4,
    "cifar10@test",
    (3.0625, 3.9125),
)
REPORT = Report(
    plan=PLAN,
    bytes_before=553_430_000,
    bytes_after=142_100_000,
    version="0.1.0",
    source={"file": "vgg16.pth", "sha256": "ab" * 32},
    architecture=Architecture("torchvision", "vgg16", {"num_classes": 1000}),
    preprocessing=Preprocessing((0.5, 0.4, 0.3), (0.2, 0.2, 0.1), (3, 224, 224), 256),
    accuracy=ACCURACY.to_json(),
)


def text_of(renderable: RenderableType) -> str:
    console = Console(file=StringIO(), width=200, color_system=None)
    console.print(renderable)
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue()


def write_header(path: Path, report: Report) -> None:
    """A file with this report, whose tensors are all zeros that take no room."""
    kept = {each.name: TensorInfo("F32", (each.params,)) for each in report.kept}
    metadata = {"format": "pt", "ttcompress": canonical_json(report.metadata())}
    start, _ = encode_header({**core_infos(report), **kept}, metadata)
    path.write_bytes(start)
    os.truncate(
        path, len(start) + sum(info.num_bytes for info in (*core_infos(report).values(), *kept.values()))
    )


def line_of(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line.removeprefix(start).split()


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (1, "1.0x"),
        (7.4, "7.4x"),
        (7.44, "7.4x"),
        (999.9, "999.9x"),
        (999.94, "999.9x"),
        (999.95, "1,000x"),
        (999.99, "1,000x"),
        (1000, "1,000x"),
        (102_760_448 / 2_016, "50,972x"),
        (102_760_448 / 528, "194,622x"),
        (102_760_448 / 144, "713,614x"),
        (1234567.8, "1,234,568x"),
        (0.5, "0.5x"),
    ],
)
def test_format_compression(ratio: float, text: str) -> None:
    assert format_compression(ratio) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_940, "999.9 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (999_999, "1.0 MB"),
        (1_000_000, "1.0 MB"),
        (553_430_000, "553.4 MB"),
        (999_999_999, "1.0 GB"),
        (2_500_000_000, "2.5 GB"),
    ],
)
def test_format_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_text_holds_every_number() -> None:
    text = text_of(render(replace(REPORT, file="vgg16-tt.safetensors", file_bytes=142_123_456)))
    assert line_of(text, "classifier.0 ") == [
        *("4096x25088", "matrix", "4x2", "4x7", "4x8", "4x8", "4x7", "4x4", "4,4,4,4,4"),
        *("102,760,448", "2,016", "50,972x", "0.9877"),
    ]
    conv_after = 64 * 24 + 24 * 9 * 48 + 48 * 128
    assert line_of(text, "features.5 ") == [
        *("128x64x3x3", "chain", "1x64", "128x1", "window", "9", "24,48"),
        *("73,728", f"{conv_after:,}", f"{73_728 / conv_after:.1f}x", "1.2e-06"),
    ]
    replaced = 102_760_448 + 73_728, 2_016 + conv_after
    kept = 4_096_000 + 1_728 + 4_096
    everything = replaced[0] + kept, replaced[1] + kept
    assert line_of(text, "replaced weights") == [
        f"{replaced[0]:,}", "->", f"{replaced[1]:,}", format_compression(replaced[0] / replaced[1]),
    ]  # fmt: skip
    assert line_of(text, "all parameters") == [
        f"{everything[0]:,}", "->", f"{everything[1]:,}", format_compression(everything[0] / everything[1]),
    ]  # fmt: skip
    assert " ".join(line_of(text, "tensors")) == "553.4 MB -> 142.1 MB"
    assert " ".join(line_of(text, "file")) == "vgg16-tt.safetensors, 142.1 MB"
    assert " ".join(line_of(text, "top-1 accuracy")) == (
        "91.73 % -> 88.25 % (95 % interval 87.60 to 88.87, n = 10,000, cifar10@test)"
    )
    assert " ".join(line_of(text, "lost")) == ("3.48 points (95 % interval 3.06 to 3.91, of the same inputs)")
    assert " ".join(line_of(text, "top-5 accuracy")) == "99.70 % -> 99.12 %"
    assert line_of(text, "agreement")[:2] == ["93.40", "%"]
    assert "classifier.6: last Linear" in text
    assert "features.0: first convolution" in text
    assert "features.5: TT-ranks 24,480 clipped to the feasible 24,48" in text
    assert "no rank choice lies within 2 %" in text


def test_nothing_is_cut_at_200_columns() -> None:
    assert "…" not in text_of(render(REPORT))


@pytest.mark.parametrize("width", [40, 80])
def test_narrow_terminals_lose_no_digit(width: int) -> None:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(render(REPORT))
    output = console.file
    assert isinstance(output, StringIO)
    assert "…" not in output.getvalue()


def test_what_was_not_measured_is_not_invented() -> None:
    plan = PLAN.with_layers([replace(layer, relative_error=None) for layer in PLAN.layers])
    plan = plan.with_layers([replace(plan.layers[0], predicted_error=0.25), plan.layers[1]])
    text = text_of(render(replace(REPORT, plan=plan, accuracy=None)))
    assert line_of(text, "classifier.0 ")[-2:] == ["<=", "0.2500"]
    assert line_of(text, "features.5 ")[-1] == "-"
    assert "agreement" not in text
    assert "%" not in "".join(line for line in text.splitlines() if "accuracy" in line)


def test_own_metric_is_shown_by_name() -> None:
    accuracy = {"metric": "perplexity", "dense": 12.3456, "compressed": 13.25, "n": None, "interval": None}
    data = replace(REPORT, accuracy=accuracy, file="x.safetensors", file_bytes=1)
    assert line_of(text_of(render(data)), "perplexity") == ["12.3456", "->", "13.25"]
    assert "lost" not in text_of(render(data))
    no_dense = {**ACCURACY.to_json(), "dense": None}
    assert "lost" not in text_of(render(replace(REPORT, accuracy=no_dense)))
    worse = {**accuracy, "lower_is_better": True, "lost_interval": [0.85, 0.96]}
    lost = line_of(text_of(render(replace(data, accuracy=worse))), "lost")
    assert " ".join(lost) == "0.9044 (95 % interval 0.85 to 0.96, of the same inputs)"
    text = text_of(render_side_by_side([data, REPORT]))
    assert line_of(text, "accuracy compressed") == ["13.25", "88.25", "%"]
    assert line_of(text, "measured on")[0] == "perplexity"


def test_side_by_side(tmp_path: Path) -> None:
    other = replace(REPORT, plan=PLAN.with_layers(PLAN.layers[1:]), accuracy=None, bytes_after=500)
    data = []
    for name, report in (("a.safetensors", REPORT), ("b.safetensors", other)):
        write_header(tmp_path / name, report)
        data.append(read_report(tmp_path / name))
    text = text_of(render_side_by_side(data))
    assert text.split()[:2] == ["a.safetensors", "b.safetensors"]
    assert line_of(text, "compression") == [format_compression(report.compression) for report in data]
    assert line_of(text, "parameters after") == [f"{report.params_after:,}" for report in data]
    assert line_of(text, "parameters before") == [f"{report.params_before:,}" for report in data]
    assert line_of(text, "tensors") == ["142.1", "MB", "500", "B"]
    assert line_of(text, "file") == [
        part for report in data for part in format_bytes(report.file_bytes).split()
    ]
    assert line_of(text, "layers replaced") == ["2", "1"]
    assert line_of(text, "largest relative error") == ["0.988", "1.23e-06"]
    assert line_of(text, "accuracy dense") == ["91.73", "%", "-"]
    assert line_of(text, "accuracy compressed") == ["88.25", "%", "-"]


def test_side_by_side_without_errors() -> None:
    """As of networks trained in TT form, and of those trained further away from their checkpoint."""
    plan = PLAN.with_layers([replace(layer, relative_error=None) for layer in PLAN.layers])
    data = replace(REPORT, plan=plan, file="x.safetensors", file_bytes=1)
    text = text_of(render_side_by_side([data, replace(REPORT, file="y", file_bytes=1)]))
    assert line_of(text, "largest relative error") == ["-", "0.988"]


def test_read_report_is_the_report_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_header(path, REPORT)
    report = read_report(path)
    assert report == read_report(str(path)) == with_file(REPORT, path)
    assert (report.file, report.file_bytes) == ("file.safetensors", path.stat().st_size)
    assert replace(report, file=None, file_bytes=None) == REPORT
    assert report.to_json() == {
        **REPORT.metadata(),
        "file": "file.safetensors",
        "file_bytes": path.stat().st_size,
    }
    assert Report.from_json(report.to_json()) == report


def test_a_report_is_read_by_attributes() -> None:
    assert (report_counts := (REPORT.params_before, REPORT.params_after)) == (
        PLAN.params_before,
        PLAN.params_after,
    )
    assert REPORT.compression == report_counts[0] / report_counts[1]
    assert [layer.fqn for layer in REPORT.layers] == ["classifier.0", "features.5"]
    assert [kept.name for kept in REPORT.kept][-1] == "classifier.0.bias"
    assert (REPORT.to_json()["file"], REPORT.to_json()["file_bytes"]) == (None, None)
    assert {"file", "file_bytes"}.isdisjoint(REPORT.metadata())


def test_a_printed_report_is_what_the_command_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = tmp_path / "file.safetensors"
    write_header(path, REPORT)
    print(read_report(path))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    monkeypatch.delenv("FORCE_COLOR")
    cli.main(["report", str(path)])
    assert capsys.readouterr().out == printed


def test_kept_weights_are_grouped_by_reason_and_cut() -> None:
    kept = tuple(KeptParameter(f"layer{k}.weight", 10, "groups=32", "conv2d") for k in range(9))
    text = text_of(render(replace(REPORT, plan=replace(PLAN, kept=kept))))
    assert "layer0, layer1 and 7 more: groups=32" in text


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    """rich would take [bold] for an order, and fail on [/]."""
    layer = replace(PLAN.layers[0], fqn="[bold]layer[/]", note="[/red]")
    data = replace(REPORT, plan=PLAN.with_layers([layer]), file="[/x].safetensors")
    assert "[bold]layer[/]" in text_of(render(data))
    assert "[/x].safetensors" in text_of(render_side_by_side([data]))


def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "dense.safetensors", {})
    with pytest.raises(CheckpointError, match="not one that ttcompress wrote"):
        read_report(tmp_path / "dense.safetensors")
