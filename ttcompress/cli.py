"""The command line: parse, call, translate errors, print. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ttcompress.errors import TrainingStoppedError, TTCompressError
from ttcompress.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ttcompress.recipe import Recipe
    from ttcompress.records.common import Json, Progress
    from ttcompress.records.plan import CompressionPlan
    from ttcompress.records.report import Report

F = TypeVar("F", bound=Callable[..., Any])
DEBUG = "TTCOMPRESS_DEBUG"


class Numbers(click.ParamType[Any]):
    """A number, or several with commas between."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "A,B,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Parse `4,4,8`."""
        try:
            return tuple(self.kind(part) for part in value.split(",")) if isinstance(value, str) else value
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__} numbers such as 4,4,8", param, ctx)


class Ranks(Numbers):
    """One rank for all cuts, or the inner TT-ranks of one layer."""

    def __init__(self) -> None:
        super().__init__(int)
        self.name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `4` or `22,20,20`."""
        numbers = super().convert(value, param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


def _options(*options: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


PATH = click.Path(path_type=Path)

source_options = _options(
    click.option(
        "--arch", metavar="REF", help="Architecture: NAME, torchvision:NAME, path/to/net.py:factory, or none."
    ),
    click.option("--key", metavar="NAME", help="Which state dict of a checkpoint that holds several."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
device_option = click.option("--device", metavar="D", help="auto (default), cpu, cuda or cuda:N.")
input_size_option = click.option(
    "--input-size", type=Numbers(int), help="Of one input, such as 3,224,224 (default: as recorded)."
)
network_options = _options(source_options, device_option, json_option)
data_options = _options(
    click.option("--data", metavar="DATA", help="Labelled images for accuracy: KIND:PATH[@train|@test] or digits."),
    click.option("--mean", type=Numbers(float), metavar="M", help="Mean of each channel, pixels in [0, 1]."),
    click.option("--std", type=Numbers(float), metavar="S", help="Standard deviation of each channel."),
    click.option("--batch-size", type=int, metavar="N", help="Images a batch (default 128)."),
    click.option("--workers", type=int, metavar="N", help="Processes that read image folders (default 0)."),
)
plan_options = _options(
    click.option("--ranks", type=Ranks(), help="TT-ranks of Linear layers: one number, or inner ranks A,B,.."),
    click.option("--conv-ranks", type=Ranks(), help="TT-ranks of Conv2d layers, likewise."),
    click.option("--eps", type=float, help="Largest relative error of each weight, fewest parameters for it."),
    click.option("--ratio", type=float, help="Compression over all parameters, least error for it."),
    click.option("--params", type=int, help="The same as a number of parameters."),
    click.option("--macs-ratio", type=float, help="The same over multiply-adds, layers run by their cores."),
    click.option("--latency-ratio", type=float, help="The same over the time of one input, measured on --device."),
    click.option(
        "--max-drop", type=float, metavar="P", help="Alone: smallest network within P points on --val; else a gate."
    ),
    click.option("--val", metavar="DATA", help="Labelled images that --max-drop searches by (default split train)."),
    click.option("--calib", metavar="DATA", help="Unlabelled images: output error counts, not weight error."),
    click.option("--calib-images", type=int, metavar="N", help="How many of them, drawn by the seed (default 1024)."),
    click.option("--effort", type=click.Choice(["fast", "default", "max"]), help="How long --calib may take."),
    click.option("--plan", "plan_path", type=PATH, metavar="FILE", help="A plan written by `plan -o`, edited or not."),
    click.option(
        "--format",
        type=click.Choice(["auto", "matrix", "chain", "naive", "lowrank"]),
        help="auto (default) compares all; with ranks by hand it is matrix for Linear, chain for Conv2d.",
    ),
    click.option(
        "--exec",
        type=click.Choice(["auto", "contract", "chain", "dense"]),
        help="How layers are to run where they can (default: the cheaper way at each call, by a cost model).",
    ),
    click.option("--tune", is_flag=True, default=None, help="Decide that by measurement on --device instead."),
    input_size_option,
    click.option("--in-modes", type=Numbers(int), help="Input factors of the one selected layer (format matrix)."),
    click.option("--out-modes", type=Numbers(int), help="Output factors of the one selected layer."),
    click.option("--include", multiple=True, metavar="P", help="Layers to compress: glob on the name, or re:REGEX."),
    click.option("--exclude", multiple=True, metavar="P", help="Layers to leave dense."),
    click.option(
        "--dtype",
        type=click.Choice(["float16", "bfloat16", "float32", "float64", "int8"]),
        help="Storage type of the cores (default: that of the weight).",
    ),
    click.option("--seed", type=int, help="Seed, recorded in the file (default 0); draws the calibration images."),
    click.option("--recipe", "recipe_path", type=PATH, metavar="FILE", help="TOML file of options; these here win."),
)
train_options = _options(
    click.option(
        "--train", metavar="DATA", help="Training images (default split train); labels are not needed with a teacher."
    ),
    click.option(
        "--teacher", metavar="FILE", help="Network to learn from (default: the dense one, where it is beside MODEL)."
    ),
    click.option(
        "--lr", type=float, metavar="X", help="Highest learning rate (default 0.01 for sgd, 0.001 for adamw)."
    ),
    click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="sgd (default, Nesterov momentum) or adamw."),
    click.option("--schedule", type=click.Choice(["cosine", "step"]), help="Of the learning rate (default cosine)."),
    click.option(
        "--warm-up",
        type=float,
        metavar="E",
        help="Epochs in which the learning rate rises (default 1, a third at most).",
    ),
    click.option(
        "--weight-decay",
        type=float,
        metavar="X",
        help="Of dense weights and of what TT-cores stand for (default 1e-4).",
    ),
    click.option("--clip", type=float, metavar="X", help="Largest norm of a gradient, 0 for any (default 5)."),
    click.option(
        "--ema", type=float, metavar="D", help="Decay of a moving average of the weights, 0 for none (default)."
    ),
    click.option("--label-smoothing", type=float, metavar="X", help="Default 0."),
    click.option(
        "--distill", type=float, metavar="S", help="Share of the teacher in the loss (default 0.9), 0 for none."
    ),
    click.option("--temperature", type=float, metavar="T", help="Of the teacher's answers (default 4)."),
    click.option(
        "--augment", type=click.Choice(["none", "shift", "flip"]), help="Default flip (and shift); digits only shift."
    ),
    click.option("--mixup", type=float, metavar="A", help="Mix images, shares drawn from Beta(A, A); default 0, off."),
    click.option("--cutmix", type=float, metavar="A", help="The same with windows of images."),
    click.option(
        "--precision", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of autocast (default float32)."
    ),
    click.option(
        "--channels-last/--no-channels-last",
        default=None,
        help="Memory format of images and weights (default: on CPUs, and in half precision).",
    ),
    click.option("--compile", is_flag=True, default=None, help="Train the network through torch.compile."),
    click.option("--deterministic", is_flag=True, default=None, help="The same result each time on a GPU too, slower."),
    click.option("--accumulate", type=int, metavar="N", help="Parts in which a batch is computed (default 1)."),
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
output_options = _options(
    click.option("-o", "--output", type=PATH, metavar="OUT", help="Where to write."),
    force_option,
)
resume_option = click.option(
    "--resume", is_flag=True, help="Go on from OUT.training, where the training of the same command was stopped."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ttcompress", message="%(prog)s %(version)s")
def commands() -> None:
    """Compress pretrained PyTorch networks by Tensor-Train decomposition, after training."""


@commands.command()
@click.argument("checkpoint", type=PATH)
@plan_options
@data_options
@network_options
@train_options
@output_options
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--finetune", "epochs", type=int, metavar="N", help="Then train it for N epochs, as `finetune` does.")
@resume_option
def compress(checkpoint: Path, output: Path | None, force: bool, dry_run: bool, resume: bool, **options: Any) -> None:
    """Compress CHECKPOINT into STEM-tt.safetensors, with a report of what was gained and lost.

    With --arch none no network is needed; sharded checkpoints then become a folder STEM-tt.
    """
    if dry_run:
        _plan(checkpoint, None, force, **options)
        return
    from ttcompress.commands import compress as pipeline
    from ttcompress.commands import finetune
    from ttcompress.files import shards
    from ttcompress.report import text as report

    recipe, plan = _recipe_and_plan(options)
    if (recipe.train is None) != (recipe.epochs is None):
        raise click.UsageError("--finetune and --train go together")
    unused = ["--resume"] * resume + recipe.given(*finetune.TRAINING)
    if recipe.epochs is None and unused:
        raise click.UsageError(f"{', '.join(unused)}: only with --finetune")
    if _processes() > 1 and not recipe.is_weights_only:
        raise click.UsageError("compress in one process, then `torchrun ... -m ttcompress finetune`")
    in_shards = recipe.is_weights_only and shards.read_index(checkpoint) is not None
    target = output or Path(f"{shards.stem(checkpoint)}-tt{'' if in_shards else '.safetensors'}")
    resume = resume and finetune.state_file(target).exists()
    with _progress() as progress:
        if resume:
            pipeline.check_repeats(checkpoint, target, recipe, plan)
        else:
            if recipe.train:
                finetune.check_sources(recipe)
            done = pipeline.compress_file(checkpoint, target, recipe, plan, force=force, progress=progress)
        if recipe.train:
            log = _log if progress is None else None
            done = finetune.finetune_file(
                target, target, recipe, plan, force=True, resume=resume, origin=checkpoint, progress=progress, log=log
            )
    if _is_first_process():
        _show(report.with_file(done, target), options["as_json"])
    drop = pipeline.drop_beyond_gate(done, recipe)
    if drop is not None:
        _fail(f"accuracy falls by {drop:.2f} points, --max-drop allows {recipe.max_drop:g}; {target} is written", 1)


@commands.command("plan")
@click.argument("checkpoint", type=PATH, required=False)
@plan_options
@data_options
@network_options
@output_options
def plan_command(checkpoint: Path | None, output: Path | None, force: bool, **options: Any) -> None:
    """Show what compress would do; -o writes it as an editable plan.

    CHECKPOINT may be left out when --arch is given with ranks by hand.
    """
    _plan(checkpoint, output, force, **options)


def _plan(checkpoint: Path | None, output: Path | None, force: bool, **options: Any) -> None:
    from ttcompress.commands import compress as pipeline
    from ttcompress.files.checkpoint import check_output
    from ttcompress.planning.plan_file import write_plan

    recipe, plan = _recipe_and_plan(options)
    if output:
        check_output(output, force)
    with _progress() as progress:
        planned = pipeline.plan_file(checkpoint, recipe, plan, progress=progress)
    if output:
        write_plan(output, planned.plan)
    _show(planned, options["as_json"])


@commands.command("finetune")
@click.argument("model", type=PATH, required=False)
@train_options
@plan_options
@data_options
@network_options
@output_options
@click.option("--epochs", type=int, metavar="N", help="Passes over the training images (default 30).")
@click.option("--from-scratch", is_flag=True, default=None, help="Train --arch from random weights, without MODEL.")
@resume_option
def finetune_command(model: Path | None, output: Path | None, force: bool, resume: bool, **options: Any) -> None:
    """Train MODEL, a compressed file or a dense checkpoint, further into STEM-ft.safetensors."""
    from ttcompress.commands import finetune
    from ttcompress.files import shards
    from ttcompress.report import text as report

    recipe, plan = _recipe_and_plan(options)
    stem = shards.stem(model) if model else str(recipe.arch).rpartition(":")[2]
    target = output or Path(f"{stem}-ft.safetensors")
    with _progress() as progress:
        log = _log if progress is None else None
        done = finetune.finetune_file(
            model, target, recipe, plan, force=force, resume=resume, progress=progress, log=log
        )
    if _is_first_process():
        _show(report.with_file(done, target), options["as_json"])


@commands.command()
@click.argument("model", type=PATH)
@data_options
@network_options
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images.")
def evaluate(model: Path, limit: int | None, as_json: bool, **options: Any) -> None:
    """Accuracy of MODEL, a dense checkpoint or a compressed file, on --data."""
    from ttcompress.commands.evaluate import evaluate_file
    from ttcompress.recipe import Recipe

    recipe = Recipe().override(**options)
    with _progress() as progress:
        accuracy, data = evaluate_file(model, recipe, limit=limit, progress=progress)
    if as_json:
        result = {"accuracy": accuracy.top1, "top5": accuracy.top5, "n": accuracy.n, "interval": accuracy.interval}
        _print_json({**result, "data": data})
        return
    low, high = accuracy.interval
    click.echo(f"{accuracy.top1:.2f} % top-1  (95 % interval {low:.2f} to {high:.2f}, n = {accuracy.n:,}, {data})")
    click.echo(f"{accuracy.top5:.2f} % top-5")


@commands.command("report")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, a list for several files.")
def report_command(files: tuple[Path, ...], as_json: bool) -> None:
    """Show what compressed FILES hold, several side by side."""
    from ttcompress.report import text as report

    reports = [report.read_report(file) for file in files]
    if as_json:
        found = [each.to_json() for each in reports]
        _print_json(found if len(found) > 1 else found[0])
    else:
        _print(report.render_side_by_side(reports) if len(reports) > 1 else report.render(reports[0]))


@commands.command()
@click.argument("file", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT", help="dense.pt, .pth or .safetensors")
@force_option
def expand(file: Path, output: Path, force: bool) -> None:
    """Turn compressed FILE back into an ordinary dense checkpoint."""
    from ttcompress.commands.expand import expand_file

    done = expand_file(file, output, force)
    click.echo(f"{output}: {len(done.plan.layers)} weights rebuilt, {done.plan.params_before:,} parameters")


@commands.command("export")
@click.argument("file", type=PATH)
@click.option("--onnx", "output", type=PATH, required=True, metavar="OUT", help="Where to write.")
@input_size_option
@source_options
@force_option
@json_option
def export_command(file: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Write FILE, compressed or a dense checkpoint, for runtimes that read ONNX, and compare it with torch there."""
    from ttcompress.commands.export import export_file
    from ttcompress.report.text import format_bytes

    done = export_file(file, output, **options)
    if as_json:
        _print_json(done.to_json())
        return
    operators = ", ".join(f"{count} {name}" for name, count in done.operators.items())
    size, tensors = format_bytes(done.file_bytes), format_bytes(done.tensor_bytes)
    click.echo(f"file        {output}, {size} (tensors of the network {tensors})")
    click.echo(f"input       {done.dtype} (batch, {', '.join(map(str, done.input_shape))})")
    click.echo(f"operators   opset {done.opset}: {operators}")
    if done.difference is None:
        click.echo("difference  not measured: onnxruntime is not installed")
    else:
        click.echo(f"difference  {done.difference:.1e} of the largest output, onnxruntime against torch")


@commands.command()
@click.argument("file", type=PATH)
@click.option("--batch-sizes", type=Numbers(int), help="Images a batch (default 1,32).")
@input_size_option
@click.option("--training", is_flag=True, help="Training steps (forward and backward) instead of inference.")
@click.option("--fail-if-slower", is_flag=True, help="Exit with 1 if the compressed network is slower by over 5 %.")
@click.option("--save", is_flag=True, help="Write the figures into the report of FILE.")
@click.option("--arch", metavar="REF", help="Architecture of a file that records none: path/to/net.py:factory.")
@device_option
@json_option
def bench(
    file: Path, batch_sizes: Sequence[int] | None, fail_if_slower: bool, save: bool, as_json: bool, **options: Any
) -> None:
    """Measure time and memory of compressed FILE against its dense network, and of each compressed layer."""
    from ttcompress.measure.bench import bench_file, is_slower, save_bench
    from ttcompress.recipe import Recipe
    from ttcompress.report import text as report
    from ttcompress.runtime import device_of

    device = device_of(Recipe().override(device=options.pop("device")))
    with _progress() as progress:
        result = bench_file(file, batch_sizes=batch_sizes or (1, 32), device=device, progress=progress, **options)
    if save:
        save_bench(file, result)
    if as_json:
        _print_json(result)
    else:
        _print(report.render_bench(result))
    if fail_if_slower and is_slower(result):
        _fail("the compressed network is slower", 1)


@commands.command()
def demo() -> None:
    """Train a small network on scikit-learn's digits, then run the real commands on it. No download."""
    from ttcompress.commands.demo import run_demo

    run_demo(click.echo, lambda arguments: commands.main(arguments, "ttcompress", standalone_mode=False))


def _recipe_and_plan(options: dict[str, Any]) -> tuple[Recipe, CompressionPlan | None]:
    """The recipe with the command line over it, and the plan where one is given."""
    from ttcompress.recipe import Recipe

    path, plan_path = options["recipe_path"], options["plan_path"]
    given = {name: value for name, value in options.items() if name in Recipe.__dataclass_fields__}
    recipe = (Recipe.from_toml(path) if path else Recipe()).override(**given)
    if not plan_path:
        return recipe, None
    from ttcompress.planning.plan_file import read_plan

    return recipe, read_plan(plan_path)


def _show(report: Report, as_json: bool) -> None:
    from ttcompress.report.text import render

    if as_json:
        _print_json(report.to_json())
    else:
        _print(render(report))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def _print(renderable: RenderableType) -> None:
    """On a terminal in its width; elsewhere wide enough that nothing is cut."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(renderable)


def _log(record: Json) -> None:
    click.echo(json.dumps(record), err=True)


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _processes() -> int:
    """How many torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A progress bar on stderr, on a terminal only."""
    if not sys.stderr.isatty() or not _is_first_process():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("reading", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total or None)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 internal error, 2 usage or bad input, 130 interrupted."""
    try:
        commands.main(arguments, "ttcompress", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except TrainingStoppedError as error:
        _fail(str(error), 130)
    except (click.ClickException, TTCompressError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _fail(" ".join(message.split()), 2)
    except (click.Abort, KeyboardInterrupt) as error:
        # click makes its own exception of the one that says what was kept.
        _fail(str(error.__cause__ or error) or "interrupted; nothing was written", 130)
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        what = " ".join(str(error).split())[:300]
        _fail(f"internal error: {type(error).__name__}: {what} ({DEBUG}=1 shows the traceback)", 1)


def _fail(message: str, code: int) -> None:
    if os.environ.get(DEBUG) == "1" and sys.exc_info()[0] not in (None, KeyboardInterrupt):
        import traceback

        traceback.print_exc()
    click.echo(f"ttcompress: {message}", err=True)
    sys.exit(code)
