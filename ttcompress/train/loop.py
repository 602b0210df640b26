"""The training loop, with labels, a teacher or both, which never loses what is done.

Everything that decides the next step is in `State`, which is saved every few minutes, at every epoch and when
the process is asked to stop; what is resumed from it ends bit-equal to what was never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf, isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ttcompress.errors import CheckpointError, TrainingError, TrainingStoppedError, is_out_of_memory
from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.processes import World
from ttcompress.records.common import Json
from ttcompress.train.batch_norm import parallel
from ttcompress.train.optimize import Average, make_optimizer, not_finite, rate_at, tt_layers, update
from ttcompress.train.options import TrainingOptions
from ttcompress.train.precision import chosen_precision, lay_out, settled
from ttcompress.train.setup import TrainingSetup
from ttcompress.train.state import State
from ttcompress.train.step import backward
from ttcompress.train.stopping import stop_requests

SAVE_EVERY = 120.0
"""Seconds between two saves within an epoch."""
NO_SAME_BITS = "does not have a deterministic implementation"
"""Torch says so of operators, of the gradients of some on GPUs above all."""
CHECK_EVERY = 10
"""Steps between two looks at the loss and at whether to stop; on a GPU each look waits for it."""


def train(model: nn.Module, options: TrainingOptions, setup: TrainingSetup, resume: bool = False) -> State:
    """Train a network in place and return the final state; `best` is the state dict of the best epoch.

    The network as it was is epoch 0. Where that counts, the best never has a lower score.

    Raises:
        TrainingError: the loss is not finite, or memory runs out; the last good state is in the checkpoint.
        TrainingStoppedError: asked to stop by SIGINT, SIGTERM or SIGHUP, with the state saved.
        CheckpointError: nothing fitting to resume.
    """
    state = _initial_state(model, options, setup)
    with stop_requests() as stop_requested, _in_one_line(state, setup):
        if resume and setup.checkpoint:
            state.load(setup.checkpoint, setup.fingerprint, setup.world.device)
            if state.epoch > options.epochs or state.step > setup.stream.steps:
                raise CheckpointError(f"{setup.checkpoint}: damaged: it is further than the training goes")
        else:
            state.precision = chosen_precision(state, options, setup)

        options = settled(options, state.precision, setup.world.device)
        lay_out(model, options)
        forward = _forward(model, options, setup)
        if not state.history:
            _finish_epoch(state, setup, {})
        while state.epoch < options.epochs:
            _stop_if(stop_requested, state, setup)
            started = time.perf_counter()
            model.train()
            _run_epoch(state, forward, options, setup, stop_requested)

            seen, loss, right = state.sums
            record: Json = {"loss": loss / seen, "train": 100 * right / seen}
            state.epoch, state.step, state.sums = state.epoch + 1, 0, [0.0, 0.0, 0.0]
            _finish_epoch(state, setup, record, time.perf_counter() - started)
    return state


def _initial_state(model: nn.Module, options: TrainingOptions, setup: TrainingSetup) -> State:
    device_type = setup.world.device.type
    # Gradients underflow in float16; bfloat16 has the range of float32.
    needs_scaling = options.precision == "float16" and device_type == "cuda"
    return State(
        model,
        make_optimizer(model, options.optimizer, options.lr, options.weight_decay),
        torch.amp.GradScaler(device_type, enabled=needs_scaling),
        Average(model, options.ema) if options.ema else None,
        unbounded=frozenset(not_finite(model)),
    )


def _forward(model: nn.Module, options: TrainingOptions, setup: TrainingSetup) -> Any:
    """What is called in training; compiled, with the teacher, where the options say so."""
    forward = parallel(model, setup.world)
    if options.compile:
        mode = compile_mode(setup.world)
        forward = torch.compile(forward, mode=mode)
        if setup.teacher is not None:
            setup.teacher.compile(mode=mode)
    return forward


def compile_mode(world: World) -> str | None:
    """On a GPU all kernels of a pass are begun at once, as a graph, but where processes exchange gradients in it."""
    return "reduce-overhead" if world.device.type == "cuda" and world.size == 1 else None


# --------------------------------------------------------------------------------------------------- an epoch


def _run_epoch(
    state: State,
    forward: Any,
    options: TrainingOptions,
    setup: TrainingSetup,
    stop_requested: Callable[[], bool],
) -> None:
    """Train on those batches of an epoch that are not done yet."""
    stream, world = setup.stream, setup.world
    layers = tt_layers(state.model)

    # What was counted before a resume is the first process's own now.
    counted = state.sums if world.leads else [0.0, 0.0, 0.0]
    sums = torch.tensor(counted, dtype=torch.float64, device=world.device)
    first_step = state.step
    saved = started = time.perf_counter()
    for images, labels in stream.epoch(state.epoch, state.step):
        _set_learning_rate(state, options, stream.steps)
        _seed(state, options, world)
        sums += backward(state, forward, options, setup, images, labels)
        _update(state, options, layers)
        state.step += 1
        if state.step % CHECK_EVERY and state.step < stream.steps:
            continue

        state.sums = world.total(sums).tolist()
        _check_finite(state, setup)
        steps_a_second = (state.step - first_step) / (time.perf_counter() - started)
        _report_progress(state, setup, options, steps_a_second)
        if time.perf_counter() - saved > SAVE_EVERY:
            _save(state, setup)
            saved = time.perf_counter()
        _stop_if(stop_requested, state, setup)


def _set_learning_rate(state: State, options: TrainingOptions, steps_an_epoch: int) -> None:
    step = state.epoch * steps_an_epoch + state.step
    total = options.epochs * steps_an_epoch
    warm_up = round(options.warm_up * steps_an_epoch)
    for group in state.optimizer.param_groups:
        group["lr"] = options.lr * rate_at(step, total, warm_up, options.schedule)


def _seed(state: State, options: TrainingOptions, world: World) -> None:
    """Make dropout and the like depend on the seed, the process and the step, not on what was before."""
    key = [options.seed, world.rank, state.epoch, state.step]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _update(state: State, options: TrainingOptions, layers: Sequence[TTLayer | TTWeight]) -> None:
    # Clipping and weight decay are meant for the gradients themselves.
    state.scaler.unscale_(state.optimizer)
    step = partial(state.scaler.step, state.optimizer)
    update(state.model, state.optimizer, layers, options.clip, options.weight_decay, step)
    state.scaler.update()
    if state.average:
        state.average.update(state.model)


def _report_progress(
    state: State,
    setup: TrainingSetup,
    options: TrainingOptions,
    steps_a_second: float,
) -> None:
    if not (setup.progress and setup.world.leads):
        return
    seen, loss, right = state.sums
    accuracy = 100 * right / seen
    speed = steps_a_second * setup.stream.batch_size
    epoch = f"epoch {state.epoch + 1}/{options.epochs}"
    done = state.epoch * setup.stream.steps + state.step
    total = options.epochs * setup.stream.steps
    setup.progress(f"{epoch} loss {loss / seen:.3f} {accuracy:.1f} % {speed:,.0f}/s", done, total)


# ------------------------------------------------------------------------------------------- after each epoch


def _finish_epoch(state: State, setup: TrainingSetup, record: Json, seconds: float | None = None) -> None:
    """Score the network, remember it if it is the best, save the state and log the epoch."""
    _check_finite(state, setup)
    record = {"epoch": state.epoch, **record, "val": _score(state, setup)}
    state.history.append(record)
    if best_epoch(state.history, setup.start_counts) is record:
        state.best = {name: value.detach().clone() for name, value in state.values.items()}

    _save(state, setup)
    if setup.log and setup.world.leads:
        setup.log({**record, "precision": state.precision, "seconds": seconds})


def best_epoch(history: Sequence[Json], start_counts: bool) -> Json:
    """The first with the highest score; epoch 0 only where it counts or is alone."""
    candidates = history if start_counts else history[1:] or history
    return max(candidates, key=lambda epoch: float(epoch["val"]))


def _score(state: State, setup: TrainingSetup) -> float:
    """Score of the average where one is kept, else of the network."""
    state.model.eval()
    if not state.average:
        return setup.score(state.model)

    trained = {name: value.clone() for name, value in state.model.state_dict().items()}
    state.model.load_state_dict(state.average.values)
    score = setup.score(state.model)
    state.model.load_state_dict(trained)
    return score


# -------------------------------------------------------------------------------------------- nothing is lost


def _save(state: State, setup: TrainingSetup) -> None:
    _check_finite(state, setup)
    if setup.checkpoint and setup.world.leads:
        state.save(setup.checkpoint, setup.fingerprint)


def _stop_if(stop_requested: Callable[[], bool], state: State, setup: TrainingSetup) -> None:
    if setup.world.any(stop_requested()):
        _save(state, setup)
        raise TrainingStoppedError(_with_checkpoint(f"stopped in epoch {state.epoch + 1}", setup))


def _check_finite(state: State, setup: TrainingSetup) -> None:
    """See that nothing that is saved, scored or trained further has become NaN or infinite."""
    kept = [state.model.state_dict(), *([state.average.values] if state.average else [])]
    tensors = [
        value
        for values in kept
        for name, value in values.items()
        if value.is_floating_point() and name not in state.unbounded
    ]
    # The summed loss is the same number in all processes, the tensors may differ.
    if not isfinite(state.sums[1]) or setup.world.any(not all_finite(tensors)):
        place = f"in epoch {state.epoch + 1}, batch {state.step}"
        message = f"a value is not finite {place}: start again with a lower --lr"
        raise TrainingError(_with_checkpoint(message, setup))


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number is NaN or infinite, by one look at the device."""
    if not tensors:
        return True
    if not tensors[0].is_cuda:
        return all(bool(each.isfinite().all()) for each in tensors)
    # The largest of each tensor are found at once: a GPU waits longer for many small operations than it takes for them.
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for each in tensors:
        if each.numel():
            by_type.setdefault(each.dtype, []).append(each)
    largest = [torch.stack(torch._foreach_norm(alike, inf)) for alike in by_type.values()]
    return bool(torch.stack([each.isfinite().all() for each in largest]).all())


@contextmanager
def _in_one_line(state: State, setup: TrainingSetup) -> Iterator[None]:
    """One line where memory runs out, or bits cannot be the same each time, which names what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if NO_SAME_BITS in str(error):
            message = (
                f"{str(error).split()[0]} has no way to the same bits each time: leave out --deterministic"
            )
            raise TrainingError(_with_checkpoint(message, setup)) from error
        if not is_out_of_memory(error):
            raise
        message = f"out of memory in epoch {state.epoch + 1}: a smaller --batch-size or a larger --accumulate takes less"
        raise TrainingError(_with_checkpoint(message, setup)) from error


def _with_checkpoint(message: str, setup: TrainingSetup) -> str:
    is_saved = setup.checkpoint is not None and setup.checkpoint.is_file()
    return f"{message}; the last good state is in {setup.checkpoint}" if is_saved else message
