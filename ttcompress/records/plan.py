"""Plans: what is to be done to each weight of a network, and why the others stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import cast

from msgspec.structs import asdict

from ttcompress.errors import PlanError, ShapeError
from ttcompress.records.common import Json, compression
from ttcompress.records.decoding import FieldError, check_values, decode, refusing_as, shown, within
from ttcompress.records.forms import (
    CONV_FORMS,
    MOST_PARAMS,
    EmbeddingForm,
    KeptLayerForm,
    LayerForm,
    LinearForm,
    PlanForm,
    WeightForm,
)
from ttcompress.records.layers import (
    ConvSpec,
    EmbeddingSpec,
    Execution,
    LayerSpec,
    LinearSpec,
    WeightSpec,
    checked_execution,
    cores_name,
    executions,
)
from ttcompress.tt.shapes import Mode, Tensorization, tensorize_shape

PLAN_SCHEMA = "ttcompress-plan/1"


WEIGHT_DTYPES = ("float16", "bfloat16", "float32", "float64")


CORE_DTYPES = (*WEIGHT_DTYPES, "int8")
"""Storage types of TT-cores."""


@dataclass(frozen=True)
class LayerPlan:
    """One weight to be replaced: its layer, tensorization and TT-ranks; errors as far as they are known.

    `fqn` is the name of the parameter without `.weight` at its end: that of the layer, for most.
    `predicted_error` bounds the relative Frobenius error from the singular values (with calibration, that of the
    output), `relative_error` is measured. `output_error` is, by stage of a calibrated compression, the relative error
    of the layer's output on held-out images. `execution` is how the layer is to run, one of `executions`. `core_dtype`
    is the storage type of the cores, `int8` with scales among them; none stands for that of the weight.
    """

    fqn: str
    spec: LayerSpec
    tensorization: Tensorization
    tt_ranks: tuple[int, ...]
    weight_dtype: str
    predicted_error: float | None = None
    relative_error: float | None = None
    output_error: Mapping[str, float] | None = None
    note: str = ""
    execution: Execution = Execution.AUTO
    core_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.weight_dtype not in WEIGHT_DTYPES:
            types = ", ".join(WEIGHT_DTYPES)
            raise ShapeError(f"{self.fqn}: weight_dtype must be one of {types}, not {self.weight_dtype!r}")
        try:
            execution = checked_execution(self.execution, self.executions)
        except ShapeError as error:
            raise ShapeError(f"{self.fqn}: {error}") from error
        # Files and recipes state it as a text.
        object.__setattr__(self, "execution", execution)
        if self.core_dtype not in (None, *CORE_DTYPES):
            types = ", ".join(CORE_DTYPES)
            raise ShapeError(f"{self.fqn}: core_dtype must be one of {types}, not {self.core_dtype!r}")

    @property
    def weight_name(self) -> str:
        """Of the parameter in the dense network."""
        return weight_name(self.fqn, self.spec.parameter)

    @property
    def module_fqn(self) -> str:
        """Of the module that has the parameter."""
        return self.weight_name.rpartition(".")[0]

    @property
    def cores_fqn(self) -> str:
        """Of the list of the cores in the compressed network."""
        owner = self.module_fqn
        name = cores_name(self.spec.parameter)
        return f"{owner}.{name}" if owner else name

    @property
    def params_before(self) -> int:
        """Entries of the dense weight."""
        return prod(self.spec.weight_shape)

    @property
    def params_after(self) -> int:
        """Entries of the TT-cores."""
        return self.tensorization.num_params(self.tt_ranks)

    @property
    def executions(self) -> tuple[Execution, ...]:
        """The executions that this layer has (see `records.layers.executions`)."""
        return executions(self.spec, self.tensorization)

    @property
    def core_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the TT-cores by their names in a file."""
        shapes = self.tensorization.stored_shapes(self.tt_ranks)
        return {f"{self.cores_fqn}.{k}": shape for k, shape in enumerate(shapes)}

    @property
    def stored_dtype(self) -> str:
        """Storage type of the cores."""
        return self.core_dtype or self.weight_dtype

    @property
    def scale_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the scales of int8 cores by their names in a file; none for other types."""
        if self.stored_dtype != "int8":
            return {}
        scales = self.cores_fqn.removesuffix("cores") + "core_scales"
        lead = (self.spec.groups,) if self.spec.groups > 1 else ()
        return {f"{scales}.{k}": (*lead, rank) for k, rank in enumerate(self.tt_ranks[1:])}

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that a file holds of the weight, by name."""
        return {**self.core_shapes, **self.scale_shapes}

    def to_json(self) -> Json:
        """The `layers` entry of plans, reports and files."""
        return {
            "fqn": self.fqn,
            "kind": self.spec.kind,
            "format": self.tensorization.format,
            "out_modes": list(self.tensorization.out_modes),
            "in_modes": list(self.tensorization.in_modes),
            "window_modes": list(self.tensorization.window_modes),
            "tt_ranks": list(self.tt_ranks),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "predicted_error": self.predicted_error,
            "relative_error": self.relative_error,
            "output_error": dict(self.output_error) if self.output_error else None,
            "weight_dtype": self.weight_dtype,
            "spec": self.spec.to_json(),
            **({"note": self.note} if self.note else {}),
            **({"execution": self.execution.value} if self.execution != Execution.AUTO else {}),
            **({"core_dtype": self.core_dtype} if self.core_dtype else {}),
        }

    @classmethod
    def from_json(cls, data: Json, where: str = "") -> LayerPlan:
        """Read an entry back; parameter counts are recomputed.

        Args:
            where: the path of the entry, for messages.

        Raises:
            FieldError: a field of a wrong type or value, modes that do not make the weight, or TT-ranks that do not
                fit them.
        """
        form = decode(data, LayerForm, where)
        spec = _spec(form, where)

        with within(where or form.fqn):
            tensorization = _tensorization(form, spec)
            layer = cls(
                form.fqn,
                spec,
                tensorization,
                tensorization.expand_ranks(form.tt_ranks),
                form.weight_dtype,
                predicted_error=form.predicted_error,
                relative_error=form.relative_error,
                output_error=form.output_error or None,
                note=form.note,
                # Checked when the layer is made, which names it.
                execution=cast("Execution", form.execution),
                core_dtype=form.core_dtype,
            )

        if max(layer.params_before, layer.params_after) > MOST_PARAMS:
            raise FieldError(f"{where or form.fqn} must have at most 2^53 parameters")
        return layer


