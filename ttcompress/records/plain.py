"""What a file of a plain network says beside its tensors: which layers stand for each compressed one (docs/format.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ttcompress.errors import CheckpointError
from ttcompress.records.common import Json
from ttcompress.records.decoding import FieldError, check_values, decode, refusing_as
from ttcompress.records.forms import (
    CONV_FORMS,
    ArchitectureForm,
    EmbeddingForm,
    LinearForm,
    PreprocessingForm,
    Size,
    SourceForm,
    one_of,
)
from ttcompress.records.report import Architecture, Preprocessing


class ContractedForm(Struct, forbid_unknown_fields=True):
    """The arguments of a ContractedLinear."""

    in_features: Size
    out_features: Size
    bias: bool
    groups: Annotated[list[tuple[Size, Size, Size, Size]], Meta(min_length=2, max_length=64)]
    from_last: bool


ARGUMENTS: Mapping[str, type[Struct]] = {
    "Linear": LinearForm,
    "Embedding": EmbeddingForm,
    **{f"Conv{dims}d": form for dims, form in CONV_FORMS.items()},
    **{f"ConvTranspose{dims}d": form for dims, form in CONV_FORMS.items()},
    "ContractedLinear": ContractedForm,
}
"""What each class takes: those of torch.nn have the arguments of torch."""


class StockLayerForm(Struct, rename={"name": "class"}):
    """One of the layers that stand for a compressed one."""

    name: Annotated[str, one_of(*ARGUMENTS)]
    arguments: Json


class PlainForm(Struct):
    """What the file holds."""

    version: str
    layers: dict[str, list[Json]]
    source: SourceForm = msgspec.field(default_factory=SourceForm)
    architecture: ArchitectureForm | None = None
    preprocessing: PreprocessingForm | None = None


@dataclass(frozen=True)
class StockLayer:
    """The class of a layer, and what makes one of it."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class PlainRecord:
    """By name of a compressed layer, the layers that stand for it; those that are dense are left out."""

    version: str
    layers: Mapping[str, tuple[StockLayer, ...]]
    source: Json
    architecture: Architecture | None = None
    preprocessing: Preprocessing | None = None

    def to_json(self) -> Json:
        """As the file holds it."""
        return {
            "version": self.version,
            "source": self.source,
            "architecture": asdict(self.architecture) if self.architecture else None,
            "preprocessing": self.preprocessing.to_json() if self.preprocessing else None,
            "layers": {
                fqn: [{"class": layer.name, "arguments": dict(layer.arguments)} for layer in layers]
                for fqn, layers in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, data: object) -> PlainRecord:
        """Read it back.

        Raises:
            CheckpointError: a field of a wrong type or value, named by its path.
        """
        with refusing_as(CheckpointError):
            check_values(data)
            form = decode(data, PlainForm)
            layers = {fqn: _layers(f"layers.{fqn}", each) for fqn, each in form.layers.items()}
        return cls(
            form.version,
            layers,
            msgspec.structs.asdict(form.source),
            Architecture(**msgspec.structs.asdict(form.architecture)) if form.architecture else None,
            Preprocessing(**msgspec.structs.asdict(form.preprocessing)) if form.preprocessing else None,
        )


def _layers(where: str, entries: list[Json]) -> tuple[StockLayer, ...]:
    """Each with arguments that its class takes.

    Raises:
        FieldError: it does not, or there is none.
    """
    if not entries:
        raise FieldError(f"{where} must be a list of at least one layer")
    made = []
    for number, entry in enumerate(entries):
        form = decode(entry, StockLayerForm, f"{where}[{number}]")
        inner = f"{where}[{number}].arguments"
        arguments = msgspec.structs.asdict(decode(form.arguments, ARGUMENTS[form.name], inner))
        if form.name == "ContractedLinear":
            _check_groups(arguments, inner)
        if "output_padding" in arguments and not form.name.startswith("ConvTranspose"):
            _check_usual(arguments.pop("output_padding"), f"{inner}.output_padding")
        made.append(StockLayer(form.name, arguments))
    return tuple(made)


def _check_usual(output_padding: Sequence[int], where: str) -> None:
    if any(output_padding):
        raise FieldError(f"{where} belongs to transposed convolutions")


def _check_groups(arguments: Json, where: str) -> None:
    ranks = [(r, s) for r, _, _, s in arguments["groups"]]
    after = [1, *(s for _, s in ranks)]
    before = [*(r for r, _ in ranks), 1]
    if after != before:
        raise FieldError(f"{where}.groups must begin and end with TT-rank 1 and fit together")
