"""Reports: all that is known about a compressed network, the metadata of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import isclose
from typing import Any

from msgspec.structs import asdict

from ttcompress.errors import CheckpointError
from ttcompress.records.common import Json, listed
from ttcompress.records.decoding import FieldError, check_values, decode, refusing_as, shortened, shown
from ttcompress.records.forms import (
    AccuracyForm,
    ArchitectureForm,
    FinetuningForm,
    MetricForm,
    PreprocessingForm,
    ReportForm,
)
from ttcompress.records.plan import CompressionPlan, KeptParameter, LayerPlan, decode_plan

FILE_SCHEMA = "ttcompress/1"
LIBRARIES = ("transformers", "timm")
"""Kinds of architectures that come with a folder of their library."""
VIEW = "ttcompress.report.text"
"""What shows a report; it is above this package, and so named and looked up only when one is printed."""


@dataclass(frozen=True)
class Architecture:
    """A reference to a constructor: `kind` is zoo, torchvision, transformers, timm or factory.

    `arguments` go to the constructor. For a factory only the base name (`net.py:build`) and the sha256 of its source
    are kept, never a path. For a class of transformers or a network of timm `config` is what config.json says of it,
    `generation` what generation_config.json does, and `library` the version of the library that built it.
    """

    kind: str
    name: str
    arguments: Mapping[str, int] = field(default_factory=dict)
    sha256: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""

    def to_json(self) -> Json:
        """As the file records it."""
        more = {"config": dict(self.config), "generation": dict(self.generation), "library": self.library}
        return {
            "kind": self.kind,
            "name": self.name,
            "arguments": dict(self.arguments),
            "sha256": self.sha256,
            **{key: value for key, value in more.items() if value},
        }


@dataclass(frozen=True)
class Preprocessing:
    """How images become network input: channels-first pixels in [0, 1], minus mean, over std (one value a channel).

    `input_size` is (channels, height, width); `resize` the shorter side before the centre crop, image folders only.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int] | None = None
    resize: int | None = None

    def to_json(self) -> Json:
        """As the file records it."""
        return listed(self)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent over n images, with the 95 % Wilson interval of the first."""

    top1: float
    top5: float
    n: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """What a network is worth by another figure than accuracy, on n of `unit`, with a 95 % interval where known."""

    metric: str
    value: float
    n: int
    unit: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """Accuracy before and after on the same n images, and how often both say the same in percent, where known.

    `lost_interval` is the 95 % confidence interval of the fall of top-1 in points, of the same images, where known.
    """

    dense: Accuracy
    compressed: Accuracy
    agreement: float | None
    data: str
    lost_interval: tuple[float, float] | None = None

    def to_json(self) -> Json:
        """The `accuracy` object of reports; `dense`, `compressed` are top-1, `interval` belongs to `compressed`."""
        return {
            "dense": self.dense.top1,
            "compressed": self.compressed.top1,
            "n": self.compressed.n,
            "interval": list(self.compressed.interval),
            "dense_interval": list(self.dense.interval),
            "lost_interval": None if self.lost_interval is None else list(self.lost_interval),
            "dense_top5": self.dense.top5,
            "compressed_top5": self.compressed.top5,
            "agreement": self.agreement,
            "data": self.data,
        }


def fall(accuracy: Json) -> float:
    """How much worse the compressed network is than the dense one, in the unit of what was measured.

    >>> fall({"dense": 91.7, "compressed": 90.7}), fall({"dense": 20.0, "compressed": 21.0, "lower_is_better": True})
    (1.0, 1.0)
    """
    lost = float(accuracy["dense"] - accuracy["compressed"])
    return -lost if accuracy.get("lower_is_better") else lost


@dataclass(frozen=True)
class Report:
    """Everything that is known about a compressed network; printed, it is the table of `ttcompress report`.

    `tensors_sha256` tells whether a network is still the one that was measured (see `networks.stored`). `file` and
    `file_bytes` are the name and the size on disk of the file that it was read from or written to.
    """

    plan: CompressionPlan
    bytes_before: int
    bytes_after: int
    version: str
    seed: int = 0
    source: Json = field(default_factory=dict)
    architecture: Architecture | None = None
    preprocessing: Preprocessing | None = None
    recipe: Json = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    accuracy: Json | None = None
    calibration: Json | None = None
    search: Sequence[Json] = ()
    finetuning: Json | None = None
    bench: Json | None = None
    prediction: Json | None = None
    tensors_sha256: str | None = None
    file: str | None = None
    file_bytes: int | None = None

    def __str__(self) -> str:
        return str(import_module(VIEW).as_text(self))

    @property
    def compression(self) -> float:
        """Parameters before / after, over all parameters of the network."""
        return self.plan.compression

    @property
    def params_before(self) -> int:
        """Parameters of the dense network, buffers not counted."""
        return self.plan.params_before

    @property
    def params_after(self) -> int:
        """Parameters of the compressed network."""
        return self.plan.params_after

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The layers that were replaced."""
        return self.plan.layers

    @property
    def kept(self) -> tuple[KeptParameter, ...]:
        """The parameters that stayed as they were, with the reasons."""
        return self.plan.kept

    def to_json(self) -> Json:
        """What `report --json` prints: the metadata with the name and size of the file, null where there is none."""
        return {**self.metadata(), "file": self.file, "file_bytes": self.file_bytes}

    def metadata(self) -> Json:
        """What the file itself holds."""
        return {
            "schema": FILE_SCHEMA,
            "version": self.version,
            "seed": self.seed,
            "source": self.source,
            "architecture": self.architecture.to_json() if self.architecture else None,
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
            "recipe": self.recipe,
            "tied": dict(self.tied),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "accuracy": self.accuracy,
            "calibration": self.calibration,
            "search": list(self.search),
            "finetuning": self.finetuning,
            **({"bench": self.bench} if self.bench else {}),
            **({"prediction": self.prediction} if self.prediction else {}),
            **({"tensors_sha256": self.tensors_sha256} if self.tensors_sha256 else {}),
            **self.plan.to_json(),
        }

    @classmethod
    def from_json(cls, data: Json) -> Report:
        """Read metadata back.

        Raises:
            CheckpointError: another major schema, naming the one it needs; a field of a wrong type or value, named by
                its path; or counts that are not those of the layers.
        """
        if str(data.get("schema")).split(".")[0] != FILE_SCHEMA:
            raise CheckpointError(
                f"written in schema {shortened(repr(data.get('schema')))}, this version reads {FILE_SCHEMA!r}: "
                "use the ttcompress version that matches it"
            )
        with refusing_as(CheckpointError):
            check_values(data)
            return _decoded(data)


