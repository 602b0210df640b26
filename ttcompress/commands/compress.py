"""Compress a checkpoint into a file: open, plan, decompose, swap in, measure, write; `plan` stops half-way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ttcompress.calibrate.stages import adopt
from ttcompress.commands.compressor import Compressed, Compressor
from ttcompress.commands.finetune import ONLY_IN_TRAINING, check_inputs, finetune_file, state_file
from ttcompress.commands.inputs import Inputs, calibration_name, measured_images, open_inputs
from ttcompress.commands.reports import promised_bytes, recorded, report_of
from ttcompress.commands.training import EpochLog
from ttcompress.commands.weights_only import compress_weights, plan_weights
from ttcompress.errors import CheckpointError, DataError, PlanError, differences
from ttcompress.files.checkpoint import file_digest
from ttcompress.files.compressed import stored_report
from ttcompress.files.output import alone, check_output
from ttcompress.files.shards import read_index, stem
from ttcompress.files.tensors import tensor_bytes
from ttcompress.files.writing import write_safetensors
from ttcompress.networks.factories import is_factory, load_factory
from ttcompress.networks.opening import Network, open_dense, open_empty
from ttcompress.networks.proof import prove
from ttcompress.networks.running import Example
from ttcompress.networks.stored import file_metadata, stored_sha256, stored_tensors
from ttcompress.planning.plan_file import is_made_by
from ttcompress.recipe import Recipe
from ttcompress.records.common import Progress
from ttcompress.records.extras import Extras
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Report, fall
from ttcompress.runtime import chosen_device, fixed_threads, seeded
from ttcompress.settings import Settings
from ttcompress.torchrun import expected_size


@dataclass(frozen=True)
class Outcome:
    """What `compress` did: its report, the file it wrote, and by how much the drop exceeds what `--max-drop` allows."""

    report: Report
    output: Path
    excess_drop: float | None = None


def compress_and_train(
    checkpoint: Path,
    output: Path | None,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    log: EpochLog | None = None,
    extras: Extras | None = None,
) -> Outcome:
    """The whole verb: compress a checkpoint, and where the recipe names epochs, train the result further.

    `extras` gets what a page shows beside the report.

    Raises:
        TTCompressError: whatever does not fit, in one line.
    """
    _check_training_options(recipe, resume)
    target = output or default_output(checkpoint, recipe)
    resume = resume and state_file(target).exists()

    if resume:
        check_repeats(checkpoint, target, recipe, plan)
    else:
        if recipe.train:
            # What can be known to fail in the training fails before something long comes first.
            check_inputs(recipe)
        report = compress_file(
            checkpoint, target, recipe, plan, force=force, progress=progress, extras=extras
        )

    if recipe.train:
        report = finetune_file(
            target,
            target,
            recipe,
            plan,
            force=True,
            resume=resume,
            origin=checkpoint,
            progress=progress,
            log=log,
            extras=extras,
        )
    return Outcome(report, target, drop_beyond_gate(report, recipe))


def _check_training_options(recipe: Recipe, resume: bool) -> None:
    if (recipe.train is None) != (recipe.epochs is None):
        raise PlanError("--finetune and --train go together")

    unused = ["--resume"] * resume + recipe.given(*ONLY_IN_TRAINING)
    if recipe.epochs is None and unused:
        raise PlanError(f"{', '.join(unused)}: only with --finetune")

    if expected_size() > 1 and not recipe.is_weights_only:
        raise PlanError("compress in one process, then `torchrun ... -m ttcompress finetune`")


def default_output(checkpoint: Path, recipe: Recipe) -> Path:
    """Where a compressed checkpoint goes that nobody named a place for: one file, or a folder of shards."""
    in_shards = recipe.is_weights_only and read_index(checkpoint) is not None
    return Path(f"{stem(checkpoint)}-tt{'' if in_shards else '.safetensors'}")


@alone
def compress_file(
    source: Path,
    output: Path,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    extras: Extras | None = None,
) -> Report:
    """Compress a checkpoint into one file (docs/format.md) and return its report.

    With `recipe.data`, accuracy is measured before and after. With `recipe.calib`, output error counts, not weight
    error. Nothing is written unless all went well. The architecture `none` is a matter of `compress_weights`.

    Raises:
        TTCompressError: whatever does not fit, in one line; `output` is then untouched.
    """
    if recipe.is_weights_only:
        return compress_weights(source, output, recipe, plan, force=force, progress=progress)

    check_output(output, force, source=source)
    if recipe.max_drop is not None and not _is_search(recipe, plan) and recipe.data is None:
        raise DataError(
            "--max-drop beside another target is a gate on accuracy: name labelled images, or texts, with --data"
        )

    settings = Settings.of(recipe)
    network = open_dense(source, recipe.arch, settings.key)
    network, inputs = open_inputs(network, settings, progress, extras)
    report = compress_network(network, settings, plan, inputs, progress, extras)

    write_compressed(output, network, report, recipe.arch, inputs_to_prove_with(network, settings, inputs))
    return report


def write_compressed(
    output: Path, network: Network, report: Report, arch: str | None, example: Example | None
) -> None:
    """Write a compressed network, once it has been proven on the example, if there is one.

    Raises:
        TTCompressError: the network as it will be loaded answers otherwise, or the file system refuses.
    """
    stored = stored_tensors(network.model, network.tensors, report.plan)
    if example is not None:
        factory = load_factory(arch) if arch and is_factory(arch) else None
        prove(network.model, report, stored, factory, example)
    write_safetensors(output, stored, file_metadata(report, stored))


def inputs_to_prove_with(network: Network, settings: Settings, inputs: Inputs) -> Example | None:
    """Inputs of the network: some of those at hand, else such as it is known for."""
    if inputs.example is not None:
        return Example(inputs=inputs.example)
    if inputs.calibration is not None:
        return Example(inputs=next(iter(inputs.calibration.held_out())))

    images = measured_images(settings.recipe)
    if images is not None:
        batch, _ = next(
            images.chosen(range(min(2, len(images)))).batches(network.preprocessing or images.statistics(), 2)
        )
        return Example(inputs=batch)

    known = network.preprocessing.input_size if network.preprocessing else None
    size = settings.input_size or known
    return Example(size) if size else None


def plan_file(
    source: Path | None,
    recipe: Recipe,
    plan: CompressionPlan | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """What `compress_file` would do: the report without measured errors and accuracy.

    Without a checkpoint the network comes from `recipe.arch` alone, which is enough for TT-ranks given by hand.
    """
    if source is not None and recipe.is_weights_only:
        return plan_weights(source, recipe, plan, progress=progress)

    settings = Settings.of(replace(recipe, data=None, limit=None))
    if source is not None:
        network = open_dense(source, recipe.arch, settings.key)
    elif recipe.arch:
        network = open_empty(recipe.arch)
    else:
        raise PlanError("give a checkpoint, or an architecture with --arch")

    network, inputs = open_inputs(network, settings, progress)
    return plan_network(network, Settings.of(recipe), plan, inputs, progress)


def check_repeats(
    checkpoint: Path, output: Path, recipe: Recipe, plan: CompressionPlan | None = None
) -> None:
    """See that a compressed file is what `compress_file` with the same arguments wrote.

    Raises:
        CheckpointError: it is not, naming the difference.
    """
    settings = Settings.of(recipe)
    report = stored_report(output)

    before = {**report.recipe, "seed": report.seed, "sha256": report.source.get("sha256")}
    before["calib"] = (report.calibration or {}).get("data")
    now = {**recorded(recipe), "seed": settings.seed, "sha256": file_digest(checkpoint)}
    now["calib"] = calibration_name(settings)

    differ = differences(before, now)
    if not differ and plan is not None and not is_made_by(report.plan, plan):
        differ = "--plan was another"
    if differ:
        raise CheckpointError(f"{output}: was compressed otherwise: {differ}; repeat the command as it was")


def drop_beyond_gate(report: Report, recipe: Recipe) -> float | None:
    """The fall of accuracy in points, or of what was measured in its unit, where `--max-drop` beside another target allows less."""
    if recipe.max_drop is None or report.accuracy is None or report.search:
        return None
    drop = fall(report.accuracy)
    return drop if drop > recipe.max_drop else None


# ------------------------------------------------------------------------------------------------- networks in memory


def plan_network(
    network: Network,
    settings: Settings,
    plan: CompressionPlan | None = None,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
) -> Report:
    """What `compress_network` would do; the network stays as it is."""
    inputs = inputs or Inputs()
    before = tensor_bytes(stored_tensors(network.model, network.tensors))

    with seeded(settings.seed):
        compressor = compressor_for(network, settings, plan, inputs, progress)
        with fixed_threads():
            done = _searched(compressor, plan, inputs) or Compressed(
                network.model, compressor.plan(settings.recipe, plan), compressor.calibrated_on()
            )
    return report_of(network, done, settings, (before, promised_bytes(before, done.plan)))


def compress_network(
    network: Network,
    settings: Settings,
    plan: CompressionPlan | None = None,
    inputs: Inputs | None = None,
    progress: Progress | None = None,
    extras: Extras | None = None,
) -> Report:
    """Plan (unless a plan is given), decompose and swap in place, and measure before and after."""
    inputs = inputs or Inputs()
    metric = inputs.metric
    before = tensor_bytes(stored_tensors(network.model, network.tensors))

    with seeded(settings.seed):
        compressor = compressor_for(network, settings, plan, inputs, progress)
        dense = metric.measure(network.model) if metric else None

        with fixed_threads():
            done = _searched(compressor, plan, inputs)
            if done:
                if extras is not None:
                    extras.spectra = compressor.spectra(done.plan)
                adopt(network.model, done.model, done.plan)
            else:
                planned = compressor.plan(settings.recipe, plan)
                if extras is not None:
                    extras.spectra = compressor.spectra(planned)
                done = compressor.apply(planned, inplace=True)

        accuracy = metric.summary(dense, metric.measure(network.model)) if metric else None

    stored = stored_tensors(network.model, network.tensors, done.plan)
    report = report_of(network, done, settings, (before, tensor_bytes(stored)), accuracy)
    return replace(report, tensors_sha256=stored_sha256(stored))


def _is_search(recipe: Recipe, plan: CompressionPlan | None) -> bool:
    return plan is None and recipe.target == "max_drop"


def _searched(compressor: Compressor, plan: CompressionPlan | None, inputs: Inputs) -> Compressed | None:
    """The smallest network that keeps the drop, where that is what is asked for."""
    return compressor.search(inputs.searched) if _is_search(compressor.settings.recipe, plan) else None


def compressor_for(
    network: Network,
    settings: Settings,
    plan: CompressionPlan | None,
    inputs: Inputs,
    progress: Progress | None,
) -> Compressor:
    """What compresses this network under these settings.

    Raises:
        DataError: options whose data are missing, or the other way round.
    """
    unused = settings.recipe.given("calib_images", "effort")
    if unused and inputs.calibration is None:
        raise DataError(f"{unused[0]} needs --calib")
    for_training = settings.recipe.epochs is not None
    if inputs.searched and not for_training and not _is_search(settings.recipe, plan):
        raise DataError("--val is what --max-drop without another target searches by: leave it out")

    known = network.preprocessing.input_size if network.preprocessing else None
    return Compressor(
        network.model,
        settings,
        chosen_device(settings.device),
        inputs.calibration,
        progress,
        input_shape=settings.input_size or known or (),
        example=inputs.example,
    )
