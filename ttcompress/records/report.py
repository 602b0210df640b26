"""Reports: all that is known about a compressed network, the metadata of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ttcompress.errors import CheckpointError
from ttcompress.records.common import Json, listed, tupled
from ttcompress.records.plan import CompressionPlan

FILE_SCHEMA = "ttcompress/1"


@dataclass(frozen=True)
class Architecture:
    """A reference to a constructor: `kind` is zoo, torchvision or factory; `arguments` go to the constructor.

    For a factory only the base name (`net.py:build`) and the sha256 of its source are kept, never a path.
    """

    kind: str
    name: str
    arguments: Mapping[str, int] = field(default_factory=dict)
    sha256: str = ""

    def to_json(self) -> Json:
        """As the file records it."""
        return {"kind": self.kind, "name": self.name, "arguments": dict(self.arguments), "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: Json) -> Architecture:
        """Read it back."""
        return cls(data["kind"], data["name"], data["arguments"], data["sha256"])


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

    @classmethod
    def from_json(cls, data: Json) -> Preprocessing:
        """Read it back."""
        return cls(**tupled(data))


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 accuracy in percent over n images, with the 95 % Wilson interval of the first."""

    top1: float
    top5: float
    n: int
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Accuracy before and after on the same n images, and how often both say the same in percent, where known."""

    dense: Accuracy
    compressed: Accuracy
    agreement: float | None
    data: str

    def to_json(self) -> Json:
        """The `accuracy` object of reports; `dense`, `compressed` are top-1, `interval` belongs to `compressed`."""
        return {
            "dense": self.dense.top1,
            "compressed": self.compressed.top1,
            "n": self.compressed.n,
            "interval": list(self.compressed.interval),
            "dense_interval": list(self.dense.interval),
            "dense_top5": self.dense.top5,
            "compressed_top5": self.compressed.top5,
            "agreement": self.agreement,
            "data": self.data,
        }


@dataclass(frozen=True)
class Report:
    """Everything that is known about a compressed network; the `ttcompress` metadata of its file."""

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

    def to_json(self) -> Json:
        """Canonical content of the file's metadata and of `report --json`."""
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
            **self.plan.to_json(),
        }

    @classmethod
    def from_json(cls, data: Json) -> Report:
        """Read metadata back.

        Raises:
            CheckpointError: another major schema, naming the one it needs, or missing keys.
        """
        if str(data.get("schema")).split(".")[0] != FILE_SCHEMA:
            raise CheckpointError(
                f"written in schema {data.get('schema')!r}, this version reads {FILE_SCHEMA!r}: "
                "use the ttcompress version that matches it"
            )
        architecture, preprocessing = data.get("architecture"), data.get("preprocessing")
        try:
            return cls(
                plan=CompressionPlan.from_json(data),
                bytes_before=data["bytes_before"],
                bytes_after=data["bytes_after"],
                version=data["version"],
                seed=data["seed"],
                source=data["source"],
                architecture=Architecture.from_json(architecture) if architecture else None,
                preprocessing=Preprocessing.from_json(preprocessing) if preprocessing else None,
                recipe=data["recipe"],
                tied=data["tied"],
                accuracy=data["accuracy"],
                calibration=data.get("calibration"),
                search=tuple(data.get("search", ())),
                finetuning=data.get("finetuning"),
                bench=data.get("bench"),
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"damaged metadata: {type(error).__name__}: {error}") from error
