"""Networks with their weights: from a dense checkpoint, from a compressed file, and what a file stores of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ttcompress.errors import ArchitectureError, CheckpointError, PlanError, shortlist
from ttcompress.files.checkpoint import (
    Checkpoint,
    is_compressed,
    is_plain,
    load_checkpoint,
    load_compressed,
)
from ttcompress.files.compressed import check_arguments, stored_report
from ttcompress.files.header import PLAIN_KEY, blaming, read_metadata
from ttcompress.files.model_folder import CONFIG, ModelFolder, model_folder
from ttcompress.files.tensors import aligned
from ttcompress.layers.plain import from_description
from ttcompress.networks import architectures as models
from ttcompress.networks import hub
from ttcompress.networks.by_name import buffers, fitted, is_by_name, without_first_part, without_prefixes
from ttcompress.networks.factories import Factory, load_factory
from ttcompress.networks.held import held_tensors
from ttcompress.networks.limits import BUFFERS
from ttcompress.networks.matrices import Weights
from ttcompress.networks.plain import Pick, plain_network
from ttcompress.networks.reader import Reader
from ttcompress.networks.running import Example, tensors_of
from ttcompress.networks.stored import core_values, read_stored, tied_parameters
from ttcompress.networks.surgery import check_layers, insert_empty, swap
from ttcompress.networks.text_examples import text_example
from ttcompress.records.common import Json
from ttcompress.records.plain import PlainRecord
from ttcompress.records.report import Architecture, Preprocessing, Report


@dataclass(frozen=True)
class Network:
    """A network with its weights, what is known about where it came from, and how it reads text, if it does.

    `folder` is where files lie that belong to it beside its weights, such as a tokenizer's.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    architecture: Architecture | None = None
    preprocessing: Preprocessing | None = None
    source: Json | None = None
    reader: Reader | None = None
    folder: Path | None = None


def open_any(path: Path, arch: str | None = None, key: str = "") -> Network:
    """A dense checkpoint, a compressed file or a plain one; `arch` also names the factory that the latter may need."""
    if plain := _plain_record(path):
        model = open_plain(path, plain, factory_for(plain.architecture, arch))
        return Network(model, model.state_dict(), plain.architecture, plain.preprocessing, plain.source)
    if not is_compressed(path):
        return open_dense(path, arch, key)
    factory = factory_for(stored_report(path).architecture, arch)
    model, report = open_compressed(path, factory)
    reader = hub.known_reader(model, report.architecture, path)
    return Network(
        model,
        model.state_dict(),
        report.architecture,
        report.preprocessing,
        report.source,
        reader,
        path if path.is_dir() else None,
    )


def factory_for(known: Architecture | None, arch: str | None) -> Factory | None:
    """The factory that `arch` names, where a file does not say what builds its network."""
    needs_factory = known is None or known.kind == "factory"
    return load_factory(arch) if arch and needs_factory else None


def input_shape(source: Path, network: Network, given: Sequence[int] | None = None) -> tuple[int, ...]:
    """Of one input, without the batch: as given, else as recorded or known of the architecture.

    Raises:
        ArchitectureError: neither, or no sizes.
    """
    recorded = network.preprocessing and network.preprocessing.input_size
    shape = tuple(given or recorded or ())
    if not shape:
        raise ArchitectureError(
            f"{source}: the size of an input is not known; give it with --input-size, such as 3,224,224"
        )
    if min(shape) < 1:
        raise ArchitectureError(f"--input-size takes numbers from 1 on, not {','.join(map(str, shape))}")
    return shape


def example_of(
    source: Path, network: Network, given: Sequence[int] | None = None
) -> tuple[Example, tuple[int, ...]]:
    """Inputs to run a network on, made up in the size that is given or known, and that size: of a text, its tokens.

    Raises:
        ArchitectureError: no size is known, or what is given is none.
        DataError: a text that is longer than the network takes.
    """
    if network.reader is None:
        shape = input_shape(source, network, given)
        return Example(shape), shape
    if given is not None and (len(given) != 1 or given[0] < 1):
        raise ArchitectureError(
            f"{source}: reads texts, of which --input-size says the number of tokens, such as 128"
        )
    example = text_example(network.model, network.reader, given[0] if given else None)
    return example, tuple(tensors_of(example.batch(network.model, 1))[0].shape[1:])


def open_empty(arch: str) -> Network:
    """An architecture without weights, on the meta device: enough for TT-ranks given by hand."""
    architecture, factory = _resolve(arch, None)
    model = models.build(architecture, factory)
    return Network(model, model.state_dict(), architecture, models.preprocessing(architecture))


