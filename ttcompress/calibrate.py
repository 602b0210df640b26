"""Calibration: what unlabelled images say about each layer, and cores fitted to output error instead of weight error.

Moments of inputs and outputs come from streaming passes. TT-SVD is whitened by them, and least-squares sweeps go
through the layers in forward order against the inputs that the compressed network itself has. stages.py composes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.errors import DataError
from ttcompress.evaluate import forward
from ttcompress.surgery import layer_from, swap
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.decompose import decompose_weight, spread_norm
from ttcompress.tt.fit import fit_cores, output_error
from ttcompress.tt.shapes import Tensorization
from ttcompress.tt.whiten import ModeMetric, Moments, mode_metrics, output_cost, whitened_svd
from ttcompress.types import CompressionPlan, LayerPlan, Progress

POSITIONS = 64
"""Output positions of an image that enter the moments of a convolution; larger maps are sampled on a grid."""
GROUP_BYTES = 1 << 31
"""Moments that are held at a time; layers beyond take another pass over the images."""
EVEN = 0.2
"""Share of the output metric that is spread evenly: a few hundred images do not show all that matters."""
SWEEP_IMAGES = 512
"""Images that a layer's least-squares fit sees."""
DEFAULT_IMAGES = 1024
LEAST_IMAGES = 16
HELD_OUT = 8
"""One image in so many decides instead of being learned from."""


@dataclass(frozen=True)
class Calibration:
    """Unlabelled images as batches of network input, on the CPU.

    `fitting(number)` gives the `num_images` to learn from, in another order for every number; `held_out()` those that
    decide.
    """

    name: str
    num_images: int
    num_held_out: int
    fitting: Callable[[int], Iterable[Tensor]]
    held_out: Callable[[], Iterable[Tensor]]

    def cast(self, dtype: torch.dtype) -> Calibration:
        """The same images in another type; whole numbers, such as tokens, stay as they are."""

        def each(batches: Iterable[Tensor]) -> Iterator[Tensor]:
            return (batch.to(dtype) if batch.is_floating_point() else batch for batch in batches)

        return replace(self, fitting=lambda number: each(self.fitting(number)), held_out=lambda: each(self.held_out()))


@dataclass
class LayerStatistics:
    """Moments of one layer: inputs (in, kh, kw) row-major, the same on held-out images, gradients at its outputs.

    They are averages over the `positions` of an image at which a convolution has its weight.
    """

    inputs: Moments
    held_out: Moments
    outputs: Moments
    positions: int = 1

    def metrics(self, tensorization: Tensorization, diagonal: bool = False) -> list[ModeMetric]:
        """Roots of the metric of each mode; squared norms in it add up over layers to a change of the network."""
        first, *rest = mode_metrics(tensorization, self.inputs, self.outputs.blended(EVEN), diagonal)
        return [ModeMetric(first.out * sqrt(self.positions), first.inp), *rest]


Statistics = Mapping[str, LayerStatistics]
"""By fqn, in the order in which the network runs the layers."""