def weight_name(fqn: str, parameter: str) -> str:
    """The name of a parameter whose module calls it so, from that by which it is listed."""
    return f"{fqn}.weight" if parameter == "weight" else fqn


def _spec(form: LayerForm, where: str) -> LayerSpec:
    if form.kind == "weight":
        given = decode(form.spec, WeightForm, f"{where}.spec")
        if given.parameter not in ("weight", form.fqn.rpartition(".")[2]):
            raise FieldError(
                f"{where}.spec.parameter must be the end of its fqn, not {shown(given.parameter)}"
            )
        return WeightSpec(tuple(given.shape), given.parameter, given.transposed)
    if form.kind == "linear":
        return LinearSpec(**asdict(decode(form.spec, LinearForm, f"{where}.spec")))
    if form.kind == "embedding":
        return EmbeddingSpec(**asdict(decode(form.spec, EmbeddingForm, f"{where}.spec")))
    return _conv_spec(form, where)


def _conv_spec(form: LayerForm, where: str) -> ConvSpec:
    dims = int(form.kind[-2])
    transposed = form.kind.startswith("conv_transpose")
    given: Json = asdict(decode(form.spec, CONV_FORMS[dims], f"{where}.spec"))
    if not transposed and any(given["output_padding"]):
        raise FieldError(f"{where}.spec.output_padding belongs to transposed convolutions")
    if transposed and (given["padding_mode"] != "zeros" or isinstance(given["padding"], str)):
        raise FieldError(f"{where}.spec.padding of a transposed convolution must be numbers of zeros")
    groups = given["groups"]
    if given["in_channels"] % groups or given["out_channels"] % groups:
        raise FieldError(f"{where}.spec.groups must divide in_channels and out_channels, not {groups}")
    return ConvSpec(**given, transposed=transposed)


def _tensorization(form: LayerForm, spec: LayerSpec) -> Tensorization:
    factors = (form.out_modes, form.in_modes, form.window_modes)
    if len(set(map(len, factors))) != 1:
        raise ShapeError("out_modes, in_modes and window_modes differ in length")

    modes = tuple(Mode(*mode) for mode in zip(*factors, strict=True))
    tensorization = Tensorization(form.format, modes, spec.groups)
    _check_modes(form.fqn, spec, tensorization)
    return tensorization


def _check_modes(fqn: str, spec: LayerSpec, stated: Tensorization) -> None:
    """A format has one tensorization of a weight, but for the factors of `matrix`."""
    out_modes: list[int] | None = None
    in_modes: list[int] | None = None
    if stated.format == "matrix":
        pairs = [mode for mode in stated.modes if mode.window == 1]
        out_modes = [mode.out for mode in pairs]
        in_modes = [mode.inp for mode in pairs]

    try:
        proper = tensorize_shape(stated.format, spec.view_shape, out_modes, in_modes, spec.groups)
    except ShapeError as error:
        raise ShapeError(f"{fqn}: {error}") from error
    if proper != stated:
        modes = [tuple(mode) for mode in stated.modes]
        raise ShapeError(
            f"{fqn}: format {stated.format} of this weight has no (out, in, window) modes {modes}"
        )


