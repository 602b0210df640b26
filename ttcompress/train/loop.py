"""The training loop: TT-cores and all other parameters, with labels, a teacher or both, never losing what is done.

Everything that decides the next step is in `State`, which is saved every few minutes, at every epoch and when the
process is asked to stop; what is resumed from it ends bit-equal to what was never interrupted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ttcompress.data.training_batches import Stream
from ttcompress.errors import CheckpointError, TrainingError, TrainingStoppedError, differences
from ttcompress.files.output import replacing
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.processes import World
from ttcompress.records.common import Json, Progress
from ttcompress.train.batch_norm import parallel
from ttcompress.train.optimize import Average, make_optimizer, rate_at, tt_layers, update

SAVE_EVERY = 120.0
"""Seconds between two saves within an epoch."""
CHECK_EVERY = 10
"""Steps between two looks at the loss and at whether to stop; on a GPU each look waits for it."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How to train. `warm_up` is in epochs, `distill` the share of the teacher in the loss, `ema` 0 or a decay."""

    epochs: int
    lr: float
    optimizer: str = "sgd"
    schedule: str = "cosine"
    warm_up: float = 1.0
    weight_decay: float = 1e-4
    clip: float = 5.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.9
    temperature: float = 4.0
    mixup: float = 0.0
    cutmix: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    deterministic: bool = False
    seed: int = 0


@dataclass
class State:
    """A training at some step: `step` batches of epoch `epoch` are done, `sums` are over those."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[Json] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Tensor]:
        """The state dict that counts: the average where one is kept."""
        return self.average.values if self.average else self.model.state_dict()

    def save(self, path: Path, fingerprint: Json) -> None:
        """Write everything to a file that the former one stands for until it is whole."""
        average = {"values": self.average.values, "updates": self.average.updates} if self.average else None
        content = {
            "fingerprint": fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": average,
            "progress": {"epoch": self.epoch, "step": self.step, "sums": self.sums, "history": self.history},
            "best": self.best,
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    def load(self, path: Path, fingerprint: Json, device: torch.device) -> None:
        """Go back to a saved state.

        Raises:
            CheckpointError: no such file, a damaged one, or one of a training with other options, naming them.
        """
        content = _read(path, device)
        differ = differences(content["fingerprint"], fingerprint)
        if differ:
            raise CheckpointError(f"{path}: was trained otherwise: {differ}; repeat the command as it was")
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.scaler.load_state_dict(content["scaler"])
            if self.average:
                self.average.values, self.average.updates = content["average"]["values"], content["average"]["updates"]
            for name, value in content["progress"].items():
                setattr(self, name, value)
            self.best = content["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is of another network, or damaged: {type(error).__name__}") from error


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: nothing to resume, no such file")
    try:
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable training checkpoint: {type(error).__name__}") from error
    if not isinstance(content, dict) or "fingerprint" not in content:
        raise CheckpointError(f"{path}: not a training checkpoint")
    return content


@dataclass(frozen=True)
class Course:
    """What a training runs on: the stream, what judges an epoch, who teaches, where it saves, whom it tells.

    `judge` gives the score of a network, higher is better, alike in all processes. `start_counts` says whether the
    network as it was may be the best one, which is fair only if it never saw what it is judged on.
    """

    stream: Stream
    judge: Callable[[nn.Module], float]
    world: World
    teacher: nn.Module | None = None
    checkpoint: Path | None = None
    start_counts: bool = True
    fingerprint: Json = field(default_factory=dict)
    progress: Progress | None = None
    log: Callable[[Json], None] | None = None


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
    with _asked_to_stop() as asked:
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
        sums += _step(state, forward, options, course, images, labels)
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


def _stop_if(asked: Callable[[], bool], state: State, course: Course) -> None:
    if course.world.any(asked()):
        _save(state, course)
        raise TrainingStoppedError(_where(course, f"stopped in epoch {state.epoch + 1}"))


def _seed(options: Options, world: World, state: State) -> None:
    """Dropout and the like draw numbers that depend on the seed, the process and the step, not on what was before."""
    key = [options.seed, world.rank, state.epoch, state.step]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def _step(
    state: State, forward: Any, options: Options, course: Course, images: Tensor, labels: Tensor | None
) -> Tensor:
    """Gradients of one batch; returns images, summed loss and hits."""
    state.optimizer.zero_grad(set_to_none=True)
    images, others, share = _mixed(images, labels, options, state.epoch, state.step)
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


def loss_of(logits: Tensor, labels: Tensor | None, answers: Tensor | None, options: Options) -> Tensor:
    """Mean loss: cross entropy with the labels (N,), and the divergence from the teacher's logits (Hinton et al. 2015).

    Without answers it is the former alone, without labels the latter.
    """
    own = None
    if labels is not None:
        own = functional.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
    if answers is None:
        assert own is not None
        return own
    t = options.temperature
    ours, theirs = ((each / t).log_softmax(1) for each in (logits, answers))
    taught = t * t * functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return taught if own is None else options.distill * taught + (1 - options.distill) * own


def _mixed(
    images: Tensor, labels: Tensor | None, options: Options, epoch: int, step: int
) -> tuple[Tensor, Tensor | None, float]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019), by turns where both are on.

    Returns the images, the labels of what was mixed in, and the share of the images' own labels.
    """
    kinds = [name for name in ("mixup", "cutmix") if getattr(options, name)]
    if not kinds:
        return images, None, 1.0
    generator = np.random.default_rng([options.seed, epoch, step])
    kind = kinds[step % len(kinds)]
    alpha = getattr(options, kind)
    share, order = float(generator.beta(alpha, alpha)), torch.from_numpy(generator.permutation(len(images)))
    order = order.to(images.device)
    others = None if labels is None else labels[order]
    if kind == "mixup":
        return share * images + (1 - share) * images[order], others, share
    height, width = images.shape[2:]
    tall, wide = (round(side * (1 - share) ** 0.5) for side in (height, width))
    top, left = (int(generator.integers(0, most + 1)) for most in (height - tall, width - wide))
    mixed, window = images.clone(), (..., slice(top, top + tall), slice(left, left + wide))
    mixed[window] = images[order][window]
    return mixed, others, 1 - tall * wide / (height * width)


def _update(state: State, options: Options, layers: Sequence[TTLinear | TTConv2d]) -> None:
    state.scaler.unscale_(state.optimizer)
    update(
        state.model, state.optimizer, layers, options.clip, options.weight_decay,
        partial(state.scaler.step, state.optimizer),
    )  # fmt: skip
    state.scaler.update()
    if state.average:
        state.average.update(state.model)


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


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came; a second one ends the process as it always did."""
    asked: list[int] = []
    former: dict[signal.Signals, Any] = {}

    def remember(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, former[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, remember)
    except ValueError:
        # Not the main thread: the program that runs us decides.
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
