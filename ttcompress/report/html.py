"""Reports as one HTML page: no server, nothing fetched, readable without scripts; loaded only where one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from ttcompress.files.output import replacing
from ttcompress.records.common import Json, format_compression, printable
from ttcompress.report import pictures
from ttcompress.report.canvas import SIGNS
from ttcompress.report.entries import HEAT_WORDS, Entry, command_words, cut_name, heat_of, words_of
from ttcompress.version import __version__


@dataclass(frozen=True)
class Section:
    """A part of the page with its heading."""

    id: str
    title: str
    body: Markup


def write_page(path: Path, page: str) -> None:
    """Write a page whole, or not at all.

    Raises:
        CheckpointError: the file system refuses.
    """
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render(entries: Sequence[Entry], command: str = "", title: str = "", mark: str = "chosen") -> str:
    """The page of some files; `mark` says what is special of one that is marked.

    What is not known of any of them is left out.
    """
    environment = _environment()
    reports = [entry for entry in entries if entry.is_report]
    makers: tuple[tuple[str, str, Callable[[], Json | None]], ...] = (
        (
            "summary",
            "Summary",
            lambda: {"entries": entries, "command": printable(command), "mark": mark, **_sides(entries)},
        ),
        ("curve", "Quality against size", lambda: _curve(reports)),
        ("layers", "Layers", lambda: _layers(reports)),
        ("spectra", "Singular values", lambda: _spectra(reports)),
        ("stages", "Calibration, stage by stage", lambda: _pictured(reports, pictures.stages, "stages")),
        ("samples", "Samples that changed most", lambda: _samples(entries)),
        ("training", "Training", lambda: _pictured(reports, pictures.training, "history")),
        ("times", "Time and memory", lambda: _pictured(reports, pictures.times, "batches")),
        ("notes", "Notes, and what was not measured", lambda: {"entries": entries}),
    )

    sections = []
    for name, heading, make in makers:
        values = make()
        if values is not None:
            body = Markup(environment.get_template(f"{name}.html").render(values))
            sections.append(Section(name, heading, body))

    heading = title or _heading(entries)
    page = environment.get_template("page.html")
    return page.render(
        title=f"{printable(heading)} \N{EN DASH} ttcompress",
        heading=words_of(printable(heading)),
        subtitle=_subtitle(entries),
        sections=sections,
        version=__version__,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breaking": words_of, "command": command_words}
    environment.globals |= {
        "signs": SIGNS,
        "heat_words": HEAT_WORDS,
        "heat_of": heat_of,
        "cut_name": cut_name,
        "answer": _answer,
    }
    return environment


def _heading(entries: Sequence[Entry]) -> str:
    if len(entries) > 1:
        return f"{len(entries)} compressed networks side by side"
    (entry,) = entries
    name = entry.text("source/file") or entry.label
    if not entry.is_report:
        return entry.label
    return f"{name}, {format_compression(entry.compression)} smaller" if entry.layers else name


def _subtitle(entries: Sequence[Entry]) -> str:
    if len(entries) > 1:
        sources = {entry.text("source/file") for entry in entries} - {""}
        return f"made from {', '.join(sorted(sources))}" if sources else ""
    (entry,) = entries
    if not entry.is_report:
        return ""
    if entry.history:
        how = f"trained further on {entry.text('finetuning/train')}"
    elif entry.has("calibration"):
        how = f"calibrated on {entry.text('calibration/data')}, without training"
    else:
        how = "by the error of its weights, without data or training"
    return f"Tensor-Train compression {how}"


def _sides(entries: Sequence[Entry]) -> Json:
    return {
        "has_format": any(entry.has("page/format") for entry in entries),
        "has_lost": any(entry.has_lost for entry in entries),
        "quality": _quality(entries),
    }


def _quality(entries: Sequence[Entry]) -> str:
    measured = [entry.quality for entry in entries if entry.has("accuracy")]
    return measured[0] if measured else "accuracy"


def _curve(entries: Sequence[Entry]) -> Json | None:
    picture = pictures.curve(entries)
    if picture is None:
        return None
    return {
        "entries": entries,
        "picture": picture,
        "quality": _quality(entries),
        "has_points": any(entry.points for entry in entries),
        "has_prediction": any(entry.prediction for entry in entries),
        "has_search": any(entry.has("search") for entry in entries),
    }


def _layers(entries: Sequence[Entry]) -> Json | None:
    if not any(entry.layers or entry.other_kept for entry in entries):
        return None
    shares = any(entry.has("prediction/shares") for entry in entries)
    return {"entries": entries, "picture": pictures.layers(entries), "has_shares": shares}


def _spectra(entries: Sequence[Entry]) -> Json | None:
    groups: list[tuple[Entry, list[Json]]] = []
    for entry in entries:
        drawn = [
            {
                "layer": layer,
                "path": f"page/spectra/{place}",
                "picture": pictures.spectrum(f"spectrum-{entry.number}-{place}", layer),
            }
            for place, layer in enumerate(entry.spectra)
        ]
        if drawn:
            groups.append((entry, drawn))
    if not groups:
        return None
    shown = [item for _, drawn in groups for item in drawn]
    replaced = sum(not row["kept"] for entry, _ in groups for row in entry.layers)
    return {"entries": entries, "groups": groups, "shown": shown, "all_layers": replaced}


def _samples(entries: Sequence[Entry]) -> Json | None:
    shown = [entry for entry in entries if entry.samples]
    return {"entries": shown} if shown else None


def _pictured(entries: Sequence[Entry], draw: Callable[[Sequence[Entry]], Any], what: str) -> Json | None:
    """What a section needs that is one picture and the tables of all files that have something to show."""
    picture = draw(entries)
    shown = [entry for entry in entries if getattr(entry, what)]
    return {"entries": shown, "picture": picture} if picture is not None else None


def _answer(entry: Entry, place: int, sample: Json, side: str) -> Markup:
    """What a network says of a sample, and how sure it is."""
    said = sample[side]
    path = f"page/samples/{place}/{side}"
    name = said.get("name") or entry.show(f"{path}/answer", "count")
    return Markup("{}, {}").format(name, entry.show(f"{path}/confidence", "percent"))
