"""The same for modules in memory: what `import ttcompress` offers to people who never open a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from inspect import signature
from math import isfinite
from typing import Any, Never

from torch import Tensor, nn

from ttcompress.commands.compress import compress_network, plan_network
from ttcompress.commands.inputs import Inputs, tensor_calibration
from ttcompress.commands.metric import Metric, accuracy_of
from ttcompress.commands.save import save_module
from ttcompress.commands.sweep import SweepPoint, sweep_network
from ttcompress.errors import DataError, PlanError, TTCompressError, shortlist
from ttcompress.measure.accuracy import predict
from ttcompress.networks.factories import check_module
from ttcompress.networks.held import copied
from ttcompress.networks.hub import known_architecture
from ttcompress.networks.opening import Network
from ttcompress.networks.running import NetworkInput, blaming
from ttcompress.networks.weights import tt_parts
from ttcompress.options import OPTIONS, RUN_OPTIONS, check_values
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.records.common import Json, Progress
from ttcompress.records.plan import CompressionPlan
from ttcompress.records.report import Accuracy, Report
from ttcompress.runtime import chosen_device
from ttcompress.settings import Settings

LabelledBatches = Iterable[tuple[NetworkInput, Tensor]]
FLAG = re.compile(r"--([a-z][a-z0-9-]*)")


@contextmanager
def speaking_python() -> Iterator[None]:
    """Messages name options as the command line spells them; here they are keywords."""

    def keyword(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        return name if name in OPTIONS else found[0]

    try:
        yield
    except TTCompressError as error:
        error.args = tuple(FLAG.sub(keyword, str(each)) for each in error.args)
        raise


def compress(
    module: nn.Module,
    *,
    ratio: float | None = None,
    params: int | None = None,
    eps: float | None = None,
    ranks: int | Sequence[int] | None = None,
    conv_ranks: int | Sequence[int] | None = None,
    macs_ratio: float | None = None,
    latency_ratio: float | None = None,
    max_drop: float | None = None,
    plan: CompressionPlan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[LayerRule] = (),
    format: str | None = None,
    rank_multiple: int | str | None = None,
    any_time: bool | None = None,
    in_modes: Sequence[int] = (),
    out_modes: Sequence[int] = (),
    dtype: str | None = None,
    exec: str | None = None,
    tune: bool | None = None,
    input_size: Sequence[int] = (),
    example: NetworkInput | None = None,
    calib: Tensor | Iterable[Any] | None = None,
    calib_images: int | None = None,
    effort: str | None = None,
    outputs: Sequence[str] = (),
    data: LabelledBatches | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    val: LabelledBatches | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
    **unknown: Never,
) -> tuple[nn.Module, Report]:
    """Compress any module in memory; return the compressed module and the report.

    Exactly one of `ratio`, `params`, `eps`, `ranks` and `conv_ranks`, `macs_ratio`, `latency_ratio`, `max_drop` and
    `plan` says how far. All options are those of the command line (docs/cli.md).

    Args:
        module: any network; its Linear and Conv2d layers are candidates.
        example: a batch to count and time with, instead of an `input_size`; without it one of `calib` is taken.
        calib: inputs (N, ...) without labels, as one tensor or as batches (inputs, or tuples that begin with them);
            output error then counts instead of weight error.
        outputs: of a network that returns several tensors those that count, by key, field or index, nested ones with
            dots between: ("boxes", "heads.0"); by default all of them, each weighed by its power. Accuracy takes what is
            called logits, or the only tensor of two dimensions.
        data: labelled batches (inputs, labels) to measure accuracy on, such as a DataLoader; read twice, in the same
            order if `agreement` is to be known. Several inputs of a network are a tuple, or a dict by name, in the
            place of one, here and in `calib`: ((ids, mask), labels), ({"ids": ids, "mask": mask}, labels).
        metric: instead of `data`, any function of the module; its values before and after go into the report. With
            `max_drop` and no `val` the search goes by it: higher is better, `max_drop` is in its own unit.
        val: labelled batches to search by, with `max_drop` and no other target; read once a point.
        layers: rules for single layers, each with a pattern: `LayerRule("features.*", format="chain")`.
        inplace: change `module` itself instead of a copy.

    Raises:
        TTCompressError: options that contradict each other or do not fit the module.
        TypeError: a keyword that there is not, with the nearest that there is.

    >>> import torch, ttcompress
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> small, report = ttcompress.compress(net, ratio=1.5)
    >>> report.compression >= 1.5
    True
    """
    recipe = _recipe(locals(), compress)
    with speaking_python():
        check_module(module)
        _check_dense(module)
        _check_measures(recipe, plan, data, metric, val)
        model = module if inplace else copied(module)
        settings = Settings.of(recipe)
        inputs = replace(_inputs(settings, calib, data, metric, val, progress), example=example)
        return model, compress_network(_network(model), settings, plan, inputs, progress)


def plan(
    module: nn.Module,
    *,
    ratio: float | None = None,
    params: int | None = None,
    eps: float | None = None,
    ranks: int | Sequence[int] | None = None,
    conv_ranks: int | Sequence[int] | None = None,
    macs_ratio: float | None = None,
    latency_ratio: float | None = None,
    max_drop: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[LayerRule] = (),
    format: str | None = None,
    rank_multiple: int | str | None = None,
    any_time: bool | None = None,
    in_modes: Sequence[int] = (),
    out_modes: Sequence[int] = (),
    dtype: str | None = None,
    exec: str | None = None,
    tune: bool | None = None,
    input_size: Sequence[int] = (),
    example: NetworkInput | None = None,
    calib: Tensor | Iterable[Any] | None = None,
    calib_images: int | None = None,
    effort: str | None = None,
    outputs: Sequence[str] = (),
    val: LabelledBatches | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    **unknown: Never,
) -> CompressionPlan:
    """Say what `compress` would do with the same keywords; `compress(module, plan=...)` then does it.

    Raises:
        TTCompressError: options that contradict each other or do not fit the module.
        TypeError: a keyword that there is not, with the nearest that there is.

    >>> import torch, ttcompress
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> planned = ttcompress.plan(net, ranks=2, format="lowrank")
    >>> [(layer.fqn, layer.tt_ranks) for layer in planned.layers]
    [('0', (1, 2, 1))]
    >>> small, report = ttcompress.compress(net, plan=planned)
    >>> report.params_after == planned.params_after
    True
    """
    recipe = _recipe(locals(), plan)
    with speaking_python():
        check_module(module)
        _check_dense(module)
        _check_measures(recipe, None, None, None, val)
        settings = Settings.of(recipe)
        inputs = replace(_inputs(settings, calib, None, None, val, progress), example=example)
        return plan_network(_network(module), settings, None, inputs, progress).plan


def sweep(
    module: nn.Module,
    *,
    ratios: Sequence[float],
    formats: Sequence[str] = (),
    max_drop: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[LayerRule] = (),
    format: str | None = None,
    rank_multiple: int | str | None = None,
    any_time: bool | None = None,
    in_modes: Sequence[int] = (),
    out_modes: Sequence[int] = (),
    dtype: str | None = None,
    exec: str | None = None,
    tune: bool | None = None,
    input_size: Sequence[int] = (),
    example: NetworkInput | None = None,
    calib: Tensor | Iterable[Any] | None = None,
    calib_images: int | None = None,
    effort: str | None = None,
    outputs: Sequence[str] = (),
    data: LabelledBatches | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    **unknown: Never,
) -> list[SweepPoint]:
    """Compress any module in memory to several sizes, mildest first; statistics and spectra are computed once.

    Every point is what `compress` with `ratio` and the other keywords gives: its `module` and `report`. The module
    itself stays as it is.

    Args:
        ratios: parameters before over after, one a point.
        formats: every ratio in each of these formats, instead of `format`.
        max_drop: marks the smallest network that loses no more (`point.smallest`), which needs `data` or `metric`.
        data, metric, calib, example, layers: as in `compress`.

    Raises:
        TTCompressError: options that contradict each other or do not fit the module.
        TypeError: a keyword that there is not, with the nearest that there is.

    >>> import torch, ttcompress
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    >>> points = ttcompress.sweep(net, ratios=[1.5, 3])
    >>> [point.report.compression >= point.ratio for point in points]
    [True, True]
    """
    recipe = _recipe(locals(), sweep)
    with speaking_python():
        check_module(module)
        _check_dense(module)
        _check_measures(recipe, None, data, metric, None)
        check_values(ratios=_listed(ratios), formats=tuple(formats) or None)
        if max_drop is not None and data is None and metric is None:
            raise DataError("max_drop marks by accuracy: give data or metric")
        model = copied(module)
        known = _inputs(Settings.of(recipe), calib, data, metric, None, progress)
        inputs = replace(known, searched=None, example=example)
        network = _network(model)
        return sweep_network(network, recipe, _listed(ratios), tuple(formats), inputs, progress)


def evaluate(
    module: nn.Module, data: LabelledBatches, *, device: str = "auto", progress: Progress | None = None
) -> Accuracy:
    """Measure top-1 and top-5 accuracy, in percent, on labelled batches (inputs, labels).

    Raises:
        DataError: no batch, labels that are no classes, inputs that the network does not take, NaN.

    >>> import torch, ttcompress
    >>> net = torch.nn.Linear(4, 2)
    >>> ttcompress.evaluate(net, [(torch.eye(4), net(torch.eye(4)).argmax(1))]).top1
    100.0
    """
    with speaking_python():
        where = chosen_device(device)
        return predict(module.to(where), data, where, progress).accuracy()


def save(module: nn.Module, report: Report, path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a module that `compress` or `load` made to a compressed file; `load(path, factory=...)` reads it back.

    The report of the file is of the module as it is: after a training in one's own loop it leaves out what was measured
    before.

    Raises:
        CheckpointError: the file exists and `force` is not set, or its folder does not.
        PlanError: the TT layers of the module are not those of the report.

    >>> import tempfile, torch, ttcompress
    >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    >>> small, report = ttcompress.compress(build(), ratio=1.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ttcompress.save(small, report, f"{folder}/net-tt.safetensors")
    ...     again = ttcompress.load(f"{folder}/net-tt.safetensors", factory=build)
    >>> torch.equal(again(torch.ones(64)), small.eval()(torch.ones(64)))
    True
    """
    with speaking_python():
        save_module(module, report, path, force)


