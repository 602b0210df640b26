"""Architecture references -> constructors, and inference of the architecture from keys and shapes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import nn

from ttcompress.errors import ArchitectureError, shortlist
from ttcompress.networks import known_keys, timm_models, transformers_models
from ttcompress.networks.factories import Factory, built_by, is_factory, load_factory, one_line, split_factory
from ttcompress.networks.known_keys import OPTIONAL
from ttcompress.networks.limits import BUFFERS, MOST_PARAMETERS, weights_on_meta, within_limits
from ttcompress.networks.zoo import DEFAULT_CLASSES, ZOO, mlp_widths, named_widths, zoo_preprocessing
from ttcompress.records.report import Architecture, Preprocessing

Shapes = Mapping[str, tuple[int, ...]]

_CLASSES = {"zoo": DEFAULT_CLASSES, "torchvision": 1000}
# The published weights of these two carry auxiliary heads and expect input normalised as for the other networks.
WITH_AUX = ("googlenet", "inception_v3")
_ADVICE = "choose with --arch NAME or --arch path/to/net.py:factory"
WAYS = (
    "compress its matrices without the network by --arch none, or name a function that builds the network by "
    "--arch net.py:build (docs/cli.md, Networks of your own)"
)
"""What can be done with a network that is not known."""


@dataclass(frozen=True)
class _Difference:
    """Where a checkpoint and a network disagree; `shapes` maps a key to (in the checkpoint, in the network)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    agreeing: int

    @property
    def keys(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def classes(self, default: int) -> int | None:
        """The one number that stands where the network has its `default` classes, if that is all the difference."""
        counts = {have[0] if want == (default, *have[1:]) else None for have, want in self.shapes.values()}
        return counts.pop() if len(counts) == 1 and not self.missing and not self.unexpected else None

    def __str__(self) -> str:
        shapes = [
            f"{key} is {have}, the network has {want}" for key, (have, want) in sorted(self.shapes.items())
        ]
        parts = {
            "missing": sorted(self.missing),
            "unexpected": sorted(self.unexpected),
            "other shapes": shapes,
        }
        return "; ".join(f"{word}: {shortlist(items, 4)}" for word, items in parts.items() if items)


def _shapes(model: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@cache
def _shapes_of(kind: str, name: str, **arguments: int) -> Shapes:
    # Building every network of torchvision takes seconds, and inference may be asked for more than one checkpoint.
    return _shapes(build(Architecture(kind, name, arguments)))


def _difference(shapes: Shapes, wanted: Shapes) -> _Difference:
    common = shapes.keys() & wanted.keys()
    differing = {
        key: (tuple(shapes[key]), wanted[key]) for key in common if tuple(shapes[key]) != wanted[key]
    }
    return _Difference(
        missing=tuple(key for key in wanted.keys() - common if not key.endswith(OPTIONAL)),
        unexpected=tuple(key for key in shapes.keys() - common if not key.endswith(OPTIONAL)),
        shapes=differing,
        agreeing=len(common) - len(differing),
    )


def mismatch(shapes: Shapes, model: nn.Module) -> str | None:
    """Say in one line which keys and shapes of a checkpoint `model` does not have, or None where all agree.

    `num_batches_tracked` is optional on either side. Missing, unexpected and differing keys are sorted, long lists cut.
    """
    difference = _difference(shapes, _shapes(model))
    return str(difference) if difference.keys else None


def build(architecture: Architecture, factory: Factory | None = None, device: str = "meta") -> nn.Module:
    """Construct the network in eval mode, by default with parameters and buffers on the meta device.

    There they wait for `load_state_dict(..., assign=True)`; only `num_batches_tracked`, which checkpoints may lack, is
    a real zero. With `BUFFERS` as the device, buffers have the values that the constructor gave them. A factory, which
    may not support other devices, builds on the CPU whatever `device` is.

    Raises:
        ArchitectureError: a factory is needed and not given, or the network cannot be constructed.
    """
    if architecture.kind == "factory":
        return built_by(architecture.name, factory).eval()
    if architecture.kind == "transformers":
        model = transformers_models.build(architecture, is_waiting=device in ("meta", BUFFERS))
        return _to_meta(model) if device == "meta" else model
    constructor, fixed = _constructor(architecture)

    def construct() -> nn.Module:
        with warnings.catch_warnings():
            # Of layers without features, which a checkpoint may have, nothing is to be initialised.
            warnings.simplefilter("ignore")
            made: nn.Module = constructor(**fixed, **architecture.arguments)
        return made

    try:
        model = _waiting(architecture, construct)
        if device == BUFFERS:
            return model.eval()
        if device != "meta":
            with torch.device(device):
                return construct().eval()
    except ArchitectureError:
        raise
    except Exception as error:
        raise ArchitectureError(
            f"{_reference(architecture)} cannot be constructed: {one_line(error)}"
        ) from error
    return _to_meta(model).eval()


def _waiting(architecture: Architecture, construct: Callable[[], nn.Module]) -> nn.Module:
    """What is constructed, with parameters on the meta device.

    Raises:
        ArchitectureError: there would be too many.
    """
    if architecture.kind == "timm":
        # Its arguments come from a file.
        return within_limits(_reference(architecture), construct, MOST_PARAMETERS)
    with weights_on_meta():
        model = construct()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise ArchitectureError(
            f"{_reference(architecture)} would have {count:,} parameters; networks built by name have at most "
            f"{MOST_PARAMETERS:,}"
        )
    return model


def _to_meta(model: nn.Module) -> nn.Module:
    model.to("meta")
    for module in model.modules():
        if getattr(module, OPTIONAL, None) is not None:
            module.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return model


def _constructor(architecture: Architecture) -> tuple[Callable[..., Any], dict[str, Any]]:
    kind, name = architecture.kind, architecture.name
    if kind == "timm" and timm_models.has(name):
        return timm_models.constructor(architecture), {}
    if name not in names(kind):
        raise ArchitectureError(_unknown(f"{kind}:{name}"))
    if kind == "zoo":
        return ZOO[name], {}
    import torchvision

    fixed = {"init_weights": False, "transform_input": True} if name in WITH_AUX else {}
    return torchvision.models.get_model_builder(name), {"weights": None, **fixed}


def names(kind: str) -> list[str]:
    """The networks of a kind."""
    if kind == "zoo":
        return list(ZOO)
    if kind == "timm":
        return timm_models.names()
    if kind != "torchvision":
        return []
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _reference(architecture: Architecture) -> str:
    return f"{architecture.kind}:{architecture.name}"


def resolve(reference: str, shapes: Shapes | None = None) -> Architecture:
    """Turn `vgg16`, `zoo:resnet20`, `mlp-784-300-10`, `torchvision:resnet18`, `timm:vit_tiny_patch16_224` or `net.py:build` into an `Architecture`.

    A bare name is looked up in the zoo, then in torchvision; those of timm are named so. With `shapes` (a checkpoint's keys -> shapes) arguments
    are filled in such that the network fits.

    Raises:
        ArchitectureError: an unknown name, a factory that fails, or a network that does not fit `shapes`.
    """
    if reference == "none":
        raise ArchitectureError("--arch none is for compress and plan of a checkpoint: it makes no network")
    if is_factory(reference):
        return _resolve_factory(reference, shapes)
    prefix, _, named = reference.rpartition(":")
    name, arguments = named_widths(named)
    kinds = [prefix] if prefix else list(_CLASSES)
    kind = next((kind for kind in kinds if _has(kind, name)), None)
    if kind is None:
        raise ArchitectureError(_unknown(reference))
    if shapes is None:
        return Architecture(kind, name, arguments)
    architecture, difference = _fit(kind, name, shapes, arguments)
    if difference.keys:
        raise ArchitectureError(f"{reference} does not fit the checkpoint: {difference}")
    return architecture


def _has(kind: str, name: str) -> bool:
    return timm_models.has(name) if kind == "timm" else name in names(kind)


def _default_classes(kind: str, name: str) -> int:
    return timm_models.default_classes(name) if kind == "timm" else _CLASSES[kind]


def _resolve_factory(reference: str, shapes: Shapes | None) -> Architecture:
    path, name = split_factory(reference)
    factory = load_factory(reference)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = f"{path.name}:{name}" if ".py:" in reference else reference
    architecture = Architecture("factory", named, sha256=digest)
    problem = mismatch(shapes, build(architecture, factory)) if shapes is not None else None
    if problem:
        raise ArchitectureError(f"{architecture.name} does not fit the checkpoint: {problem}")
    return architecture


def _unknown(reference: str) -> str:
    prefix, _, name = reference.rpartition(":")
    kinds = [prefix] if prefix in (*_CLASSES, "timm") else list(_CLASSES)
    known = [known for kind in kinds for known in names(kind)]
    nearest = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"nearest are {shortlist(nearest)}" if nearest else f"the zoo has {shortlist(ZOO, len(ZOO))}"
    return f"unknown architecture {reference!r}: {hint}; else name one of torchvision.models, timm:NAME or path/to/net.py:factory"


def _fit(
    kind: str, name: str, shapes: Shapes, stated: Mapping[str, int] | None = None
) -> tuple[Architecture, _Difference]:
    """The arguments with which the network comes nearest to `shapes`, and what then still differs."""
    choices: list[dict[str, int]] = [dict(stated or {})]
    if name == "mlp" and not stated:
        choices = [mlp_widths(shapes)]
    elif name in WITH_AUX:
        # torchvision drops the heads when it loads the weights of googlenet, so checkpoints come with and without.
        choices = [{}, {"aux_logits": 0}]
    fits = [_fit_classes(kind, name, arguments, shapes) for arguments in choices]
    return min(fits, key=lambda fit: fit[1].keys)


def _fit_classes(
    kind: str, name: str, arguments: dict[str, int], shapes: Shapes
) -> tuple[Architecture, _Difference]:
    difference = _difference(shapes, _shapes_of(kind, name, **arguments))
    classes = difference.classes(_default_classes(kind, name))
    if classes is not None:
        arguments = {**arguments, "num_classes": classes}
        difference = _difference(shapes, _shapes_of(kind, name, **arguments))
    return Architecture(kind, name, arguments), difference


def infer(shapes: Shapes) -> Architecture:
    """Find the network of the zoo, else of torchvision, that has exactly these keys and shapes.

    Raises:
        ArchitectureError: several networks of the zoo fit, or none of either: names the nearest and what differs.
    """
    fits = [_fit("zoo", name, shapes) for name in ZOO if name != "mlp" or mlp_widths(shapes)]
    exact = [architecture for architecture, difference in fits if not difference.keys]
    if len(exact) > 1:
        names = shortlist(_reference(architecture) for architecture in exact)
        raise ArchitectureError(f"the checkpoint fits several architectures, {names}: {_ADVICE}")
    if exact:
        return exact[0]

    for name in _candidates(shapes):
        architecture, difference = _fit("torchvision", name, shapes)
        if not difference.keys:
            return architecture
        fits.append((architecture, difference))
    raise ArchitectureError(_no_match(fits, shapes))


def _candidates(shapes: Shapes) -> list[str]:
    """The networks of torchvision that may have these keys and shapes, or that are meant by something like them."""
    keys = known_keys.keys_of(shapes)
    exact = known_keys.with_keys(keys)
    new = [] if known_keys.is_complete() else known_keys.unknown(names("torchvision"))
    return exact + new if exact else new + known_keys.near(keys)


def _no_match(fits: list[tuple[Architecture, _Difference]], shapes: Shapes) -> str:
    """Why no network fits: names those that have most of the keys, and what else can be done."""
    if not any(len(shape) > 1 for shape in shapes.values()):
        return f"the checkpoint holds no network: no matrix or kernel is among its {len(shapes)} tensors"
    near = [fit for fit in fits if 2 * fit[1].agreeing > max(len(shapes), fit[1].agreeing + fit[1].keys)]
    if not near:
        return f"no known architecture has the checkpoint's keys ({shortlist(shapes, 3)}): {WAYS}"

    near = sorted(near, key=lambda fit: fit[1].keys / fit[1].agreeing)[:3]
    listed = shortlist(f"{_reference(fit)} ({_count(difference.keys)})" for fit, difference in near)
    nearest, difference = near[0]
    return f"no known architecture fits the checkpoint; nearest are {listed}; {nearest.name}: {difference}; {WAYS}"


def _count(keys: int) -> str:
    return "1 key differs" if keys == 1 else f"{keys} keys differ"


def preprocessing(architecture: Architecture) -> Preprocessing | None:
    """Normalisation and input size that the network was trained with; None where that is not known (factories).

    For torchvision these are the transforms of its IMAGENET1K_V1 weights, else of the first that it lists.
    """
    if architecture.kind == "zoo":
        return zoo_preprocessing(architecture.name, architecture.arguments)
    if architecture.kind == "timm":
        return timm_models.preprocessing(architecture)
    if architecture.kind != "torchvision":
        return None
    import torchvision

    weights = list(torchvision.models.get_model_weights(architecture.name))
    chosen = next((entry for entry in weights if entry.name == "IMAGENET1K_V1"), weights[0])
    transforms = chosen.transforms()
    crop = int(transforms.crop_size[0])
    return Preprocessing(
        tuple(transforms.mean), tuple(transforms.std), (3, crop, crop), resize=int(transforms.resize_size[0])
    )
