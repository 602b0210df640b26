"""The gradients of one batch, with labels, a teacher or both."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ttcompress.train.loss import loss_of
from ttcompress.train.mixing import mix_images
from ttcompress.train.setup import PRECISIONS, Course, Options
from ttcompress.train.state import State


def backward(
    state: State, forward: Any, options: Options, course: Course, images: Tensor, labels: Tensor | None
) -> Tensor:
    """Gradients of one batch; returns images, summed loss and hits."""
    state.optimizer.zero_grad(set_to_none=True)
    images, others, share = mix_images(images, labels, options, state.epoch, state.step)
    if options.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    sums = torch.zeros(3, dtype=torch.float64, device=images.device)
    # Gradients are averaged over processes, whose shares of a small set may differ by an image.
    count = min(course.stream.batch_size, len(course.stream.images)) / course.world.size
    starts = range(0, len(images), -(-len(images) // options.accumulate))
    for start in starts:
        part = slice(start, start + starts.step)
        waits = start != starts[-1] and course.world.size > 1
        with forward.no_sync() if waits else nullcontext():
            with _autocast(options, images.device):
                answers = None if course.teacher is None else _answers(course.teacher, images[part])
                logits = _logits(forward(images[part]))
            own, other = (None if each is None else each[part] for each in (labels, others))
            loss = loss_of(logits, own, answers, options)
            if other is not None:
                loss = share * loss + (1 - share) * loss_of(logits, other, answers, options)
            state.scaler.scale(loss * len(logits) / count).backward()  # type: ignore[no-untyped-call]
        right = _hits(logits.detach(), own, answers)
        sums += torch.stack([loss.new_tensor(len(logits)), loss.detach() * len(logits), right.to(loss)]).double()
    return sums


def _logits(output: Any) -> Tensor:
    """Of networks that give their auxiliary heads' answers too in training, the main one, which comes first."""
    main: Tensor = output[0] if isinstance(output, tuple) else output
    return main.float()


def _autocast(options: Options, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[options.precision], enabled=options.precision != "float32")


@torch.no_grad()
def _answers(teacher: nn.Module, images: Tensor) -> Tensor:
    answers: Tensor = teacher(images)
    return answers.float()


def _hits(logits: Tensor, labels: Tensor | None, answers: Tensor | None) -> Tensor:
    aims = labels if labels is not None else answers.argmax(1) if answers is not None else logits.argmax(1)
    return (logits.argmax(1) == aims).sum()
