"""The training loop: TT-cores and all other parameters, with labels, a teacher or both, never losing what is done.

Everything that decides the next step is in `State`, which is saved every few minutes, at every epoch and when the
process is asked to stop; what is resumed from it ends bit-equal to what was never interrupted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import nn

from ttcompress.errors import TrainingError, TrainingStoppedError
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.processes import World
from ttcompress.records.common import Json
from ttcompress.train.batch_norm import parallel
from ttcompress.train.optimize import Average, make_optimizer, rate_at, tt_layers, update
from ttcompress.train.setup import Course, Options
from ttcompress.train.state import State
from ttcompress.train.step import backward
from ttcompress.train.stopping import stop_requests

SAVE_EVERY = 120.0
"""Seconds between two saves within an epoch."""
CHECK_EVERY = 10
"""Steps between two looks at the loss and at whether to stop; on a GPU each look waits for it."""


def train(model: nn.Module, options: Options, course: Course, resume: bool = False) -> State:
    """Train a network in place and return the final state; `best` is the state dict of the best epoch.

    The network as it was is epoch 0. Where that counts, the best is never worse on `judge`.

    Raises:
        TrainingError: the loss is not finite; the last good state is in the checkpoint.
        TrainingStoppedError: asked to stop by SIGINT or SIGTERM, with the state saved.
        CheckpointError: nothing fitting to resume.
    """
    state = _begin(model, options, course)
    if resume and course.checkpoint:
        state.load(course.checkpoint, course.fingerprint, course.world.device)
    wrapped = parallel(model, course.world)
    forward = torch.compile(wrapped) if options.compile else wrapped
    if options.compile and course.teacher is not None:
        course.teacher.compile()
    with stop_requests() as asked:
        if not state.history:
            _finish_epoch(state, course, {})
        while state.epoch < options.epochs:
            _stop_if(asked, state, course)
            started = time.perf_counter()
            model.train()
            _run_epoch(state, forward, options, course, asked)
            seen, loss, right = state.sums
            record: Json = {"loss": loss / seen, "train": 100 * right / seen}
            state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
            _finish_epoch(state, course, record, time.perf_counter() - started)
    return state


def _begin(model: nn.Module, options: Options, course: Course) -> State:
    if options.channels_last:
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    scaled = options.precision == "float16" and course.world.device.type == "cuda"
    return State(
        model,
        make_optimizer(model, options.optimizer, options.lr, options.weight_decay),
        torch.amp.GradScaler(course.world.device.type, enabled=scaled),
        Average(model, options.ema) if options.ema else None,
    )


def _run_epoch(state: State, forward: Any, options: Options, course: Course, asked: Callable[[], bool]) -> None:
    stream, world = course.stream, course.world
    layers = tt_layers(state.model)
    total, warm_up = options.epochs * stream.steps, round(options.warm_up * stream.steps)
    # What was counted before a resume is the first process's own now.
    counted = state.sums if world.leads else [0.0, 0.0, 0.0]
    sums = torch.tensor(counted, dtype=torch.float64, device=world.device)
    saved = started = time.perf_counter()
    first = state.step
    for images, labels in stream.epoch(state.epoch, state.step):
        at = state.epoch * stream.steps + state.step
        for group in state.optimizer.param_groups:
            group["lr"] = options.lr * rate_at(at, total, warm_up, options.schedule)
        _seed(options, world, state)
        sums += backward(state, forward, options, course, images, labels)
        _update(state, options, layers)
        state.step += 1
        if state.step % CHECK_EVERY and state.step < stream.steps:
            continue
        state.sums = world.total(sums).tolist()
        _check_finite(state, course)
        _tell(state, course, options, (state.step - first) / (time.perf_counter() - started))
        if time.perf_counter() - saved > SAVE_EVERY:
            _save(state, course)
            saved = time.perf_counter()
        _stop_if(asked, state, course)


def _seed(options: Options, world: World, state: State) -> None:
    """Dropout and the like draw numbers that depend on the seed, the process and the step, not on what was before."""
    key = [options.seed, world.rank, state.epoch, state.step]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _update(state: State, options: Options, layers: Sequence[TTLinear | TTConv2d]) -> None:
    state.scaler.unscale_(state.optimizer)
    update(
        state.model, state.optimizer, layers, options.clip, options.weight_decay,
        partial(state.scaler.step, state.optimizer),
    )  # fmt: skip
    state.scaler.update()
    if state.average:
        state.average.update(state.model)


def _finish_epoch(state: State, course: Course, record: Json, seconds: float | None = None) -> None:
    """Judge, remember the best, save and tell."""
    _check_finite(state, course)
    score = _judged(state, course)
    record = {"epoch": state.epoch, **record, "val": score}
    state.history.append(record)
    if best_epoch(state.history, course.start_counts) is record:
        state.best = {name: value.detach().clone() for name, value in state.values.items()}
    _save(state, course)
    if course.log and course.world.leads:
        course.log({**record, "seconds": seconds})


def best_epoch(history: Sequence[Json], start_counts: bool) -> Json:
    """The first with the highest score; epoch 0 only where it counts or is alone."""
    return max(history if start_counts else history[1:] or history, key=lambda epoch: float(epoch["val"]))


def _judged(state: State, course: Course) -> float:
    own = {name: value.clone() for name, value in state.model.state_dict().items()} if state.average else {}
    if state.average:
        state.model.load_state_dict(state.average.values)
    state.model.eval()
    score = course.judge(state.model)
    if own:
        state.model.load_state_dict(own)
    return score


def _save(state: State, course: Course) -> None:
    _check_finite(state, course)
    if course.checkpoint and course.world.leads:
        state.save(course.checkpoint, course.fingerprint)


def _stop_if(asked: Callable[[], bool], state: State, course: Course) -> None:
    if course.world.any(asked()):
        _save(state, course)
        raise TrainingStoppedError(_where(course, f"stopped in epoch {state.epoch + 1}"))


def _check_finite(state: State, course: Course) -> None:
    """See that nothing that is saved, judged or trained further has become NaN or infinite."""
    values = [value for value in state.values.values() if value.is_floating_point()]
    kept = [value for value in state.model.state_dict().values() if value.is_floating_point()]
    finite = torch.stack([value.isfinite().all() for value in (*values, *kept)]).all()
    if not isfinite(state.sums[1]) or course.world.any(not bool(finite)):
        where = f"a value is not finite in epoch {state.epoch + 1}, batch {state.step}: start again with a lower --lr"
        raise TrainingError(_where(course, where))


def _where(course: Course, what: str) -> str:
    return f"{what}; the last good state is in {course.checkpoint}" if course.checkpoint else what


def _tell(state: State, course: Course, options: Options, batches_a_second: float) -> None:
    if course.progress and course.world.leads:
        seen, loss, right = state.sums
        speed = batches_a_second * course.stream.batch_size
        what = (
            f"epoch {state.epoch + 1}/{options.epochs} loss {loss / seen:.3f} {100 * right / seen:.1f} % {speed:,.0f}/s"
        )
        course.progress(what, state.epoch * course.stream.steps + state.step, options.epochs * course.stream.steps)
