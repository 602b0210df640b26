"""What a training starts from: a compressed file, a dense checkpoint, or random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ttcompress.commands.compressor import Compressor
from ttcompress.errors import CheckpointError, PlanError
from ttcompress.files.checkpoint import file_digest, is_compressed
from ttcompress.files.compressed import stored_report
from ttcompress.files.tensors import tensor_bytes
from ttcompress.networks.held import copied
from ttcompress.networks.opening import Network, initialise, open_any, open_dense, open_fresh
from ttcompress.networks.stored import stored_tensors
from ttcompress.networks.surgery import install_fresh
from ttcompress.recipe import FORM, Recipe
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report
from ttcompress.runtime import chosen_device, seeded
from ttcompress.settings import Settings
from ttcompress.version import __version__


@dataclass(frozen=True)
class StartingPoint:
    """The network to train, the report of its TT layers, and the dense network it came from, if that is at hand.

    `digest` tells it apart from others when a training is resumed.
    """

    network: Network
    report: Report | None = None
    original: nn.Module | None = None
    digest: str = ""


def open_start(
    source: Path, settings: Settings, plan: CompressionPlan | None = None, origin: Path | None = None
) -> StartingPoint:
    """A compressed file or a dense checkpoint, trained as it is.

    Args:
        origin: the checkpoint that a compressed file was made from; by default looked for beside it.

    Raises:
        PlanError: options that say what the network should be.
    """
    recipe = settings.recipe
    _check_as_it_is(source, recipe, plan, origin)
    network = open_any(source, recipe.arch, settings.key)
    if not is_compressed(source):
        return StartingPoint(network, None, copied(network.model), file_digest(source))

    report = stored_report(source)
    original = _original(source, report, settings, origin)
    return StartingPoint(network, report, original, file_digest(source))


def _original(source: Path, report: Report, settings: Settings, origin: Path | None) -> nn.Module | None:
    """The dense network that a file was made from, where its checkpoint is at hand.

    A checkpoint may hold several networks, such as raw and averaged weights: the tensors decide, not the file.
    """
    known = report.source
    origin = origin or source.with_name(str(known.get("file") or source.name))
    if not origin.exists() or file_digest(origin) != known.get("sha256"):
        return None

    key = settings.key or known.get("key", "")
    dense = open_dense(origin, settings.recipe.arch, key)
    found = dense.source or {}
    if "state_sha256" not in known:
        # Written by a version that did not record which of several it was.
        return dense.model if settings.key or "key" not in found else None
    if found.get("state_sha256") != known["state_sha256"]:
        was = f" {known['key']!r}" if known.get("key") else " another one"
        raise CheckpointError(
            f"--key {key} of {origin.name} is not what {source} was compressed from, which is{was}"
        )
    return dense.model


def _check_as_it_is(source: Path, recipe: Recipe, plan: CompressionPlan | None, origin: Path | None) -> None:
    planned = plan or recipe.has_target or recipe.exec or recipe.tune or recipe.input_size
    if recipe.from_scratch or (origin is None and planned):
        raise PlanError(
            f"{source} is trained as it is: ranks, budgets and plans are for --arch with --from-scratch"
        )

    unused = recipe.given(*FORM, "dtype", "calib", "calib_images", "effort")
    if origin is None and unused:
        raise PlanError(f"{source} is trained as it is: leave out {', '.join(unused)}")


def start_from_scratch(settings: Settings, plan: CompressionPlan | None = None) -> StartingPoint:
    """Random weights, drawn by the seed; TT layers as their ranks say, initialised as torch does dense ones.

    Raises:
        PlanError: no architecture, or a plan that does not fit it.
    """
    recipe = settings.recipe
    if not recipe.arch or not settings.from_scratch:
        raise PlanError("give a compressed file or a checkpoint, or --arch with --from-scratch")

    with seeded(settings.seed):
        network = open_fresh(recipe.arch)
        if plan is None and not recipe.has_target:
            initialise(network.model)
            return StartingPoint(replace(network, tensors=network.model.state_dict()), digest=recipe.arch)

        known = network.preprocessing.input_size if network.preprocessing else None
        size = settings.input_size or known or ()
        compressor = Compressor(network.model, settings, chosen_device(settings.device), input_shape=size)
        plan = compressor.plan(recipe, plan)

        # Layers that are large as they are get their weights only now, when they have become small.
        bytes_before = tensor_bytes(network.tensors)
        for layer in plan.layers:
            install_fresh(network.model, layer)
        initialise(network.model)

    state = network.model.state_dict()
    bytes_after = tensor_bytes(stored_tensors(network.model, state, plan))
    report = Report(plan, bytes_before, bytes_after, __version__, settings.seed, {}, network.architecture)
    forms = ", ".join(f"{layer.fqn} {layer.tensorization.format} {layer.tt_ranks}" for layer in plan.layers)
    return StartingPoint(replace(network, tensors=state), report, None, f"{recipe.arch} with {forms}")