def _decoded(data: Json) -> Report:
    """The typed parts as records; parts that are only shown stay as they are in the file, once they are checked."""
    form = decode(data, ReportForm)
    architecture = form.architecture and decode(form.architecture, ArchitectureForm, "architecture")
    preprocessing = form.preprocessing and decode(form.preprocessing, PreprocessingForm, "preprocessing")
    plan = decode_plan(data)
    _check_counts(data, form, plan)
    _check_tied(form, plan)
    _check_accuracy(form.accuracy, "accuracy")
    if form.finetuning:
        _check_finetuning(form.finetuning)

    return Report(
        plan=plan,
        bytes_before=form.bytes_before,
        bytes_after=form.bytes_after,
        version=form.version,
        seed=form.seed,
        source=data["source"],
        architecture=Architecture(**asdict(architecture)) if architecture else None,
        preprocessing=Preprocessing(**asdict(preprocessing)) if preprocessing else None,
        recipe=form.recipe,
        tied=form.tied,
        accuracy=form.accuracy,
        calibration=data.get("calibration"),
        search=tuple(data.get("search", ())),
        finetuning=data.get("finetuning"),
        bench=data.get("bench"),
        prediction=data.get("prediction"),
        tensors_sha256=form.tensors_sha256,
        file=form.file,
        file_bytes=form.file_bytes,
    )


def _check_counts(data: Json, form: ReportForm, plan: CompressionPlan) -> None:
    """See that the numbers of parameters are those of the shapes; in a plan, which is edited, they need not be."""
    counts = {layer.fqn: (layer.params_before, layer.params_after) for layer in plan.layers}
    for kept in plan.kept:
        if kept.kind:
            counts[kept.fqn] = (kept.params, kept.params)

    for number, entry in enumerate(data["layers"]):
        before, after = counts[entry["fqn"]]
        _check_count(entry, "params_before", before, f"layers[{number}].")
        _check_count(entry, "params_after", after, f"layers[{number}].")
    _check_count(data, "params_before", plan.params_before)
    _check_count(data, "params_after", plan.params_after)

    stated = form.compression
    if stated is not None and not isclose(stated, plan.compression):
        raise FieldError(f"compression must be {plan.compression}, not {stated}")


def _check_count(data: Json, key: str, count: int, where: str = "") -> None:
    """A count that is stated, which old files need not do, is right."""
    stated = data.get(key, count)
    if stated != count:
        raise FieldError(f"{where}{key} must be {count}, as the shapes have it, not {shown(stated)}")


def _check_tied(form: ReportForm, plan: CompressionPlan) -> None:
    """See that tied parameters have the values of listed ones, and are none themselves."""
    replaced = {layer.weight_name for layer in plan.layers}
    known = replaced | {kept.name for kept in plan.kept}

    for alias, name in form.tied.items():
        if alias in known:
            raise FieldError(f"tied must not name {shown(alias)}, a parameter of its own")
        if name not in known:
            raise FieldError(f"tied[{shown(alias)}] must be a parameter of the network, not {shown(name)}")


def _check_accuracy(accuracy: Json | None, where: str) -> None:
    if accuracy is not None:
        decode(accuracy, MetricForm if "metric" in accuracy else AccuracyForm, where)


def _check_finetuning(finetuning: FinetuningForm) -> None:
    _check_accuracy(finetuning.before, "finetuning.before")
    epochs = [each.epoch for each in finetuning.history]
    if epochs != list(range(len(epochs))):
        raise FieldError(f"finetuning.history must have the epochs from 0 on, not {shown(epochs)}")
    if finetuning.best not in epochs:
        raise FieldError(f"finetuning.best must be an epoch of finetuning.history, not {finetuning.best}")
