"""The JSON of files and plans as typed forms (docs/format.md); keys that they do not name are ignored.

Where a key has a default here, older files may lack it.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

from msgspec import Meta, Struct

from ttcompress.records.common import Json
from ttcompress.records.layers import CONV_KINDS


def one_of(*words: str) -> Meta:
    """One of these texts."""
    return Meta(pattern=rf"\A({'|'.join(words)})\Z")


LARGEST_SIZE = 2**40
MOST_PARAMS = 2**53
"""JSON numbers are exact up to here in every reader."""
Size = Annotated[int, Meta(ge=1, le=LARGEST_SIZE)]
"""Of a dimension, a mode, a TT-rank."""
MOST_PIXELS = 2**26
MOST_DIMENSIONS = 16
"""Of a tensor that is decomposed."""
Side = Annotated[int, Meta(ge=1, le=2**13)]
"""Of an image that is still held in memory."""
FromZero = Annotated[int, Meta(ge=0, le=LARGEST_SIZE)]
Count = Annotated[int, Meta(ge=0, le=MOST_PARAMS)]
"""Of parameters, bytes or multiply-adds."""
CountFromOne = Annotated[int, Meta(ge=1, le=MOST_PARAMS)]
Measured = Annotated[float, Meta(ge=0)]
"""An error, a time or a ratio."""
Percent = Annotated[float, Meta(ge=0, le=100)]
Interval = tuple[Percent, Percent]
Kind = Annotated[str, one_of("linear", "embedding", *CONV_KINDS, "weight")]
"""Of a layer."""


# --------------------------------------------------------------------------------------------------------------- layers


class LinearForm(Struct, forbid_unknown_fields=True):
    """The `spec` of a Linear."""

    in_features: Size
    out_features: Size
    bias: bool


class EmbeddingForm(Struct, forbid_unknown_fields=True):
    """The `spec` of an Embedding."""

    num_embeddings: Size
    embedding_dim: Size
    padding_idx: FromZero | None = None
    scale_grad_by_freq: bool = False

    def __post_init__(self) -> None:
        if self.padding_idx is not None and self.padding_idx >= self.num_embeddings:
            raise ValueError("padding_idx must be below num_embeddings")


class ConvForm(Struct, forbid_unknown_fields=True, kw_only=True):
    """What the `spec` of all convolutions has."""

    in_channels: Size
    out_channels: Size
    padding_mode: Annotated[str, one_of("zeros", "reflect", "replicate", "circular")] = "zeros"
    bias: bool = True
    groups: Size = 1


NamedPadding = Annotated[str, one_of("same", "valid")]


class ConvForm1d(ConvForm, forbid_unknown_fields=True, kw_only=True):
    """The `spec` of a convolution in one dimension."""

    kernel_size: tuple[Size]
    stride: tuple[Size] = (1,)
    padding: tuple[FromZero] | NamedPadding = (0,)
    dilation: tuple[Size] = (1,)
    output_padding: tuple[FromZero] = (0,)


class ConvForm2d(ConvForm, forbid_unknown_fields=True, kw_only=True):
    """In two dimensions."""

    kernel_size: tuple[Size, Size]
    stride: tuple[Size, Size] = (1, 1)
    padding: tuple[FromZero, FromZero] | NamedPadding = (0, 0)
    dilation: tuple[Size, Size] = (1, 1)
    output_padding: tuple[FromZero, FromZero] = (0, 0)


class ConvForm3d(ConvForm, forbid_unknown_fields=True, kw_only=True):
    """In three dimensions."""

    kernel_size: tuple[Size, Size, Size]
    stride: tuple[Size, Size, Size] = (1, 1, 1)
    padding: tuple[FromZero, FromZero, FromZero] | NamedPadding = (0, 0, 0)
    dilation: tuple[Size, Size, Size] = (1, 1, 1)
    output_padding: tuple[FromZero, FromZero, FromZero] = (0, 0, 0)


CONV_FORMS: dict[int, type[ConvForm]] = {1: ConvForm1d, 2: ConvForm2d, 3: ConvForm3d}
"""By dimensions of the window."""


class WeightForm(Struct, forbid_unknown_fields=True):
    """The `spec` of a parameter of any other module."""

    shape: Annotated[list[Size], Meta(min_length=2, max_length=MOST_DIMENSIONS)]
    parameter: Annotated[str, Meta(pattern=r"\A[^.]+\Z")] = "weight"
    transposed: bool = False


class LayerForm(Struct):
    """An entry of `layers` that is replaced."""

    fqn: str
    kind: Kind
    format: str
    out_modes: list[Size]
    in_modes: list[Size]
    window_modes: list[Size]
    tt_ranks: list[Size]
    weight_dtype: str
    spec: Json
    params_before: Count | None = None
    params_after: Count | None = None
    predicted_error: Measured | None = None
    relative_error: Measured | None = None
    output_error: dict[str, Measured] | None = None
    note: str = ""
    execution: str = "auto"
    core_dtype: str | None = None


class KeptLayerForm(Struct):
    """An entry of `layers` that stays."""

    fqn: str
    kind: Kind
    kept: str
    params_before: Count
    parameter: str = "weight"
    params_after: Count | None = None
    fixed: bool = False


class KeptParameterForm(Struct):
    """An entry of `kept_parameters`."""

    name: str
    params: Count
    reason: str


class LatencyForm(Struct):
    """The `latency` that was the target."""

    dense: Measured
    compressed: Measured
    ratio: Measured
    device: str
    asked: Measured = 0.0


class PlanForm(Struct):
    """What plans and files share; `layers` is a mixture of the forms above."""

    layers: list[Json]
    kept_parameters: list[KeptParameterForm]
    notes: list[str] = []
    multiply_adds: tuple[CountFromOne, CountFromOne] | None = None
    latency: LatencyForm | None = None


# ------------------------------------------------------------------------------------------------- measured and trained


class AccuracyForm(Struct):
    """The `accuracy` of a classifier."""

    dense: Percent | None
    compressed: Percent
    n: CountFromOne
    interval: Interval
    dense_top5: Percent | None
    compressed_top5: Percent
    agreement: Percent | None
    data: str
    dense_interval: Interval | None = None
    lost_interval: tuple[float, float] | None = None


class MetricForm(Struct):
    """The `accuracy` by another figure than accuracy: of texts, or a user's own.

    `unit` is what `n` counts; `beside` holds further figures of the compressed network by their names.
    """

    metric: str
    dense: float | None
    compressed: float
    lower_is_better: bool = False
    n: CountFromOne | None = None
    unit: str = ""
    interval: tuple[float, float] | None = None
    dense_interval: tuple[float, float] | None = None
    lost_interval: tuple[float, float] | None = None
    data: str = ""
    beside: dict[str, float] = {}


class StageForm(Struct):
    """One of the `stages` of a calibration."""

    stage: str
    error: Measured | None
    kept: bool


class CalibrationForm(Struct):
    """What `calibration` holds."""

    data: str
    images: Count
    held_out: Count
    effort: str
    stages: list[StageForm]
    unit: str = "images"
    at_a_time: CountFromOne | None = None


class PointForm(Struct):
    """A point of `search`."""

    ratio: Measured
    compression: Measured
    accuracy: float
    drop: float


class EpochForm(Struct):
    """An epoch of a training's `history`; the start has neither loss nor training accuracy."""

    epoch: FromZero
    val: Percent
    loss: float | None = None
    train: Percent | None = None


