"""The verbs of the command line: parse, call, translate errors, print. What is to be done is decided in `commands`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import cloup

from ttcompress.cli_options import PATH, stated_recipe, takes
from ttcompress.cli_pages import PageRequest, Verb, asked_page, sweep_page
from ttcompress.errors import (
    CheckpointError,
    PlanError,
    TrainingStoppedError,
    TTCompressError,
    is_out_of_memory,
)
from ttcompress.options import flag
from ttcompress.records.common import WARNING, printable
from ttcompress.terminal import (
    log_epoch,
    logs_epochs,
    print_csv,
    print_json,
    print_lines,
    print_table,
    working,
    write_all_characters,
)
from ttcompress.torchrun import leads
from ttcompress.version import __version__

if TYPE_CHECKING:
    from ttcompress.recipe import Recipe
    from ttcompress.records.common import Json
    from ttcompress.records.plan import CompressionPlan
    from ttcompress.records.report import Report

DEBUG = "TTCOMPRESS_DEBUG"
STYLE = cloup.HelpFormatter.settings(max_width=110)
COMPLETION = """\b
Shell completion: put this line into ~/.bashrc (for other shells zsh_source, fish_source):
  eval "$(_TTCOMPRESS_COMPLETE=bash_source ttcompress)"
"""


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "\n".join(["\b", "Examples:", *(f"  ttcompress {line}" for line in lines)])


@cloup.group(
    context_settings={"help_option_names": ["-h", "--help"]}, formatter_settings=STYLE, epilog=COMPLETION
)
@click.version_option(__version__, prog_name="ttcompress", message="%(prog)s %(version)s")
def commands() -> None:
    """Compress pretrained PyTorch networks by Tensor-Train decomposition, after training."""


@commands.command(
    cls=Verb,
    epilog=examples(
        "compress resnet20.th --ratio 2 --calib cifar10:data --data cifar10:data",
        "compress vgg16.pt --ranks 4 -o small.safetensors",
    ),
)
@cloup.argument(
    "checkpoint", type=PATH, help="A dense checkpoint: .pt, .pth, .th, .safetensors, or a folder of shards."
)
@takes("compress")
def compress(
    checkpoint: Path,
    output: Path | None,
    force: bool,
    dry_run: bool,
    resume: bool,
    html: Path | None,
    json: bool,
    **given: Any,
) -> None:
    """Compress CHECKPOINT into STEM-tt.safetensors, with a report of what was gained and lost.

    With --arch none no network is needed; sharded checkpoints then become a folder STEM-tt.
    """
    if dry_run and html:
        raise PlanError("--dry-run writes nothing: leave out --html")
    if dry_run:
        _plan(checkpoint, None, force, json, given)
        return

    from ttcompress.commands.compress import compress_and_train

    recipe, plan = _recipe_and_plan(given)
    page = asked_page(html, force)
    with working(leads()) as progress:
        done = compress_and_train(
            checkpoint,
            output,
            recipe,
            plan,
            force=force,
            resume=resume,
            progress=progress,
            log=log_epoch if logs_epochs() else None,
            extras=page.extras if page else None,
        )

    _show(done.report, done.output, json, page)
    if done.excess_drop is not None:
        allowed = f"--max-drop allows {recipe.max_drop:g}"
        what = done.report.accuracy.get("metric") if done.report.accuracy else None
        by = (
            f"{what} is worse by {done.excess_drop:.4g}"
            if what
            else f"accuracy falls by {done.excess_drop:.2f} points"
        )
        _fail(f"{by}, {allowed}; {done.output} is written", 1)


@commands.command(
    "plan",
    cls=Verb,
    epilog=examples("plan --arch vgg16 --ranks 4 -o plan.json", "plan resnet20.th --ratio 3 --format chain"),
)
@cloup.argument(
    "checkpoint", type=PATH, required=False, help="A dense checkpoint; not needed with --arch and ranks."
)
@takes("plan")
def plan_command(checkpoint: Path | None, output: Path | None, force: bool, json: bool, **given: Any) -> None:
    """Show what compress would do; -o writes it as an editable plan."""
    _plan(checkpoint, output, force, json, given)


def _plan(
    checkpoint: Path | None, output: Path | None, force: bool, json: bool, given: dict[str, Any]
) -> None:
    from ttcompress.commands.compress import plan_file
    from ttcompress.files.output import check_output
    from ttcompress.planning.plan_file import write_plan

    recipe, plan = _recipe_and_plan(given)
    if output:
        check_output(output, force)
    with working(leads()) as progress:
        planned = plan_file(checkpoint, recipe, plan, progress=progress)
    if output:
        write_plan(output, planned.plan)
    _show(planned, None, json)


@commands.command(
    "finetune",
    cls=Verb,
    epilog=examples(
        "finetune resnet20-tt.safetensors --train cifar10:data --data cifar10:data",
        "finetune resnet20-tt.safetensors --train imagefolder:photos --epochs 5 --resume",
    ),
)
@cloup.argument("model", type=PATH, required=False, help="A compressed file or a dense checkpoint.")
@takes("finetune")
def finetune_command(
    model: Path | None,
    output: Path | None,
    force: bool,
    resume: bool,
    html: Path | None,
    json: bool,
    **given: Any,
) -> None:
    """Train MODEL further into STEM-ft.safetensors; stopped or killed, it goes on with --resume."""
    from ttcompress.commands.finetune import default_output, finetune_file

    recipe, plan = _recipe_and_plan(given)
    target = output or default_output(model, recipe)
    page = asked_page(html, force)
    with working(leads()) as progress:
        done = finetune_file(
            model,
            target,
            recipe,
            plan,
            force=force,
            resume=resume,
            progress=progress,
            log=log_epoch if logs_epochs() else None,
            extras=page.extras if page else None,
        )
    _show(done, target, json, page)


@commands.command(
    cls=Verb,
    epilog=examples(
        "evaluate resnet20.th --data cifar10:data", "evaluate net-tt.safetensors --data imagefolder:val"
    ),
)
@cloup.argument("model", type=PATH, help="A dense checkpoint or a compressed file.")
@takes("evaluate")
def evaluate(model: Path, html: Path | None, force: bool, json: bool, **given: Any) -> None:
    """Measure the accuracy of MODEL on --data."""
    from ttcompress.commands.evaluate import evaluate_file
    from ttcompress.report.results import accuracy_json, accuracy_lines

    page = asked_page(html, force)
    with working() as progress:
        accuracy, data = evaluate_file(model, stated_recipe(given), progress=progress)

    result = accuracy_json(accuracy, data)
    if page:
        result["page"] = page.stopped()
        page.write([{**_known(model), "evaluation": result, "page": result["page"]}])
    if json:
        print_json(result)
    else:
        print_lines([*accuracy_lines(accuracy, data), *_page_line(page)])


@commands.command(
    "sweep",
    cls=Verb,
    epilog=examples(
        "sweep resnet20.th --ratios 1.5,2,3,4,6 --calib cifar10:data --data cifar10:data -o sizes",
        "sweep net.pt --ratios 2,3 --formats chain,matrix --data cifar10:data --max-drop 1 -o sizes",
    ),
)
@cloup.argument("checkpoint", type=PATH, help="A dense checkpoint.")
@takes("sweep")
def sweep_command(
    checkpoint: Path,
    ratios: tuple[float, ...],
    formats: tuple[str, ...] | None,
    output: Path,
    html: Path | None,
    force: bool,
    csv: bool,
    json: bool,
    **given: Any,
) -> None:
    """Compress CHECKPOINT to several sizes into a folder: a file each, a table, a page with the curve.

    Stopped or killed, the same command goes on with the points that are missing.
    """
    from ttcompress.commands.sweep import sweep_file
    from ttcompress.options import check_values
    from ttcompress.report import text

    check_values(ratios=ratios, formats=formats)
    recipe = stated_recipe(given)
    page = sweep_page(html, output, force)
    with working() as progress:
        points = sweep_file(
            checkpoint,
            output,
            recipe,
            ratios,
            formats or (),
            force=force,
            progress=progress,
            extras=page.extras,
        )

    rows = [point.to_json() for point in points]
    shown = {
        "source": checkpoint.name,
        "max_drop": recipe.max_drop,
        "points": rows,
        "page": page.stopped(),
    }
    page.write_sweep(shown, [point.report.to_json() for point in points])
    if json:
        print_json(shown)
    elif csv:
        print_csv(rows)
    else:
        print_table(text.render_sweep(shown))
        print_lines(_page_line(page))


@commands.command(
    "report",
    cls=Verb,
    epilog=examples("report net-tt.safetensors", "report small.safetensors smaller.safetensors"),
)
@cloup.argument("files", type=PATH, nargs=-1, required=True, help="Compressed files, or folders of shards.")
@takes("report")
def report_command(files: tuple[Path, ...], html: Path | None, force: bool, json: bool) -> None:
    """Show what compressed FILES hold, several side by side."""
    from ttcompress.report import text

    page = asked_page(html, force)
    reports = [text.read_report(file) for file in files]
    shown = [report.to_json() for report in reports]
    if page:
        page.write(shown)

    several = len(reports) > 1
    if json:
        print_json(shown if several else shown[0])
    else:
        print_table(text.render_side_by_side(reports) if several else text.render(reports[0]))
        print_lines(_page_line(page))


@commands.command(
    cls=Verb,
    epilog=examples(
        "expand net-tt.safetensors -o dense.pt",
        "expand net-tt.safetensors --factors -o plain.safetensors",
        "expand shards-tt -o shards-dense",
    ),
)
@cloup.argument("file", type=PATH, help="A compressed file, or a folder of shards.")
@takes("expand")
def expand(file: Path, output: Path, factors: bool, force: bool, **given: Any) -> None:
    """Turn compressed FILE back into an ordinary dense checkpoint: .pt, .pth or .safetensors.

    With --factors into one whose layers are torch's own but still factored where that is faster.
    """
    from ttcompress.commands.expand import expand_file, expand_to_factors
    from ttcompress.report.results import factors_lines

    if factors:
        stated = {name: value for name, value in given.items() if value is not None}
        with working():
            made = expand_to_factors(file, output, force=force, **stated)
        print_lines(factors_lines(vars(made), output))
        return
    _refuse_without("--factors", given)

    done = expand_file(file, output, force)
    print_lines(
        [f"{output}: {len(done.plan.layers)} weights rebuilt, {done.plan.params_before:,} parameters"]
    )


@commands.command(
    "export",
    cls=Verb,
    epilog=examples("export net-tt.safetensors --onnx net.onnx", "export vgg16.pt --onnx vgg16.onnx"),
)
@cloup.argument("file", type=PATH, help="A compressed file or a dense checkpoint.")
@takes("export")
def export_command(file: Path, onnx: Path, json: bool, **given: Any) -> None:
    """Write FILE for runtimes that read ONNX, and compare it with torch there."""
    from ttcompress.commands.export import export_file
    from ttcompress.report.results import export_lines

    with working():
        done = export_file(file, onnx, **given)
    if json:
        print_json(done.to_json())
    else:
        print_lines(export_lines(done.to_json(), onnx))


@commands.command(
    cls=Verb,
    epilog=examples(
        "bench net-tt.safetensors",
        "bench net-tt.safetensors --runtime onnx --threads 1",
        "bench net-tt.safetensors --batch-sizes 1,8 --device cuda --save",
    ),
)
@cloup.argument("file", type=PATH, help="A compressed file.")
@takes("bench")
def bench(
    file: Path,
    batch_sizes: Sequence[int] | None,
    fail_if_slower: bool,
    save: bool,
    html: Path | None,
    force: bool,
    json: bool,
    device: str | None,
    threads: int | None,
    runtime: str | None,
    tune: bool | None,
    **given: Any,
) -> None:
    """Measure time and memory of FILE against its dense network, and of each compressed layer."""
    from ttcompress.measure.bench import bench_file, is_slower, save_bench
    from ttcompress.options import OPTIONS
    from ttcompress.report import text
    from ttcompress.runtime import chosen_device, with_threads

    sizes = batch_sizes or OPTIONS["batch_sizes"].default
    runtime = runtime or OPTIONS["runtime"].default
    if threads is not None and threads < 1:
        _fail("--threads takes numbers from 1 on", 2)
    in_onnxruntime = runtime.startswith("onnx")
    where = chosen_device(device or ("cpu" if in_onnxruntime else OPTIONS["device"].default))
    page = asked_page(html, force)
    with working() as progress, with_threads(threads):
        result = bench_file(
            file,
            batch_sizes=sizes,
            device=where,
            runtime=runtime,
            tune=bool(tune),
            progress=progress,
            **given,
        )

    if save:
        save_bench(file, result)
    shown = result
    if page:
        shown = {**result, "page": page.stopped()}
        page.write([{**_known(file), "bench": result, "page": shown["page"]}])
    if json:
        print_json(shown)
    else:
        print_table(text.render_bench(result))
        print_lines(_page_line(page))
    if fail_if_slower and is_slower(result):
        _fail("the compressed network is slower", 1)


@commands.command(cls=Verb, epilog=examples("demo", "report ttcompress-demo/digits-tt.safetensors"))
def demo() -> None:
    """Train a small network on scikit-learn's digits, then run the real commands on it. No download."""
    from ttcompress.commands.demo import run_demo

    run_demo(click.echo, lambda arguments: commands.main(arguments, "ttcompress", standalone_mode=False))


