"""What a page says of one file: the numbers of its JSON, each shown together with where it is from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from markupsafe import Markup, escape

from ttcompress.records.common import Json, format_compression, printable
from ttcompress.report.text import format_bytes

NOT_KNOWN = "\N{EN DASH}"
HEAT_STEPS = (0.02, 0.05, 0.1, 0.2)
"""Shares of the error from which on a layer is drawn in the next colour."""
HEAT_WORDS = ("under 2 %", "2 to 5 %", "5 to 10 %", "10 to 20 %", "over 20 %")


def heat_of(share: float | None) -> int | None:
    """Which colour a share of the error has."""
    return None if share is None else sum(share >= step for step in HEAT_STEPS)


def cut_name(layer: Json, number: int) -> str:
    """What a cut between two TT-cores is called."""
    return f"cut {number + 1}" if len(layer["cuts"]) > 1 else "the cut"


def found_at(data: Any, path: str) -> Any:
    """What JSON has at a path of keys and places with slashes between, None where that ends before.

    >>> found_at({"a": [{"b.c": 3}]}, "a/0/b.c")
    3
    """
    for step in path.split("/"):
        if isinstance(data, Mapping):
            data = data.get(step.replace("~1", "/").replace("~0", "~"))
        elif isinstance(data, Sequence) and not isinstance(data, str):
            data = data[int(step)]
        else:
            return None
    return data


def ordered(*lists: Sequence[str]) -> list[str]:
    """Names of several lists, each in the order of a network, as one: by their numbers where all lists are."""
    names = list(dict.fromkeys(name for each in lists for name in each))
    if all(list(each) == sorted(each, key=_by_numbers) for each in lists):
        names.sort(key=_by_numbers)
    return names


def _by_numbers(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def step_of(key: str) -> str:
    """A key as a step of such a path (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")


def _seconds(value: float) -> str:
    if value >= 120:
        return f"{value / 60:.1f} min"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.3g} ms"


FORMS: Mapping[str, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,}",
    "percent": lambda value: f"{value:.2f}\N{NO-BREAK SPACE}%",
    "points": lambda value: f"{value:+.2f}".replace("-", "\N{MINUS SIGN}"),
    "bytes": lambda value: format_bytes(value).replace(" ", "\N{NO-BREAK SPACE}"),
    "compression": format_compression,
    "ratiox": lambda value: f"{value:.4g}x",
    "ratio": lambda value: f"{value:.2f}",
    "error": lambda value: f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}",
    "share": lambda value: f"{100 * value:.1f}\N{NO-BREAK SPACE}%",
    "number": lambda value: f"{value:.6g}",
    "seconds": lambda value: _seconds(value).replace(" ", "\N{NO-BREAK SPACE}"),
    "rate": lambda value: f"{value:,.0f}",
}
"""How numbers are written."""