def open_fresh(arch: str) -> Network:
    """An architecture with random weights, drawn from torch's generator; those of the zoo wait for `initialise`.

    Its layers that are large as they are may then first be replaced by smaller ones.
    """
    architecture, factory = _resolve(arch, None)
    model = models.build(architecture, factory, "meta" if architecture.kind == "zoo" else "cpu")
    return Network(model, model.state_dict(), architecture, models.preprocessing(architecture))


def initialise(model: nn.Module) -> None:
    """Give all layers on the meta device random weights, as torch does when it makes them."""
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()  # type: ignore[operator]


def open_dense(path: Path, arch: str | None = None, key: str = "") -> Network:
    """A dense checkpoint in its architecture, given by `arch`, by the folder it is in, or else by keys and shapes.

    Raises:
        CheckpointError: see `load_checkpoint`.
        ArchitectureError: none fits, or several.
    """
    _check_dense(path)
    folder = model_folder(path) if arch is None else None
    if folder is not None:
        return _of_library(folder, key)
    try:
        checkpoint, network = _opened(load_checkpoint(path, key), arch)
    except ArchitectureError as error:
        if arch is None and (path.parent / CONFIG).is_file():
            whose = f"the {CONFIG} there names no network of the transformers library or of timm"
            raise ArchitectureError(f"{path}: {error}; {whose}") from error
        raise
    checkpoint.say_notes()
    return network


def _of_library(folder: ModelFolder, key: str) -> Network:
    """The network of a folder that a library wrote."""
    if folder.library == "timm":
        return _of_timm(folder, key)
    opened = hub.open_folder(folder, key)
    opened.checkpoint.say_notes()
    return Network(
        opened.model,
        opened.tensors,
        opened.architecture,
        source=opened.checkpoint.source,
        reader=hub.known_reader(opened.model, opened.architecture, folder.path),
        preprocessing=hub.image_preprocessing(folder.path),
        folder=folder.path,
    )


def _of_timm(folder: ModelFolder, key: str) -> Network:
    architecture = hub.timm_architecture(folder)
    checkpoint = load_checkpoint(folder.weights, key)
    with blaming(folder.path):
        model = of_tensors(architecture, checkpoint.tensors)
    checkpoint.say_notes()
    source = {**checkpoint.source, "file": folder.title}
    known = models.preprocessing(architecture)
    return Network(model, checkpoint.tensors, architecture, known, source, folder=folder.path)


def _opened(checkpoint: Checkpoint, arch: str | None) -> tuple[Checkpoint, Network]:
    """A checkpoint in its architecture, under its names or else without a prefix of all of them."""
    try:
        architecture, factory = _resolve(arch, checkpoint)
        model = _filled(lambda device: models.build(architecture, factory, device), checkpoint.tensors)
    except (ArchitectureError, CheckpointError):
        shorter = checkpoint.without_prefix()
        if shorter is not None:
            with suppress(ArchitectureError, CheckpointError):
                return _opened(shorter, arch)
        raise
    preprocessing = models.preprocessing(architecture)
    return checkpoint, Network(model, checkpoint.tensors, architecture, preprocessing, checkpoint.source)


def open_weights(path: Path, key: str = "") -> Network:
    """A dense checkpoint without its architecture, its tensors under their exact names.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    _check_dense(path)
    checkpoint = load_checkpoint(path, key, exact=True)
    checkpoint.say_notes()
    return Network(Weights(checkpoint.tensors), checkpoint.tensors, source=checkpoint.source)


def _check_dense(path: Path) -> None:
    if is_compressed(path):
        raise CheckpointError(f"{path}: is compressed already; `ttcompress expand` makes it dense again")
    if is_plain(path):
        raise CheckpointError(
            f"{path}: made by expand --factors; name the dense checkpoint, or the compressed file"
        )


def _resolve(arch: str | None, checkpoint: Checkpoint | None) -> tuple[Architecture, Factory | None]:
    shapes = checkpoint.shapes if checkpoint else None
    architecture = models.resolve(arch, shapes) if arch else models.infer(shapes or {})
    factory = load_factory(arch) if arch and architecture.kind == "factory" else None
    return architecture, factory


def of_tensors(architecture: Architecture, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A network that needs no factory, with these tensors as its state.

    Raises:
        CheckpointError: they do not fit.
        ArchitectureError: it cannot be built.
    """
    return _filled(lambda device: models.build(architecture, None, device), tensors)


