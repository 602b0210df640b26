"""One network at several sizes: statistics and spectra once, a file a point, a table and a page of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ttcompress.commands.compress import check_repeats, compressor_for, inputs_to_prove_with, write_compressed
from ttcompress.commands.compressor import Compressor
from ttcompress.commands.inputs import Inputs, measured_images, open_inputs
from ttcompress.commands.outputs import check_network_output, default_name, library_folder
from ttcompress.commands.reports import report_of
from ttcompress.data.sets import Images
from ttcompress.errors import CheckpointError, DataError, PlanError, TTCompressError
from ttcompress.files.compressed import stored_report
from ttcompress.files.model_folder import ModelFolder
from ttcompress.files.output import alone
from ttcompress.files.shards import stored_bytes
from ttcompress.files.tensors import tensor_bytes
from ttcompress.networks.opening import Network, open_dense
from ttcompress.networks.stored import stored_sha256, stored_tensors
from ttcompress.recipe import TARGETS, Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.extras import Extras
from ttcompress.records.report import Report, fall
from ttcompress.runtime import fixed_threads, seeded
from ttcompress.settings import Settings


@dataclass(frozen=True)
class SweepPoint:
    """A network at one size: what was asked for, what came of it, and where it is.

    `module` is the compressed network where the sweep was over a module in memory, `file` its file where it was over a
    checkpoint. `smallest` is whether it is the smallest of all points whose drop is allowed.
    """

    ratio: float
    format: str
    report: Report
    module: nn.Module | None = None
    file: Path | None = None
    smallest: bool = False

    @property
    def drop(self) -> float | None:
        """What is lost of accuracy in points, or of another figure in its unit; None where that is not known."""
        accuracy = self.report.accuracy or {}
        is_known = accuracy.get("dense") is not None and accuracy.get("compressed") is not None
        return fall(accuracy) if is_known else None

    def to_json(self) -> Json:
        """What `sweep --json` prints of it."""
        accuracy = self.report.accuracy or {}
        stages = (self.report.calibration or {}).get("stages", ())
        kept = [stage["error"] for stage in stages if stage["kept"]]
        return {
            "ratio": self.ratio,
            "format": self.format,
            "file": self.report.file,
            "file_bytes": self.report.file_bytes,
            "compression": self.report.compression,
            "params_after": self.report.params_after,
            "bytes_after": self.report.bytes_after,
            "layers": len(self.report.layers),
            "accuracy": accuracy.get("compressed"),
            "interval": accuracy.get("interval"),
            "drop": self.drop,
            "drop_interval": accuracy.get("lost_interval"),
            "agreement": accuracy.get("agreement"),
            "error": kept[-1] if kept else None,
            "smallest": self.smallest,
        }


def marked(points: Sequence[SweepPoint], max_drop: float | None) -> list[SweepPoint]:
    """The points with the smallest network marked that loses no more than is allowed."""
    allowed = [
        point
        for point in points
        if max_drop is not None and point.drop is not None and point.drop <= max_drop
    ]
    best = min(allowed, key=lambda point: point.report.params_after, default=None)
    return [replace(point, smallest=point is best) for point in points]


@alone
def sweep_file(
    source: Path,
    folder: Path,
    recipe: Recipe,
    ratios: Sequence[float],
    formats: Sequence[str] = (),
    *,
    force: bool = False,
    progress: Progress | None = None,
    extras: Extras | None = None,
) -> list[SweepPoint]:
    """Compress a checkpoint to several sizes, a file each in a folder, each the one that `compress` would write.

    Points whose file is there already, as the same sweep wrote it, are not made again. `extras` gets the spectra and
    samples of the first point, if it is made now.

    Raises:
        TTCompressError: whatever does not fit, in one line.
    """
    if recipe.max_drop is not None and recipe.data is None:
        raise DataError("--max-drop marks by accuracy: name labelled images with --data")
    wanted = _wanted(recipe, ratios, formats)
    _check_folder(folder)
    measured = measured_images(recipe)
    origin = library_folder(source, recipe.arch)
    files = {key: folder / _file_name(source, origin, *key, several=bool(formats)) for key in wanted}
    done = {key: _finished(source, files[key], wanted[key], measured, force) for key in wanted}

    missing = [key for key in wanted if done[key] is None]
    for key in missing:
        if files[key].exists():
            check_network_output(files[key], force, origin)
    if missing:
        settings = Settings.of(wanted[missing[0]])
        network = open_dense(source, recipe.arch, settings.key)
        # Every measurement fills these in; those of the first point are shown.
        latest = Extras()
        network, inputs = open_inputs(network, settings, progress, latest)
        sweep = _Sweep(network, inputs, progress)
        for number, key in enumerate(missing):
            with _saying_what_is_kept(folder, len(wanted) - len(missing) + number, len(wanted)):
                made = sweep.point(Settings.of(wanted[key]), latest)
                example = inputs_to_prove_with(made.network, Settings.of(wanted[key]), inputs)
                folder.mkdir(exist_ok=True)
                write_compressed(files[key], made.network, made.report, recipe.arch, example, origin)
            done[key] = made.report
            if extras is not None and key == next(iter(wanted)):
                extras.spectra, extras.samples, extras.images = latest.spectra, latest.samples, latest.images

    points = [_point_of(*key, done[key], files[key]) for key in wanted]
    return marked(points, recipe.max_drop)


def sweep_network(
    network: Network,
    recipe: Recipe,
    ratios: Sequence[float],
    formats: Sequence[str],
    inputs: Inputs,
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """The same of a network in memory, which stays as it is.

    Raises:
        TTCompressError: whatever does not fit, in one line.
    """
    wanted = _wanted(recipe, ratios, formats)
    sweep = _Sweep(network, inputs, progress)
    points = []
    for (ratio, form), own in wanted.items():
        made = sweep.point(Settings.of(own))
        points.append(SweepPoint(ratio, form, made.report, made.network.model))
    return marked(points, recipe.max_drop)


@contextmanager
def _saying_what_is_kept(folder: Path, done: int, count: int) -> Iterator[None]:
    """Whoever interrupts a sweep is told how to go on with it."""
    try:
        yield
    except KeyboardInterrupt:
        if not done:
            raise
        kept = f"{done} of {count} points are in {folder}"
        raise KeyboardInterrupt(f"interrupted; {kept}, the same command once more makes the others") from None


Key = tuple[float, str]
"""A point: its ratio and format."""


def _wanted(recipe: Recipe, ratios: Sequence[float], formats: Sequence[str]) -> dict[Key, Recipe]:
    """The recipe of each point, mildest first."""
    if recipe.is_weights_only:
        raise PlanError("sweep needs a network: leave out --arch none")
    stated = recipe.given(*(name for group in TARGETS for name in group))
    if stated:
        raise PlanError(f"sweep goes by --ratios: leave out {', '.join(stated)}")

    chosen = formats or (recipe.format or "auto",)
    return {
        (ratio, form): replace(
            recipe, ratio=ratio, format=recipe.format if form == "auto" else form, max_drop=None
        )
        for form in dict.fromkeys(chosen)
        for ratio in sorted(set(ratios))
    }


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder")
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder}: {folder.parent} is not an existing folder")


def _file_name(source: Path, origin: ModelFolder | None, ratio: float, form: str, several: bool) -> str:
    return default_name(source, origin, f"-{ratio:g}x{f'-{form}' if several else ''}").name


def _finished(
    source: Path, file: Path, recipe: Recipe, measured: Images | None, force: bool
) -> Report | None:
    """The report of a point that the same sweep has made before, None where there is no file.

    Raises:
        CheckpointError: there is one that something else made, and nobody said to replace it.
    """
    if not file.exists():
        return None
    try:
        check_repeats(source, file, recipe)
        report = stored_report(file)
        accuracy = report.accuracy or {}
        found = (accuracy.get("data"), accuracy.get("n"))
        if measured is not None and found != (measured.name, len(measured)):
            raise CheckpointError(
                f"{file}: its accuracy was measured on something else; repeat the command as it was"
            )
        return report
    except TTCompressError as error:
        if force:
            return None
        raise CheckpointError(f"{error}; or --force to replace it") from error


def _point_of(ratio: float, form: str, report: Report | None, file: Path) -> SweepPoint:
    assert report is not None
    shown = replace(report, file=file.name, file_bytes=stored_bytes(file))
    return SweepPoint(ratio, form, shown, file=file)


@dataclass(frozen=True)
class _Made:
    network: Network
    report: Report


class _Sweep:
    """What all points share: the dense network's answers, statistics, and by format the spectra."""

    def __init__(self, network: Network, inputs: Inputs, progress: Progress | None) -> None:
        self._network, self._inputs, self._progress = network, inputs, progress
        self._before = tensor_bytes(stored_tensors(network.model, network.tensors))
        self._compressors: dict[str, Compressor] = {}
        self._dense: Any = None

    def point(self, settings: Settings, extras: Extras | None = None) -> _Made:
        """Compress a copy to the size that these settings ask for, and measure it."""
        metric = self._inputs.metric
        with seeded(settings.seed):
            if metric and self._dense is None:
                self._dense = metric.measure(self._network.model)
            compressor = self._compressor(settings)
            with fixed_threads():
                plan = compressor.plan(settings.recipe)
                if extras is not None:
                    extras.spectra = compressor.spectra(plan)
                done = compressor.apply(plan)
            accuracy = metric.summary(self._dense, metric.measure(done.model)) if metric else None

        network = replace(self._network, model=done.model)
        stored = stored_tensors(network.model, network.tensors, done.plan)
        report = report_of(network, done, settings, (self._before, tensor_bytes(stored)), accuracy)
        return _Made(network, replace(report, tensors_sha256=stored_sha256(stored)))

    def _compressor(self, settings: Settings) -> Compressor:
        known = self._compressors.get(settings.format)
        if known is None:
            first = next(iter(self._compressors.values()), None)
            known = compressor_for(self._network, settings, None, self._inputs, self._progress)
            if first is not None:
                known = known.sharing(first)
            self._compressors[settings.format] = known
        return known
