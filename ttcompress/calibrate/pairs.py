"""What a weight multiplies in the compressed network and in the dense one, for one layer after the other.

Layers are asked for in forward order, and each may change what the later ones are given. A pass over the network for each
layer would grow with the square of the depth; passes that halt at each layer in its turn are one for all, but hold what
is under way. What is too much for memory lies in a file, unless a pass for a layer takes less time, as for the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf, prod

import torch
from torch import Tensor, nn

from ttcompress.calibrate.calibration import Calibration
from ttcompress.calibrate.in_step import Halt, halts_of, in_step
from ttcompress.calibrate.measured import Batch
from ttcompress.calibrate.observe import Call, hooked
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.room import two_of
from ttcompress.calibrate.uses import Use
from ttcompress.networks.running import NetworkInput, batch_size, call, device_of, placed
from ttcompress.records.plan import LayerPlan
from ttcompress.tt.spool import Spool
from ttcompress.tt.whiten import Moments

IN_STEP_BYTES = 1 << 28
"""That all passes of both networks may hold while they are halted at a layer; what is beyond lies in a file."""
FILE_SPEED = 1e9
"""Bytes a second that a file takes and gives back, roughly: most of it stays in the memory that the system has left."""
SWEEP_IMAGES = 512
"""Images that a layer's least-squares fit sees."""
DECIDING_IMAGES = 128
"""Held-out images that decide on it."""


class Pairs:
    """Paired moments of a weight's inputs, every position of which counts as much as another, and those held out.

    Held-out ones are added last.
    """

    def __init__(self, layer: LayerPlan) -> None:
        size = prod(layer.spec.view_shape[1:])
        self.fitted, self.held_out = Moments(size, paired=True), Moments(size, paired=True)
        self._usual = 0
        self._spool = Spool()

    def add(self, ours: tuple[Tensor, int], theirs: tuple[Tensor, int], at: Batch) -> None:
        """Add the columns of a batch in both networks, each with the positions that an image has."""
        columns, positions = ours
        self._usual = self._usual or positions
        if at.is_held_out:
            self.fitted.lay_aside(self._spool.lay)
        goal = self.held_out if at.is_held_out else self.fitted
        goal.add(columns, theirs[0], at.num_images * (positions / self._usual))

    def lay_aside(self) -> None:
        """Put both where they take less memory; nothing is added after."""
        for moments in (self.fitted, self.held_out):
            moments.lay_aside(self._spool.lay)


@contextmanager
def pairs_by_layer(
    reference: Reference, compressed: nn.Module, order: Sequence[str]
) -> Iterator[Callable[[LayerPlan, Use], Pairs]]:
    """What gives the paired moments of a weight's inputs, to be asked for in this order of modules."""
    dense, calibration = reference.dense, reference.calibration
    one_by_one = partial(input_pairs, dense, compressed, calibration=calibration)
    late = _order_in_step(reference, order)
    if not late:
        yield one_by_one
        return

    batches = [(placed(piece, device_of(dense)), at) for piece, at in _pieces(calibration)]
    inputs = [batch for batch, _ in batches]
    with in_step([compressed, dense], late, inputs, IN_STEP_BYTES) as walks:

        def pairs_of(layer: LayerPlan, use: Use) -> Pairs:
            pairs, geometry = Pairs(layer), dense.get_submodule(use.fqn)
            for number, (_, at) in enumerate(batches):
                calls = [walk.call(number, use.fqn) for walk in walks if use.fqn in late and walk.is_on_time]
                mine, other = calls if len(calls) == len(walks) else (None, None)
                # A network that comes by its modules in another order is run anew for each.
                if mine is None or other is None:
                    for walk in walks:
                        walk.end()
                    return one_by_one(layer, use)

                ours = use.inputs(compressed.get_submodule(use.fqn), mine, at.offset, geometry)
                theirs = use.inputs(geometry, other, at.offset, geometry)
                pairs.add(ours, theirs, at)
                for walk in walks:
                    walk.leave(number)
            return pairs

        yield pairs_of


def _order_in_step(reference: Reference, order: Sequence[str]) -> Sequence[str]:
    """The last of these modules, from where on passes over all images that halt at each of them take the least time.

    A pass of its own for a module takes as long as it takes to come there. In step it takes none, unless what all passes
    hold has to lie in a file.
    """
    pieces = [piece for piece, _ in _pieces(reference.calibration)]
    count = sum(map(batch_size, pieces))
    few = two_of(reference.dense, pieces)
    halts = halts_of(reference.dense, order, few)
    if halts is None:
        return []

    # For a few images, in both networks alike.
    alone = [halts.by_name.get(name, Halt(0, halts.seconds)).seconds for name in order]
    best, least = len(order), 0.0
    seconds = alone[-1] if alone else 0.0
    for first in reversed(range(len(order))):
        halt = halts.by_name.get(order[first])
        held = inf if halt is None else halt.held
        is_too_much = 2 * held * count > IN_STEP_BYTES * batch_size(few)
        if is_too_much:
            seconds += 2 * held / FILE_SPEED
        if seconds + sum(alone[:first]) < sum(alone[:best]) + least:
            best, least = first, seconds
    return order[best:]


def _pieces(calibration: Calibration) -> Iterator[tuple[NetworkInput, Batch]]:
    """The images that weights are fitted to and those that are held out, in pieces, each batch at positions of its own."""
    for number, batch in _first(SWEEP_IMAGES, calibration.fitting(0)):
        for piece in calibration.pieces(batch, gradients=False):
            yield piece, Batch(batch_size(piece), number)
    for number, batch in _first(DECIDING_IMAGES, calibration.held_out()):
        for piece in calibration.pieces(batch, gradients=False):
            yield piece, Batch(batch_size(piece), number, is_held_out=True)


def _first(most: int, batches: Iterable[NetworkInput]) -> Iterator[tuple[int, NetworkInput]]:
    """Batches until they have so many images, numbered."""
    seen = 0
    for number, batch in enumerate(batches):
        if seen >= most:
            return
        seen += batch_size(batch)
        yield number, batch


class _Reached(BaseException):
    """The layer whose input is wanted has been reached; what follows it need not run.

    It is no error, so that a network that catches errors does not catch it.
    """


def input_pairs(
    dense: nn.Module, compressed: nn.Module, layer: LayerPlan, use: Use, calibration: Calibration
) -> Pairs:
    """Paired moments of a weight's inputs in the compressed network (own) and in the dense one (crossed)."""
    pairs = Pairs(layer)
    geometry = dense.get_submodule(use.fqn)
    for piece, at in _pieces(calibration):
        inputs = placed(piece, device_of(dense))
        ours, theirs = (_columns(each, geometry, use, inputs, at.offset) for each in (compressed, dense))
        pairs.add(ours, theirs, at)
    return pairs


@torch.no_grad()
def _columns(
    model: nn.Module, geometry: nn.Module, use: Use, inputs: NetworkInput, offset: int
) -> tuple[Tensor, int]:
    """What the weight multiplies at the first call of its module, as `Use.inputs`; the rest of the network does not run.

    A layer that runs several times for a batch is fitted at its first call.
    """
    caught: list[tuple[Tensor, int]] = []

    def catch(_: str, module: nn.Module, at: Call) -> None:
        caught.append(use.inputs(module, at, offset, geometry))
        raise _Reached

    with hooked(model, [use.fqn], catch), suppress(_Reached):
        call(model, inputs)
    return caught[0]