def _printable(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {printable(key): _printable(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_printable(each) for each in data]
    return printable(data) if isinstance(data, str) else data


@dataclass(frozen=True)
class Entry:
    """One file of a page: `data` is what `--json` prints of it, `images` belong to its samples.

    `number` is its place among the files of the page, `marked` whether it is the one that was chosen among them.
    """

    data: Json
    number: int = 0
    images: Sequence[str | None] = field(default_factory=tuple)
    marked: bool = False

    def __post_init__(self) -> None:
        # Texts from outside may order a screen about, or be what no page can hold.
        object.__setattr__(self, "data", _printable(self.data))

    # ------------------------------------------------------------------------------------------------ numbers in HTML

    def show(self, path: str, form: str, missing: str = NOT_KNOWN) -> Markup:
        """The number at a path of the JSON, in one of the FORMS."""
        value = found_at(self.data, path)
        if value is None:
            return Markup(missing)
        return Markup('<data value="{}" data-json="{}/{}">{}</data>').format(
            repr(value), self.number, path, FORMS[form](value)
        )

    def difference(self, path: str, other: str, form: str = "points") -> Markup:
        """How much the number at the first path is above that at the second."""
        value, base = found_at(self.data, path), found_at(self.data, other)
        if value is None or base is None:
            return Markup(NOT_KNOWN)
        return Markup('<data value="{}" data-json="{}/{}" data-minus="{}/{}">{}</data>').format(
            repr(value - base), self.number, path, self.number, other, FORMS[form](value - base)
        )

    def ratio(self, path: str, other: str) -> Markup:
        """The number at the first path over that at the second."""
        value, base = found_at(self.data, path), found_at(self.data, other)
        if not value or not base:
            return Markup(NOT_KNOWN)
        return Markup('<data value="{}" data-json="{}/{}" data-over="{}/{}">{}</data>').format(
            repr(value / base), self.number, path, self.number, other, format_compression(value / base)
        )

    # ------------------------------------------------------------------------------------------------ what is known

    def has(self, path: str) -> bool:
        """Whether the JSON says anything there."""
        return found_at(self.data, path) not in (None, "", [], {})

    def text(self, path: str) -> str:
        """A text of the JSON, empty where there is none."""
        return str(found_at(self.data, path) or "")

    @cached_property
    def label(self) -> str:
        """The name of the file, or of what it was made from."""
        return self.text("file") or self.text("source/file") or "network"

    @property
    def is_report(self) -> bool:
        """Whether it is about a compressed network, not a measurement alone."""
        return "layers" in self.data

    @property
    def compression(self) -> float:
        """Parameters before over after."""
        return float(self.data.get("compression", 1.0))

    @property
    def is_metric(self) -> bool:
        """Whether quality is a user's own figure, such as a perplexity, instead of accuracy."""
        return self.has("accuracy/metric")

    @property
    def unit(self) -> str:
        """What was calibrated on."""
        return self.text("calibration/unit") if self.has("calibration/unit") else "images"

    @property
    def quality(self) -> str:
        """What quality is measured in."""
        return self.text("accuracy/metric") if self.is_metric else "top-1 accuracy"

    @property
    def quality_axis(self) -> str:
        """The same beside an axis."""
        return self.quality if self.is_metric else "top-1 accuracy, %"

    @property
    def quality_form(self) -> str:
        """How it is written."""
        return "number" if self.is_metric else "percent"

    @property
    def dense(self) -> float | None:
        """The quality of the dense network."""
        value: float | None = found_at(self.data, "accuracy/dense")
        return value

    @property
    def has_lost(self) -> bool:
        """Whether it is known how sure the loss against the dense network is."""
        return self.has("accuracy/dense") and self.has("accuracy/lost_interval")

    @cached_property
    def points(self) -> list[Json]:
        """Measured points of the curve: those that a search tried, and the result."""
        points: list[Json] = []
        for place, each in enumerate(self.data.get("search", ())):
            points.append({
                "compression": each["compression"], "quality": each["accuracy"], "interval": None,
                "chosen": False, "path": f"search/{place}",
            })  # fmt: skip
        result = found_at(self.data, "accuracy/compressed")
        if result is not None and self.is_report:
            points.append({
                "compression": self.compression, "quality": result, "chosen": True, "path": "",
                "interval": found_at(self.data, "accuracy/interval"),
            })  # fmt: skip
        return points

    @property
    def prediction(self) -> Json:
        """What the spectra predict, empty where that is not known."""
        known: Json = self.data.get("prediction") or {}
        return known if len(known.get("points", ())) > 1 else {}

    @cached_property
    def layers(self) -> list[Json]:
        """The weights of layers, replaced or kept, with where each is in the JSON."""
        shares = (self.data.get("prediction") or {}).get("shares", {})
        rows: list[Json] = []
        for place, layer in enumerate(self.data.get("layers", ())):
            rows.append({
                "fqn": layer["fqn"],
                "path": f"layers/{place}",
                "before": layer["params_before"],
                "after": layer["params_after"],
                "kept": layer.get("kept", ""),
                "share": shares.get(layer["fqn"]),
                "share_path": f"prediction/shares/{step_of(layer['fqn'])}",
                "place": place,
                "json": layer,
            })  # fmt: skip
        replaced, kept = (
            [row["fqn"] for row in rows if bool(row["kept"]) == is_kept] for is_kept in (False, True)
        )
        place_of = {name: place for place, name in enumerate(ordered(replaced, kept))}
        return sorted(rows, key=lambda row: place_of[row["fqn"]])

    @cached_property
    def largest_layer(self) -> int:
        """Parameters of the largest layer, 1 where there is none."""
        return max((row["before"] for row in self.layers), default=1) or 1

    @property
    def has_output_errors(self) -> bool:
        """Whether calibration measured the outputs of layers."""
        return any(row["json"].get("output_error") for row in self.layers)

    @property
    def other_kept(self) -> Sequence[Json]:
        """Parameters that are no weight of a layer that could be replaced."""
        found: Sequence[Json] = self.data.get("kept_parameters", ())
        return found

    @property
    def notes(self) -> list[str]:
        """Lines for the reader."""
        of_layers = [f"{row['fqn']}: {row['json']['note']}" for row in self.layers if row["json"].get("note")]
        return [*self.data.get("notes", ()), *of_layers]

    @property
    def unknown(self) -> list[tuple[str, str]]:
        """What the page cannot show, and what would make it known."""
        if not self.is_report:
            return []
        wanted = (
            ("accuracy", "accuracy", "--data"),
            ("calibration", "calibration", "--calib"),
            ("prediction", "the curve that spectra predict", ""),
            ("page/spectra", "singular values", "compress --html"),
            ("page/samples", "samples that changed", "compress --data --html"),
            ("finetuning", "training", "finetune"),
            ("bench", "time and memory", "bench --save"),
        )
        return [(what, how) for path, what, how in wanted if not self.has(path)]

    @property
    def stages(self) -> Sequence[Json]:
        """Of the calibration."""
        found: Sequence[Json] = found_at(self.data, "calibration/stages") or ()
        return found

    @property
    def history(self) -> Sequence[Json]:
        """Epochs of the training."""
        found: Sequence[Json] = found_at(self.data, "finetuning/history") or ()
        return found

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the file has."""
        return int(found_at(self.data, "finetuning/best") or 0)

    @property
    def batches(self) -> Sequence[Json]:
        """Of the measurement of time, those with both sides."""
        found: Sequence[Json] = found_at(self.data, "bench/batches") or ()
        return found

    @property
    def spectra(self) -> Sequence[Json]:
        """Layers whose singular values are at hand."""
        found: Sequence[Json] = found_at(self.data, "page/spectra") or ()
        return found

    @property
    def samples(self) -> list[tuple[int, Json, str | None]]:
        """What changed: its place, its JSON, its picture."""
        found: Sequence[Json] = found_at(self.data, "page/samples") or ()
        images = [*self.images, *[None] * len(found)]
        return [(place, sample, images[place]) for place, sample in enumerate(found)]

    def modes(self, layer: Json) -> str:
        """The modes of a layer, as the table of the command has them."""
        pairs = [
            f"{m}\N{MULTIPLICATION SIGN}{n}"
            for m, n in zip(layer["out_modes"], layer["in_modes"], strict=True)
            if m * n > 1
        ]
        windows = [str(size) for size in layer["window_modes"] if size > 1]
        return " ".join(pairs) + (f" window {','.join(windows)}" if windows else "")

    @property
    def options(self) -> str:
        """What was asked for, as far as the file says: options as the command line spells them."""
        parts = []
        for name, value in self.data.get("recipe", {}).items():
            if name != "layers":
                shown = ",".join(map(str, value)) if isinstance(value, list) else value
                parts.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {shown}"))
        return " ".join(parts)


def command_words(command: str) -> Markup:
    """A command whose lines end between words only, not after hyphens."""
    words = [Markup("<span>{}</span>").format(word) for word in command.split(" ")]
    return Markup(" ").join(words)


def words_of(text: object) -> Markup:
    """A text with places at which its lines may end, for names with many dots."""
    return Markup(str(escape(text)).replace(".", ".<wbr>").replace("_", "_<wbr>"))
