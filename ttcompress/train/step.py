"""The gradients of one batch, with labels, a teacher or both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.train.loss import training_loss
from ttcompress.train.mixing import mix_images
from ttcompress.train.setup import PRECISIONS, TrainingOptions, TrainingSetup
from ttcompress.train.state import State


def backward(
    state: State,
    forward: Any,
    options: TrainingOptions,
    setup: TrainingSetup,
    images: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """Leave the gradients of one batch in the parameters.

    Returns the number of images, their summed loss and how many were classified right, float64 (3,).
    """
    state.optimizer.zero_grad(set_to_none=True)
    images, partner_labels, own_share = mix_images(images, labels, options, state.epoch, state.step)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    mean_count = setup.stream.mean_count(images)
    part_size = -(-len(images) // options.accumulate)
    starts = range(0, len(images), part_size)
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    for start in starts:
        part = slice(start, start + part_size)
        own = None if labels is None else labels[part]
        partner = None if partner_labels is None else partner_labels[part]

        is_last = start == starts[-1]
        with _gradient_exchange(forward, is_last or setup.world.size == 1):
            with _autocast(options, images.device):
                teacher_logits = _teacher_logits(setup.teacher, images[part])
                logits = _main_logits(forward(images[part]))
            loss = training_loss(logits, own, teacher_logits, options)
            if partner is not None:
                partner_loss = training_loss(logits, partner, teacher_logits, options)
                loss = own_share * loss + (1 - own_share) * partner_loss
            state.scaler.scale(loss * len(logits) / mean_count).backward()  # type: ignore[no-untyped-call]

        summed_loss = loss.detach() * len(logits)
        right = _num_right(logits.detach(), own, teacher_logits)
        # Filled on the device: a number that is sent there would wait for it.
        seen = loss.new_full((), len(logits))
        sums += torch.stack([seen, summed_loss, right.to(loss)]).double()
    return sums


def _gradient_exchange(forward: Any, exchanges: bool) -> AbstractContextManager[Any]:
    """Whether the processes average their gradients in a backward pass: once a batch is enough."""
    exchange: AbstractContextManager[Any] = nullcontext() if exchanges else forward.no_sync()
    return exchange


def _main_logits(output: Any) -> Tensor:
    """The logits of the main head: by their name, or first where auxiliary heads give theirs too."""
    main: Any = output
    if isinstance(output, Mapping):
        main = output["logits"] if "logits" in output else next(iter(output.values()))
    elif not isinstance(output, Tensor):
        main = output[0] if isinstance(output, tuple | list) else output.logits
    return main.float()  # type: ignore[no-any-return]


def _autocast(options: TrainingOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[options.precision], enabled=options.precision != "float32")


@torch.no_grad()
def _teacher_logits(teacher: nn.Module | None, images: Tensor) -> Tensor | None:
    if teacher is None:
        return None
    return _main_logits(teacher(images))


def _num_right(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> Tensor:
    """How many images get their label, or where there are no labels the class that the teacher gives them."""
    classes = logits.argmax(1)
    targets = labels
    if targets is None:
        targets = classes if teacher_logits is None else teacher_logits.argmax(1)
    return (classes == targets).sum()