class FinetuningForm(Struct):
    """What `finetuning` holds."""

    train: str
    val: str
    teacher: str | None
    options: Json
    start_counts: bool
    best: FromZero
    before: Json | None
    history: Annotated[list[EpochForm], Meta(min_length=1)]
    precision: str | None = None


class SideForm(Struct):
    """One network in a batch of `bench`."""

    median: Measured
    p90: Measured
    throughput: Measured
    memory_format: str
    multiply_adds: Count
    peak_memory: Count | None = None
    file_bytes: Count | None = None


class WorkForm(Struct):
    """Multiply-adds of a layer of `bench`."""

    dense: Count
    compressed: Count


class LayerTimeForm(Struct):
    """A layer in a batch of `bench`."""

    fqn: str
    dense: Measured
    compressed: Measured
    time_ratio: Measured
    multiply_adds: WorkForm | None = None


class BatchForm(Struct):
    """A batch of `bench`."""

    batch: Size
    time_ratio: Measured
    dense: SideForm | None = None
    compressed: SideForm | None = None
    layers: list[LayerTimeForm] = []
    memory_ratio: Measured | None = None


class BenchForm(Struct):
    """What `bench` holds."""

    what: str
    device: str
    batches: list[BatchForm]
    file: str = ""
    torch: str = ""
    dtype: str = ""
    input_size: list[Size] = []
    runtime: str = "torch"
    layers: str = "tt"


class PredictionForm(Struct):
    """What `prediction` holds: pairs of compression and relative error, and the share of each layer in the error."""

    by: Annotated[str, one_of("weights", "outputs")]
    points: list[tuple[Measured, Measured]]
    shares: dict[str, Annotated[float, Meta(ge=0, le=1)]] = {}


# --------------------------------------------------------------------------------------------------------------- report


class SourceForm(Struct):
    """The checkpoint that a file was made from; empty if the network came from memory."""

    file: str = ""
    sha256: str = ""


class ArchitectureForm(Struct):
    """What `architecture` holds."""

    kind: Annotated[str, one_of("zoo", "torchvision", "factory", "transformers", "timm")]
    name: str
    arguments: dict[str, FromZero]
    sha256: str
    config: Json = {}
    generation: Json = {}
    library: str = ""


class PreprocessingForm(Struct):
    """What `preprocessing` holds."""

    mean: Annotated[tuple[float, ...], Meta(min_length=1)]
    std: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)]
    input_size: tuple[Size, Size, Size] | None = None
    resize: Side | None = None

    def __post_init__(self) -> None:
        if self.input_size and prod(self.input_size) > MOST_PIXELS:
            raise ValueError("input_size must be at most 2^26 numbers")
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std must have the same length")


class ReportForm(Struct):
    """What a file holds beside its plan."""

    version: str
    seed: Annotated[int, Meta(ge=0)]
    source: SourceForm
    recipe: dict[str, Any]
    tied: dict[str, str]
    bytes_before: Count
    bytes_after: Count
    accuracy: Json | None
    architecture: Json | None = None
    preprocessing: Json | None = None
    calibration: CalibrationForm | None = None
    search: list[PointForm] = []
    finetuning: FinetuningForm | None = None
    bench: BenchForm | None = None
    prediction: PredictionForm | None = None
    tensors_sha256: str | None = None
    params_before: Count | None = None
    params_after: Count | None = None
    compression: Measured | None = None
    file: str | None = None
    file_bytes: Count | None = None


class StoredForm(Struct):
    """What a file says of its tensors; older ones say nothing, and hold nothing that is not finite."""

    layout: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""
    non_finite: list[str] = []
