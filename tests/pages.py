"""What the tests of pages share: a report with everything that one can hold, and a reader of pages."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from xml.etree.ElementTree import Element

import html5lib

from ttcompress.records.common import Json
from ttcompress.records.layers import ConvSpec, LinearSpec
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan
from ttcompress.records.report import Accuracy, Architecture, Comparison, Report
from ttcompress.tt.shapes import tensorize_shape

SPACE = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
INLINE = {"wbr", "data", "span", "code", "b"}
STAGES = (
    ("weights", 0.4, True),
    ("whitened", 0.25, True),
    ("batch norm", 0.31, False),
    ("refinement", None, False),
)


def _layer(name: str, error: float) -> LayerPlan:
    return LayerPlan(
        name,
        ConvSpec(16, 16, (3, 3)),
        tensorize_shape("chain", (16, 16, 3, 3)),
        (1, 11, 15, 1),
        "float32",
        predicted_error=2 * error,
        relative_error=error,
        output_error={"weights": error / 2, "whitened": error / 3},
    )


def _side(factor: float) -> Json:
    return {
        "median": 0.0123 * factor,
        "p90": 0.0145 * factor,
        "throughput": 81.3 / factor,
        "memory_format": "contiguous",
        "multiply_adds": int(40_813_184 / factor),
        "peak_memory": int(5_000_123 * factor),
    }


def _batch(size: int, names: list[str]) -> Json:
    times = [{"fqn": name, "dense": 0.00123, "compressed": 0.00234, "time_ratio": 1.9} for name in names]
    ratios = {"time_ratio": 1.37, "memory_ratio": 0.91}
    return {"batch": size, **ratios, "dense": _side(1.0), "compressed": _side(1.4), "layers": times}


def full_report(file: str = "net-tt.safetensors", names: tuple[str, ...] = ("a.conv1", "a.conv2")) -> Report:
    """Calibrated, trained, measured, searched: nothing is left out."""
    kept = (
        KeptParameter("stem.weight", 432, "first convolution", "conv2d"),
        KeptParameter("bn.weight", 16, "BatchNorm2d"),
    )
    layers = (*(_layer(name, 0.2 + place / 9) for place, name in enumerate(names)), _linear())
    accuracy = Comparison(
        Accuracy(91.73, 99.66, 10_000, (91.17, 92.25)),
        Accuracy(90.57, 99.62, 10_000, (89.98152839833246, 91.12731397387081)),
        94.8,
        "cifar10@test",
        (0.8125, 1.5075),
    )
    history = [{"epoch": 0, "val": 88.0}, {"epoch": 1, "val": 90.25, "loss": 0.4375, "train": 95.5}]
    return Report(
        plan=CompressionPlan(layers, kept, ("warning: the drop is large", "a note")),
        bytes_before=1_100_000,
        bytes_after=544_900,
        version="0.1.0",
        seed=3,
        source={"file": "net.th", "sha256": "ab" * 32},
        architecture=Architecture("zoo", "resnet20"),
        recipe={"ratio": 2.0, "effort": "fast"},
        accuracy=accuracy.to_json(),
        calibration={
            "data": "cifar10@train", "images": 896, "held_out": 128, "effort": "fast",
            "stages": [{"stage": stage, "error": error, "kept": kept} for stage, error, kept in STAGES],
        },
        search=({"ratio": 3.1, "compression": 3.15, "accuracy": 85.25, "drop": 6.48},),
        finetuning={
            "train": "cifar10@train", "val": "5,000 held out", "teacher": "net.th", "options": {}, "start_counts": True,
            "best": 1, "before": accuracy.to_json(), "history": history,
        },
        bench={
            "what": "inference", "device": "CPU", "dtype": "float32", "file": file, "input_size": [3, 32, 32],
            "batches": [_batch(size, list(names)) for size in (1, 32)],
        },
        prediction={
            "by": "outputs", "points": [[1.0, 0.0], [1.501, 0.1203], [2.503, 0.3004], [6.5, 0.71]],
            "shares": {name: 0.025 * (place + 1) for place, name in enumerate(names)},
        },
        tensors_sha256="cd" * 32,
        file=file,
        file_bytes=573_180,
    )  # fmt: skip


def _linear() -> LayerPlan:
    linear = LinearSpec(64, 64, True)
    return LayerPlan(
        "fc",
        linear,
        tensorize_shape("matrix", (64, 64)),
        (1, 7, 7, 1),
        "float32",
        predicted_error=0.625,
        note="ranks clipped",
    )


def full_page(report: Report | None = None) -> Json:
    """The JSON of a command that made a page: the report, and what the page shows beside it."""
    known = report or full_report()
    spectrum = {"rank": 2, "size": 4, "places": [1, 2, 3, 4], "values": [1.0, 0.5125, 0.1, 0.0125]}
    names = [layer.fqn for layer in known.layers]
    sample = {
        "index": 1234,
        "label": 7,
        "dense": {"answer": 7, "confidence": 99.12},
        "compressed": {"answer": 3, "confidence": 87.65},
    }
    return {
        **known.to_json(),
        "page": {
            "command": "ttcompress compress net.th --ratio 2",
            "seconds": 66.789,
            "spectra": [{"fqn": name, "format": "chain", "cuts": [spectrum, spectrum]} for name in names],
            "samples": [sample, {**sample, "name": "horse", "text": "a sentence", "label": 5}],
        },
    }


def bare_page(file: str = "bare.safetensors") -> Json:
    """Of a file of which nothing but its plan is known."""
    full = full_report(file)
    plan = replace(full.plan, notes=())
    return Report(plan, 1_100_000, 544_900, "0.1.0", file=file, file_bytes=570_000).to_json()


class Page:
    """A page as a browser would read it."""

    def __init__(self, text: str) -> None:
        """Parse it.

        Raises:
            html5lib.html5parser.ParseError: it is no valid HTML.
        """
        self.text = text
        self.root: Element = html5lib.HTMLParser(strict=True).parse(text)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements of this kind with these attributes."""
        found = [*self.root.iter(f"{SPACE}{tag}"), *self.root.iter(f"{SVG}{tag}")]
        return [each for each in found if all(each.get(name) == value for name, value in attributes.items())]

    @property
    def sections(self) -> list[str]:
        """What is shown, in its order."""
        return [str(section.get("id")) for section in self.all("section")]

    def words(self, *without: str) -> str:
        """What a person reads, but for elements of these kinds."""
        text = "".join(_texts(self.all("body")[0], {*without, "script", "style"}))
        return re.sub("[ \n]+", " ", text)


def _texts(element: Element, without: set[str]) -> list[str]:
    tag = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
    inside = (
        []
        if tag in without
        else [element.text or "", *(t for each in element for t in _texts(each, without))]
    )
    return [*inside, "" if tag in INLINE else " ", element.tail or ""]


def at(data: Any, pointer: str) -> Any:
    """What JSON has at a pointer (RFC 6901)."""
    for step in pointer.split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def numbers_in(text: str) -> list[str]:
    """Numbers that stand alone, not in a name."""
    return re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])", text)