# ------------------------------------------------------------------------------------------------------------ keywords


def _network(module: nn.Module) -> Network:
    """A module as the commands take it; of a library's own class a file can say how it is built."""
    return Network(module, module.state_dict(), known_architecture(module))


def _recipe(given: Mapping[str, Any], function: Callable[..., Any]) -> Recipe:
    """The recipe that the keywords of a call state.

    Raises:
        TypeError: there is no such keyword.
        PlanError: a value out of range or of the wrong kind.
    """
    check_keywords(given, function)
    # `calib`, `data` and `val` name files on the command line and hold tensors here; a plan is no part of a recipe.
    of_recipe = RUN_OPTIONS.keys() - {"calib", "data", "val"} | {"layers"}
    stated = {name: _listed(value) for name, value in given.items() if name in of_recipe}
    with speaking_python():
        return Recipe(**stated)


def check_keywords(given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """See that a call has no keywords but those of the function, given its local names.

    Raises:
        TypeError: it has one, with the nearest that there is.
    """
    known = [name for name in signature(function).parameters if name not in ("module", "unknown")]
    for name in given["unknown"]:
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TypeError(f"{function.__name__}() has no keyword {name!r}; did you mean {nearest!r}?")


def _listed(value: Any) -> Any:
    """A value as recipes have it: NumPy's numbers and arrays are plain numbers and tuples there."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(_listed, value)) if isinstance(value, list | tuple) else value


def _check_dense(module: nn.Module) -> None:
    """A second round would know nothing of the weights that the first one replaced."""
    names = [name or "the module" for name in tt_parts(module)]
    if names:
        raise PlanError(
            f"{shortlist(names)}: in TT form already; compress the dense network instead, "
            "which `ttcompress expand FILE -o dense.pt` gives back"
        )


def _check_measures(
    recipe: Recipe,
    plan: CompressionPlan | None,
    data: LabelledBatches | None,
    metric: Callable[[nn.Module], float] | None,
    val: LabelledBatches | None,
) -> None:
    if data is not None and metric is not None:
        raise PlanError("give data or metric, not both")
    if recipe.max_drop is not None and (plan is not None or recipe.target != "max_drop"):
        raise PlanError(
            "max_drop beside another target is a gate of the command line: look at the report instead"
        )
    for name, batches in (("data", data), ("val", val)):
        if batches is not None and iter(batches) is batches:
            raise DataError(f"{name} is read more than once: give a list or a DataLoader, not an iterator")


def _inputs(
    settings: Settings,
    calib: Tensor | Iterable[Any] | None,
    data: LabelledBatches | None,
    metric: Callable[[nn.Module], float] | None,
    val: LabelledBatches | None,
    progress: Progress | None,
) -> Inputs:
    device = chosen_device(settings.device)
    measured = searched = None

    if val is not None:
        searched = accuracy_of(lambda: val, "val", device, progress, settings.outputs)
    if data is not None:
        measured = accuracy_of(lambda: data, "data", device, progress, settings.outputs)
    elif metric is not None:
        name = getattr(metric, "__name__", "metric")
        measured = Metric(partial(_finite, metric, name), partial(_metric_json, name))
        if searched is None and settings.recipe.target == "max_drop":
            searched = measured

    return Inputs(
        metric=measured,
        searched=searched,
        calibration=None if calib is None else tensor_calibration(calib, settings),
    )


def _finite(metric: Callable[[nn.Module], float], name: str, module: nn.Module) -> float:
    with blaming(f"{name} failed"):
        value = float(metric(module))
    if not isfinite(value):
        raise DataError(f"{name} returned {value}, which no report can hold")
    return value


def _metric_json(name: str, dense: float, compressed: float) -> Json:
    return {"metric": name, "dense": dense, "compressed": compressed, "n": None, "interval": None}