@dataclass(frozen=True)
class KeptParameter:
    """A parameter that stays as it is, and why; `kind` is that of its weight, where it is one.

    It is `fixed` where no choice of candidates could replace it.
    """

    name: str
    params: int
    reason: str
    kind: str = ""
    fixed: bool = False

    @property
    def fqn(self) -> str:
        """The name under which plans list it."""
        return self.name.removesuffix(".weight")

    def to_json(self) -> Json:
        """A `layers` entry where this is the weight of a layer, else a `kept_parameters` entry."""
        if not self.kind:
            return {"name": self.name, "params": self.params, "reason": self.reason, "kind": ""}
        own_name = self.name.rpartition(".")[2]
        return {
            "fqn": self.fqn,
            "kind": self.kind,
            "kept": self.reason,
            "params_before": self.params,
            "params_after": self.params,
            **({} if own_name == "weight" else {"parameter": own_name}),
            **({"fixed": True} if self.fixed else {}),
        }

    @classmethod
    def from_json(cls, data: Json, where: str = "") -> KeptParameter:
        """Read a `layers` entry back; `where` is its path, for messages.

        Raises:
            FieldError: a field of a wrong type or value.
        """
        form = decode(data, KeptLayerForm, where)
        name = weight_name(form.fqn, form.parameter)
        return cls(name, form.params_before, form.kept, form.kind, form.fixed)


@dataclass(frozen=True)
class CompressionPlan:
    """What is to be done to a network, and every parameter of it, so that the totals add up.

    `multiply_adds` of one input before and after and `latency` are known where they were the target.
    """

    layers: tuple[LayerPlan, ...]
    kept: tuple[KeptParameter, ...]
    notes: tuple[str, ...] = ()
    multiply_adds: tuple[int, int] | None = None
    latency: Json | None = None

    @property
    def params_before(self) -> int:
        """Parameters of the dense network, buffers not counted."""
        return sum(layer.params_before for layer in self.layers) + sum(kept.params for kept in self.kept)

    @property
    def params_after(self) -> int:
        """Parameters of the compressed network."""
        return sum(layer.params_after for layer in self.layers) + sum(kept.params for kept in self.kept)

    @property
    def params_able(self) -> int:
        """Parameters of the dense network that could take TT form, whether they are to or not."""
        able = sum(kept.params for kept in self.kept if kept.kind and not kept.fixed)
        return able + sum(layer.params_before for layer in self.layers)

    @property
    def compression(self) -> float:
        """Over all parameters of the network."""
        return compression(self.params_before, self.params_after)

    def with_layers(self, layers: Sequence[LayerPlan]) -> CompressionPlan:
        """The same plan with its layers replaced, as after decomposition."""
        return replace(self, layers=tuple(layers))

    def to_json(self) -> Json:
        """The keys that plans and reports share."""
        replaced = [layer.to_json() for layer in self.layers]
        weights = [kept.to_json() for kept in self.kept if kept.kind]
        others = [kept.to_json() for kept in self.kept if not kept.kind]
        return {
            "compression": self.compression,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "layers": replaced + weights,
            "kept_parameters": others,
            "notes": list(self.notes),
            **({"multiply_adds": list(self.multiply_adds)} if self.multiply_adds else {}),
            **({"latency": self.latency} if self.latency else {}),
        }

    @classmethod
    def from_json(cls, data: Json) -> CompressionPlan:
        """Read a plan, edited or not; parameter counts are recomputed.

        Raises:
            PlanError: a field of a wrong type or value, named by its path; modes and TT-ranks that do not fit their
                layer; or a parameter that is named twice.
        """
        with refusing_as(PlanError):
            check_values(data)
            return decode_plan(data)


def decode_plan(data: Json) -> CompressionPlan:
    """What plans and files share.

    Raises:
        FieldError: see `CompressionPlan.from_json`.
    """
    form = decode(data, PlanForm)
    layers: list[LayerPlan] = []
    kept: list[KeptParameter] = []
    for number, entry in enumerate(form.layers):
        where = f"layers[{number}]"
        if "kept" in entry:
            kept.append(KeptParameter.from_json(entry, where))
        else:
            layers.append(LayerPlan.from_json(entry, where))
    kept += [KeptParameter(each.name, each.params, each.reason) for each in form.kept_parameters]

    plan = CompressionPlan(
        tuple(layers), tuple(kept), tuple(form.notes), form.multiply_adds, data.get("latency")
    )
    _check_parameters(plan)
    return plan


def _check_parameters(plan: CompressionPlan) -> None:
    """See that every parameter is named once, and how many there are."""
    names = [layer.weight_name for layer in plan.layers] + [kept.name for kept in plan.kept]
    named: set[str] = set()
    for name in names:
        if name in named:
            raise FieldError(f"layers and kept_parameters must name {shown(name)} once, not twice")
        named.add(name)

    # Compression divides by the number after.
    if plan.params_after == 0 or max(plan.params_before, plan.params_after) > MOST_PARAMS:
        raise FieldError("layers and kept_parameters must have from 1 to 2^53 parameters")