def draw(
    name: str, available: int, asked: int | None, seed: int, batches: Callable[[Sequence[int]], Iterable[Tensor]]
) -> Calibration:
    """Calibration on `asked` of the available images, drawn by the seed; `batches(indices)` reads those at `indices`.

    Raises:
        DataError: too few images.
    """
    wanted = min(available, DEFAULT_IMAGES) if asked is None else asked
    if wanted > available:
        raise DataError(f"{name} has {available:,} images, --calib-images asks for {wanted:,}")
    if wanted < LEAST_IMAGES:
        raise DataError(f"{name}: calibration needs at least {LEAST_IMAGES} images, not {wanted}")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    held_out, fitting = order[: wanted // HELD_OUT], order[wanted // HELD_OUT :]

    def shuffled(number: int) -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        return batches(fitting[torch.randperm(len(fitting), generator=generator)].tolist())

    return Calibration(name, len(fitting), len(held_out), shuffled, lambda: batches(held_out.tolist()))


# ----------------------------------------------------------------------------------------------------------- statistics


@torch.enable_grad()
def measure(
    model: nn.Module, names: Sequence[str], calibration: Calibration, seed: int, progress: Progress | None = None
) -> dict[str, LayerStatistics]:
    """Moments of the named layers of a frozen dense network, in streaming passes over the images.

    The metric of the outputs is the Gauss-Newton matrix of the squared change of the network's (centred) outputs: its
    gradients are those of random projections, so that no label is needed and a confident network still has some.

    Raises:
        DataError: images that do not fit the network, or NaN.
    """
    order = _execution_order(model, names, calibration)
    statistics: dict[str, LayerStatistics] = {}
    for group in _groups([(name, _empty(model.get_submodule(name))) for name in order]):
        _fill(model, group, calibration, seed, progress)
        statistics |= group
    return statistics


def _execution_order(model: nn.Module, names: Sequence[str], calibration: Calibration) -> list[str]:
    seen: dict[str, None] = {}
    with _hooked(model, names, lambda name, module, x: seen.setdefault(name)):
        forward(model, next(iter(calibration.held_out())).to(device_of(model)))
    return [*seen]


def _empty(module: nn.Module) -> LayerStatistics:
    weight: Tensor = module.weight  # type: ignore[assignment]
    size = prod(weight.shape[1:])
    return LayerStatistics(Moments(size), Moments(size), Moments(weight.shape[0]))


def _groups(layers: Sequence[tuple[str, LayerStatistics]]) -> Iterator[dict[str, LayerStatistics]]:
    group: dict[str, LayerStatistics] = {}
    held = 0
    for name, each in layers:
        size = each.inputs.num_bytes + each.held_out.num_bytes + each.outputs.num_bytes
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = {}, 0
        group[name] = each
        held += size
    if group:
        yield group


def _fill(
    model: nn.Module,
    group: dict[str, LayerStatistics],
    calibration: Calibration,
    seed: int,
    progress: Progress | None,
) -> None:
    device, generator = device_of(model), torch.Generator().manual_seed(seed)
    offset = images = 0

    def observe(name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise DataError(f"{name} runs without gradients, which calibration needs: exclude it, or leave out calib")
        each = group[name]
        columns, each.positions = layer_inputs(module, x.detach(), offset)
        each.inputs.add(columns, weight=images)
        # A leaf of its own, so that gradients flow from here on, whatever the input of the network is.
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaf = leaf.clone()
        leaf.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: each.outputs.add(_columns(module, gradient), weight=images)
        )
        return leaf

    def observe_held_out(name: str, module: nn.Module, x: Tensor) -> None:
        group[name].held_out.add(layer_inputs(module, x, offset)[0], weight=images)

    with _hooked(model, list(group), observe, after=True):
        for batch in calibration.fitting(0):
            images = len(batch)
            output = forward(model, batch.to(device))
            draw = torch.randn(output.shape, generator=generator).to(output)
            (output * centred(draw)).sum().backward()  # type: ignore[no-untyped-call]
            offset += 1
            if progress:
                progress("statistics", min(offset * images, calibration.num_images), calibration.num_images)
    with _hooked(model, list(group), observe_held_out), torch.no_grad():
        for batch in calibration.held_out():
            images = len(batch)
            forward(model, batch.to(device))
            offset += 1


def centred(outputs: Tensor) -> Tensor:
    """Logits have no meaning but for their differences."""
    return outputs - outputs.mean(1, keepdim=True) if outputs.dim() == 2 and outputs.shape[1] > 1 else outputs


def _columns(module: nn.Module, outputs: Tensor) -> Tensor:
    """A layer's outputs, or gradients there, as columns (out, rows)."""
    if isinstance(module, nn.Conv2d):
        return outputs.movedim(-3, 0).flatten(1)
    return outputs.reshape(-1, outputs.shape[-1]).T


def layer_inputs(module: nn.Module, x: Tensor, offset: int = 0) -> tuple[Tensor, int]:
    """What the weight multiplies, as columns (size, rows), and how many positions an image has.

    For a convolution these are im2col patches (in, kh, kw) on a grid of at most POSITIONS positions an image, moved
    along by `offset`.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1]).T, max(1, x[0].numel() // x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batch = x if x.dim() == 4 else x[None]
    padded = functional.pad(batch, module._reversed_padding_repeated_twice, mode=mode)
    spans = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = [
        (size - span) // stride + 1 for size, span, stride in zip(padded.shape[2:], spans, module.stride, strict=True)
    ]
    steps = [min(size, max(1, ceil(sqrt(prod(sizes) / POSITIONS)))) for size in sizes]
    top, left = (stride * (offset % step) for stride, step in zip(module.stride, steps, strict=True))
    strides = (module.stride[0] * steps[0], module.stride[1] * steps[1])
    patches = functional.unfold(padded[:, :, top:, left:], module.kernel_size, module.dilation, stride=strides)
    return patches.transpose(0, 1).flatten(1), prod(sizes)


@contextmanager
def _hooked(model: nn.Module, names: Iterable[str], observe: Callable[..., Any], after: bool = False) -> Iterator[None]:
    """observe(name, module, input[, output]) whenever one of these modules runs."""

    def call(name: str, module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor], *output: Tensor) -> Any:
        return observe(name, module, given[0] if given else named["input"], *output)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        register: Any = module.register_forward_hook if after else module.register_forward_pre_hook
        handles.append(register(partial(call, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def device_of(model: nn.Module) -> torch.device:
    """Where the network is."""
    return next(model.parameters()).device


# -------------------------------------------------------------------------------------------------------- decomposition


def decompose(weight: Tensor, layer: LayerPlan, statistics: LayerStatistics) -> list[Tensor]:
    """Cores of a weight at the planned TT-ranks: the best on held-out images of whitened and weight-only TT-SVD.

    The input metric is full or diagonal. What misses the outputs on the calibration images by more than weight-only
    TT-SVD does is not considered.
    """
    plain = weight_only(weight, layer)
    limit = output_cost(weight - _dense(plain, weight), statistics.inputs)
    outputs = statistics.outputs.blended(EVEN)
    best, least = plain, output_cost(weight - _dense(plain, weight), statistics.held_out, outputs)
    for diagonal in (False, True):
        metrics = statistics.metrics(layer.tensorization, diagonal)
        cores = whitened_svd(weight, layer.tensorization, layer.tt_ranks, metrics)
        missed = weight - _dense(cores, weight)
        cost = output_cost(missed, statistics.held_out, outputs)
        if cost < least and output_cost(missed, statistics.inputs) <= limit:
            best, least = cores, cost
    return best


def weight_only(weight: Tensor, layer: LayerPlan) -> list[Tensor]:
    """Cores by TT-SVD of the weight itself, float64."""
    return [core.double() for core in decompose_weight(weight, layer.tensorization, layer.tt_ranks).cores]


def _dense(cores: Sequence[Tensor], weight: Tensor) -> Tensor:
    return dense_weight([core.to(weight) for core in cores], tuple(weight.shape))


def swap_in(model: nn.Module, dense: nn.Module, layer: LayerPlan, cores: Sequence[Tensor]) -> None:
    """Put a TT layer with these cores, in the type of the weight, in the place of the dense one."""
    module = dense.get_submodule(layer.fqn)
    like: Tensor = module.weight  # type: ignore[assignment]
    spread = [core.to(like) for core in spread_norm(cores)]
    swap(model, layer.fqn, layer_from(layer, module, spread))


# --------------------------------------------------------------------------------------------------------------- sweeps


def sweep_layers(
    dense: nn.Module,
    compressed: nn.Module,
    plan: CompressionPlan,
    statistics: Statistics,
    calibration: Calibration,
    sweeps: int,
    progress: Progress | None = None,
) -> None:
    """Fit the cores of every layer in forward order, in place, to the outputs of the dense network.

    A layer's inputs are those of the compressed network so far, so that each corrects what the earlier ones lost.
    """
    layers = {layer.fqn: layer for layer in plan.layers}
    order = [name for name in statistics if name in layers]
    for done, name in enumerate(order):
        if progress:
            progress(f"fitting {name}", done, len(order))
        module: Any = dense.get_submodule(name)
        pairs = input_pairs(dense, compressed, name, calibration)
        fitting = pairs.centred() if module.bias is not None else pairs
        swapped: Any = compressed.get_submodule(name)
        start = [core.detach().double() for core in swapped.cores]
        cores = fit_layer(module.weight.detach(), layers[name], start, fitting, statistics[name].outputs, sweeps)
        for core, fitted in zip(swapped.cores, spread_norm(cores), strict=True):
            core.data = fitted.to(core)
        if module.bias is not None:
            mean_x, mean_t = pairs.means
            lost = (
                module.weight.detach().flatten(1).to(mean_t) @ mean_t
                - swapped.weight.detach().flatten(1).to(mean_x) @ mean_x
            )
            swapped.bias.data = (module.bias.detach() + lost).to(module.bias)


def fit_layer(
    weight: Tensor, layer: LayerPlan, start: Sequence[Tensor], pairs: Moments, outputs: Moments, sweeps: int
) -> list[Tensor]:
    """Cores after least-squares sweeps in the metric of the outputs, never worse than weight-only TT-SVD without it.

    Where the metric would make the plain output error larger than that of weight-only TT-SVD at the same inputs, the
    sweeps run without it, from the better of both starts.
    """
    fitted, _ = fit_cores(start, output_error(weight, pairs, outputs.blended(EVEN)), sweeps)
    unweighted = output_error(weight, pairs)
    plain = weight_only(weight, layer)
    if unweighted.value(fitted) <= unweighted.value(plain):
        return fitted
    return fit_cores(min(start, plain, key=unweighted.value), unweighted, sweeps)[0]


class _ReachedError(Exception):
    """The layer whose input is wanted has been reached; what follows it need not run."""


def input_pairs(dense: nn.Module, compressed: nn.Module, name: str, calibration: Calibration) -> Moments:
    """Paired moments of a layer's inputs in the compressed network (own) and in the dense one (crossed)."""
    module: Any = dense.get_submodule(name)
    pairs = Moments(prod(module.weight.shape[1:]), paired=True)
    device, seen = device_of(dense), 0
    for offset, batch in enumerate(calibration.fitting(0)):
        if seen >= SWEEP_IMAGES:
            break
        seen += len(batch)
        images = batch.to(device)
        ours, theirs = _inputs_of(compressed, name, images), _inputs_of(dense, name, images)
        for x, t in zip(ours, theirs, strict=True):
            pairs.add(layer_inputs(module, x, offset)[0], layer_inputs(module, t, offset)[0], len(batch))
    return pairs


@torch.no_grad()
def _inputs_of(model: nn.Module, name: str, images: Tensor) -> list[Tensor]:
    """The inputs of the first call of a layer; the rest of the network does not run."""
    caught: list[Tensor] = []

    def catch(_: str, module: nn.Module, x: Tensor) -> None:
        caught.append(x.detach())
        raise _ReachedError

    with _hooked(model, [name], catch), suppress(_ReachedError):
        model(images)
    return caught


# ------------------------------------------------------------------------------------------------------------- deciding


@torch.no_grad()
def network_error(dense: nn.Module, compressed: nn.Module, calibration: Calibration) -> float:
    """Relative error of the network's outputs on the held-out images, logits taken relative to their mean.

    With a hundred images it tells networks apart where the divergence of their class probabilities, which hangs on
    the few images that change their class, does not.
    """
    missed = power = 0.0
    for batch in calibration.held_out():
        images = batch.to(device_of(dense))
        ours, theirs = forward(compressed, images).double(), forward(dense, images).double()
        missed += float(centred(ours - theirs).square().sum())
        power += float(centred(theirs).square().sum())
    return sqrt(missed / power) if power else float(missed > 0)


@torch.no_grad()
def output_errors(
    dense: nn.Module, compressed: nn.Module, plan: CompressionPlan, calibration: Calibration
) -> dict[str, float]:
    """Relative error of each layer's output within its network, those of earlier layers included, held-out images."""
    names = [layer.fqn for layer in plan.layers]
    missed, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    theirs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        theirs[name].append(output.detach())
        power[name] += float(output.double().square().sum())

    def compare(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        missed[name] += float((output - theirs[name].pop(0)).double().square().sum())

    with _hooked(dense, names, keep, after=True), _hooked(compressed, names, compare, after=True):
        for batch in calibration.held_out():
            images = batch.to(device_of(dense))
            dense(images)
            compressed(images)
    return {name: sqrt(missed[name] / power[name]) if power[name] else float(missed[name] > 0) for name in names}


def recalibrate_batch_norm(model: nn.Module, calibration: Calibration) -> bool:
    """Set the running statistics of all batch norms to those of the calibration images; False where there are none."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return False
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # A cumulative average instead of a moving one.
        norm.train()
    with torch.no_grad():
        for batch in calibration.fitting(0):
            if len(batch) > 1:
                model(batch.to(device_of(model)))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()
    return True