def _filled(
    build: Callable[[str], nn.Module], state: Mapping[str, Tensor], optional: Container[str] = ()
) -> nn.Module:
    """The built network with these tensors in it, tied parameters still tied, nothing left without a value."""
    # Buffers outside the state dict have their values from the constructor alone.
    model = build(BUFFERS)
    own = model.state_dict()
    state = {name: tensor for name, tensor in state.items() if name in own or name not in optional}
    _assign(model, state)
    if _is_unfinished(model):
        model = build("cpu")
        _assign(model, state)
    return model.eval()


def _assign(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    tied = tied_parameters(model, state)
    aliases = {alias: state[name] for alias, name in tied.items() if name in state}
    state = {**aliases, **state}

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problem = models.mismatch(shapes, model)
    if problem:
        raise CheckpointError(f"the file does not fit its architecture: {problem}")
    _check_types(model, state)

    # What else holds a parameter goes on with that very one, so that it takes the values.
    held = held_tensors(model) & state.keys()
    for name in held:
        _set_value(model.state_dict(keep_vars=True)[name], state[name])

    # What may be missing are counters of batch norms; assigned tensors are no longer tied.
    others = {name: tensor for name, tensor in state.items() if name not in held}
    model.load_state_dict(others, strict=False, assign=True)
    for alias, name in tied.items():
        owner, _, own_name = alias.rpartition(".")
        setattr(model.get_submodule(owner), own_name, model.get_parameter(name))


@torch.no_grad()
def _set_value(own: Tensor, value: Tensor) -> None:
    if own.dtype == value.dtype:
        own.copy_(value)
    else:
        own.data = value.clone()


def _check_types(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """See that parameters get numbers of the kind that they are made for: no codes, flags or complex numbers."""

    def fits(parameter: Tensor, value: Tensor) -> bool:
        is_same_kind = (parameter.is_floating_point(), parameter.is_complex()) == (
            value.is_floating_point(),
            value.is_complex(),
        )
        # Networks cannot compute in the types of one byte, float8 as little as codes.
        return parameter.dtype == value.dtype or (is_same_kind and value.element_size() > 1)

    wrong = {
        name: state[name]
        for name, each in model.named_parameters()
        if name in state and not fits(each, state[name])
    }
    if wrong:
        types = sorted({str(value.dtype).removeprefix("torch.") for value in wrong.values()})
        raise CheckpointError(
            f"the file holds {shortlist(types)} where the network computes in floating point: {shortlist(wrong)}; "
            "convert them (dequantize, or .float()) first"
        )


def _is_unfinished(model: nn.Module) -> bool:
    """Whether something is on the meta device still, plain attributes that are tensors among it."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    plain = [value for value in attributes if isinstance(value, Tensor)]
    held = [*model.parameters(), *model.buffers(), *plain]
    return any(tensor.is_meta for tensor in held)


def load(
    path: str | os.PathLike[str],
    factory: Factory | None = None,
    device: str = "cpu",
    *,
    plain: bool = False,
    input_size: Sequence[int] = (),
    batch_size: int = 1,
) -> nn.Module:
    """Load a compressed file into a module, in eval mode; no checkpoint is needed.

    The module takes and returns tensors of the same shapes as the original network. In the places of its compressed
    layers are TTLinear and TTConv2d; int8 cores become the float32 numbers that they stand for (docs/format.md).
    With `plain`, or from a file that `expand --factors` wrote, torch's own layers are.

    Args:
        path: a file that `save` or the command line wrote, or the index of a sharded one.
        factory: builds the original network, for files whose architecture is neither in the zoo nor in torchvision.
        device: where the module is put.
        plain: as `to_plain` makes it of the loaded module.
        input_size: of one input, for `plain`; by default what the file records.
        batch_size: how many inputs a call is going to have, for `plain`.

    Raises:
        CheckpointError: not a compressed file, damaged, or of another schema.
        ArchitectureError: a factory is needed, or the one given builds another network.

    >>> import tempfile, torch, ttcompress
    >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> compressed, report = ttcompress.compress(build(), ranks=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ttcompress.save(compressed, report, folder + "/net-tt.safetensors")
    ...     loaded = ttcompress.load(folder + "/net-tt.safetensors", factory=build)
    >>> torch.equal(loaded[0].weight, compressed[0].weight)
    True
    """
    file = Path(path)
    if record := _plain_record(file):
        return open_plain(file, record, factory).to(device)
    model, report = open_compressed(file, factory)
    # What is faster in stock layers depends on the device.
    model = model.to(device)
    return in_stock_layers(model, report, input_size, batch_size) if plain else model


def in_stock_layers(
    model: nn.Module,
    report: Report,
    input_size: Sequence[int] = (),
    batch_size: int = 1,
    pick: Pick | None = None,
) -> nn.Module:
    """A network that was loaded, with stock layers in the place of its TT layers (see `plain_network`)."""
    recorded = report.preprocessing and report.preprocessing.input_size
    shape = tuple(input_size or recorded or ())
    return plain_network(model, Example(shape) if shape else None, batch_size, pick)


def _plain_record(path: Path) -> PlainRecord | None:
    if not is_plain(path):
        return None
    with blaming(path):
        return PlainRecord.from_json(read_metadata(path, PLAIN_KEY))


def open_plain(path: Path, record: PlainRecord, factory: Factory | None) -> nn.Module:
    """The network of a file that `expand --factors` wrote.

    Raises:
        CheckpointError: tensors that do not fit the description or the architecture.
        ArchitectureError: a factory is needed, or the one given builds another network.
    """
    with blaming(path):
        architecture = _buildable(record.architecture, factory)
        tensors = load_compressed(path)
        widths = [
            [int(layer.arguments.get(name, 0)) for name in ("in_features", "out_features")]
            for layers in record.layers.values()
            for layer in layers
        ]
        check_arguments(record.architecture, [*(each.shape for each in tensors.values()), *widths])

        def build(device: str) -> nn.Module:
            model = models.build(architecture, factory, device)
            names = dict(model.named_modules())
            if unknown := sorted(record.layers.keys() - names.keys()):
                raise ArchitectureError(f"{architecture.name} builds a network without {shortlist(unknown)}")
            for fqn, layers in record.layers.items():
                swap(model, fqn, from_description(layers))
            return model

        return _filled(build, {name: aligned(tensor) for name, tensor in tensors.items()})


def _buildable(known: Architecture | None, factory: Factory | None) -> Architecture:
    """The architecture of a file, by a factory where one is given.

    Raises:
        ArchitectureError: one is needed.
    """
    if factory is None and known is None:
        raise ArchitectureError("records no architecture; pass factory= (or --arch net.py:build)")
    architecture = known or Architecture("factory", "factory")
    return replace(architecture, kind="factory") if factory is not None else architecture


def open_compressed(path: Path, factory: Factory | None = None) -> tuple[nn.Module, Report]:
    """A compressed file as a module, and its report, whose kinds of weights are those of the module."""
    report, tensors = read_stored(path)
    tensors = {name: aligned(tensor) for name, tensor in tensors.items()}
    with blaming(path):
        if is_by_name(report) and factory is not None:
            return _named(*without_prefixes(report, tensors), factory)
        return rebuilt(report, tensors, factory), report


def _named(report: Report, tensors: Mapping[str, Tensor], factory: Factory) -> tuple[nn.Module, Report]:
    """A file that knows weights by name alone, in its network; without a prefix of all names if it fits so only."""
    try:
        network = fitted(report, models.build(Architecture("factory", "factory"), factory))
        return rebuilt(network, tensors, factory, buffers(report, tensors)), network
    except (ArchitectureError, CheckpointError):
        shorter = without_first_part(report, tensors)
        if shorter is not None:
            with suppress(ArchitectureError, CheckpointError):
                return _named(*shorter, factory)
        raise


def rebuilt(
    report: Report, tensors: Mapping[str, Tensor], factory: Factory | None, optional: Container[str] = ()
) -> nn.Module:
    """The network that a file with this report and these tensors holds.

    Args:
        optional: names of tensors that the network may lack.

    Raises:
        CheckpointError: tensors that do not fit the report or the architecture.
        ArchitectureError: a factory is needed, or the one given builds another network.
    """
    architecture = _buildable(report.architecture, factory)
    tensors = dict(tensors)
    for layer in report.plan.layers:
        tensors |= core_values(tensors, layer)
        for name in layer.scale_shapes:
            del tensors[name]
    replaced = {layer.weight_name for layer in report.plan.layers}
    missing = sorted(set(report.tied.values()) - tensors.keys() - replaced)
    if missing:
        raise CheckpointError(f"ties parameters to {shortlist(missing)}, which it does not hold")
    # Modules that share a replaced weight share its cores.
    aliases = {alias: tensors[name] for alias, name in report.tied.items() if name not in replaced}
    state = {**tensors, **aliases}

    def build(device: str) -> nn.Module:
        model = models.build(architecture, factory, device)
        check_layers(model, report.plan.layers)
        insert_empty(model, report.plan.layers, report.tied)
        return model

    try:
        return _filled(build, state, optional)
    except PlanError as error:
        raise ArchitectureError(f"{architecture.name} builds another network: {error}") from error