# ----------------------------------------------------------------------------------------------------------------- edge


def _recipe_and_plan(given: dict[str, Any]) -> tuple[Recipe, CompressionPlan | None]:
    """The recipe with the command line over it, and the plan where one is given."""
    recipe = stated_recipe(given)
    if not given["plan"]:
        return recipe, None

    from ttcompress.planning.plan_file import read_plan

    return recipe, read_plan(given["plan"])


def _refuse_without(needed: str, given: dict[str, Any]) -> None:
    """End where options are stated that mean nothing without another one."""
    for name, value in given.items():
        if value is not None:
            _fail(f"{flag(name)} needs {needed}", 2)


def _known(file: Path) -> Json:
    """What a compressed file says of itself as JSON; of a dense checkpoint its name."""
    from ttcompress.report.text import read_report

    try:
        return read_report(file).to_json()
    except CheckpointError:
        return {"file": file.name}


def _page_line(page: PageRequest | None) -> list[str]:
    return [f"page              {page.path}"] if page else []


def _show(report: Report, file: Path | None, as_json: bool, page: PageRequest | None = None) -> None:
    """Print a report, and write the page of it."""
    if not leads():
        return
    from ttcompress.report import text

    for note in report.plan.notes:
        if note.startswith(WARNING):
            click.echo(f"ttcompress: {printable(note)}", err=True)

    shown = text.with_file(report, file) if file else report
    data = shown.to_json()
    if page:
        data["page"] = page.stopped()
        page.write([data])
    if as_json:
        print_json(data)
    else:
        print_table(text.render(shown))
        print_lines(_page_line(page))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 internal error, 2 usage or bad input, 130 interrupted."""
    try:
        write_all_characters()
        commands.main(arguments, "ttcompress", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except TrainingStoppedError as error:
        _fail(str(error), 130)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except TTCompressError as error:
        _fail(str(error), 2)
    except (click.Abort, KeyboardInterrupt) as error:
        # click makes its own exception of the one that says what was kept.
        _fail(str(error.__cause__ or error) or "interrupted; nothing was written", 130)
    except BrokenPipeError:
        # Whoever read our output has seen enough; what is still held back must not be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}", 2)
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        if is_out_of_memory(error):
            _fail("out of memory; a smaller --batch-size takes less, --device cpu none of a GPU's", 2)
        what = " ".join(str(error).split())[:300]
        _fail(f"internal error: {type(error).__name__}: {what} ({DEBUG}=1 shows the traceback)", 1)


def _fail(message: str, code: int) -> None:
    """End with one line that says what is wrong."""
    if os.environ.get(DEBUG) == "1" and sys.exc_info()[0] not in (None, KeyboardInterrupt):
        import traceback

        traceback.print_exc()
    click.echo(f"ttcompress: {printable(' '.join(message.split()))}", err=True)
    sys.exit(code)
