"""The gradients of one batch, with labels, a teacher or both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ttcompress.networks.running import NetworkInput, batch_size, map_tensors
from ttcompress.train.mixing import mixed
from ttcompress.train.options import PRECISIONS, TrainingOptions
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State


def backward(
    state: State,
    forward: Any,
    options: TrainingOptions,
    setup: TrainingSetup,
    inputs: NetworkInput,
    labels: Tensor | None,
) -> Tensor:
    """Leave the gradients of one batch in the parameters.

    Returns how many things were learned from, their summed loss and how many were right, float64 (3,): of classifiers
    they are the inputs, of networks that read text its tokens.
    """
    state.optimizer.zero_grad(set_to_none=True)
    device = setup.world.device
    if options.compile and device.type == "cuda":
        # What graphs of the step before have put out may be overwritten from here on.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
    inputs, partner_labels, own_share = mixed(inputs, labels, options, state.epoch, state.step)
    if options.channels_last:
        inputs = map_tensors(_channels_last, inputs)

    lesson = setup.lesson
    mean_count = setup.stream.mean_count(inputs)
    count = batch_size(inputs)
    part_size = -(-count // options.accumulate)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for start in range(0, count, part_size):
        part = slice(start, start + part_size)
        given = map_tensors(itemgetter(part), inputs)
        own = lesson.labels(given, None if labels is None else labels[part])
        partner = None if partner_labels is None else partner_labels[part]

        is_last = start + part_size >= count
        with _gradient_exchange(forward, is_last or setup.world.size == 1):
            with _autocast(options, device):
                taught = _taught(setup, given)
                answers = lesson.answers(forward, given)
            loss = lesson.loss(answers, own, taught, options)
            if partner is not None:
                partner_loss = lesson.loss(answers, partner, taught, options)
                loss = own_share * loss + (1 - own_share) * partner_loss
            share = batch_size(given) / mean_count
            state.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]

        summed_loss = loss.detach() * len(answers)
        right = lesson.num_right(answers.detach(), own, taught)
        # Filled on the device: a number that is sent there would wait for it.
        seen = loss.new_full((), len(answers))
        sums += torch.stack([seen, summed_loss, right.to(loss)]).double()
    return sums


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _gradient_exchange(forward: Any, exchanges: bool) -> AbstractContextManager[Any]:
    """Whether the processes average their gradients in a backward pass: once a batch is enough."""
    exchange: AbstractContextManager[Any] = nullcontext() if exchanges else forward.no_sync()
    return exchange


def _autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[options.precision], enabled=options.precision != "float32")


@torch.no_grad()
def _taught(setup: TrainingSetup, inputs: NetworkInput) -> Tensor | None:
    return None if setup.teacher is None else setup.lesson.answers(setup.teacher, inputs)
