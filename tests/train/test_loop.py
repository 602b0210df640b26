"""The training loop against one written by hand, its averages and its best."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import (
    CPU,
    EVERYTHING,
    STEPS,
    accuracy,
    apart,
    equal,
    frozen_copy,
    network,
    stream,
    teacher,
    training_setup,
    write_images,
)

from ttcompress.data.training_batches import Stream
from ttcompress.errors import TrainingError
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.processes import World
from ttcompress.records.common import Json
from ttcompress.train import loop as training
from ttcompress.train.loop import best_epoch, compile_mode, train
from ttcompress.train.mixing import mixed
from ttcompress.train.options import TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.npz; read only."""
    return write_images(tmp_path_factory.mktemp("train"))


# ------------------------------------------------------------------------------------------------------------- the loop

PLAIN = TrainingOptions(epochs=2, lr=0.05, warm_up=0.4, weight_decay=0.02, clip=0.5, distill=0.0)
LOOPS = {
    "sgd": PLAIN,
    "adamw": replace(PLAIN, optimizer="adamw", lr=0.005, weight_decay=0.5),
    "steps": replace(PLAIN, schedule="step", warm_up=0.0, clip=0.0),
    "everything": replace(EVERYTHING, epochs=2, weight_decay=0.02, clip=1.0, ema=0.0),
}


def soft(labels: Tensor, options: TrainingOptions) -> Tensor:
    return (1 - options.label_smoothing) * torch.eye(4)[labels] + options.label_smoothing / 4


def expected_rate(at: int, total: int, options: TrainingOptions, steps: int) -> float:
    warm_up = round(options.warm_up * steps)
    if at < warm_up:
        return options.lr * (at + 1) / (warm_up + 1)
    if options.schedule == "step":
        return options.lr * 0.1 ** sum(10 * at >= tenths * total for tenths in (3, 6, 9))
    return options.lr * (0.5 + 0.5 * math.cos(math.pi * (at - warm_up) / (total - warm_up)))


def expected_loss(logits: Tensor, aims: Tensor, answers: Tensor | None, options: TrainingOptions) -> Tensor:
    loss = -(aims * logits.log_softmax(1)).sum(1).mean()
    if answers is None:
        return loss
    target = (answers / options.temperature).softmax(1)
    divergence = (target * (target.log() - (logits / options.temperature).log_softmax(1))).sum(1).mean()
    return options.distill * options.temperature**2 * divergence + (1 - options.distill) * loss


def by_hand(
    model: nn.Module, master: nn.Module | None, source: Stream, options: TrainingOptions
) -> list[Json]:
    """All as in a textbook."""
    layers = [module for module in model.modules() if isinstance(module, TTConv2d | TTLinear)]
    cores = [core for layer in layers for core in layer.cores]
    dense = [model.get_parameter(name) for name in ("0.weight", "10.weight")]
    others = [each for each in model.parameters() if not any(each is one for one in (*cores, *dense))]
    groups = [{"params": dense, "weight_decay": options.weight_decay}, {"params": [*cores, *others]}]
    sgd, records = options.optimizer == "sgd", []
    nesterov = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
    optimizer = nesterov if sgd else torch.optim.AdamW(groups, weight_decay=0)
    for epoch in range(options.epochs):
        losses, hits = [], 0
        model.train()
        for step, (images, labels) in enumerate(source.epoch(epoch)):
            assert labels is not None
            images, mixed_in, share = mixed(images, labels, options, epoch, step)
            aims = soft(labels, options)
            if mixed_in is not None:
                aims = share * aims + (1 - share) * soft(mixed_in, options)
            logits = model(images)
            loss = expected_loss(logits, aims, master and master(images), options)
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float(each.grad.square().sum()) for each in model.parameters()))
            rate = expected_rate(
                epoch * source.steps + step, options.epochs * source.steps, options, source.steps
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            for each in model.parameters():
                each.grad *= min(1.0, options.clip / norm) if options.clip else 1.0
            left = 1 - rate * options.weight_decay * (10 if sgd else 1)
            for layer in layers:
                for core in layer.cores:
                    core.data *= left ** (1 / len(layer.cores))
            optimizer.step()
            losses.append(loss.item())
            hits += int((logits.argmax(1) == labels).sum())
        records.append({"loss": np.mean(losses), "train": 100 * hits / 96, "epoch": epoch + 1})
    return records


@pytest.mark.parametrize("name", LOOPS)
def test_the_steps_are_those_of_a_loop_written_by_hand(name: str, folder: Path) -> None:
    options, model, other = LOOPS[name], network(dropout=0), network(dropout=0)
    logged: list[Json] = []
    master = teacher() if name == "everything" else None
    given = training_setup(folder, teacher=master, log=logged.append, stream=stream(folder, batch_size=16))
    state = train(model, options, given)
    records = by_hand(other, master, given.stream, options)
    assert apart(model.state_dict(), network(dropout=0).state_dict()) > 0.02
    assert apart(model.state_dict(), other.state_dict()) < 1e-6
    assert state.history[0] == {"epoch": 0, "val": accuracy(network().eval())}
    for found, expected in zip(state.history[1:], records, strict=True):
        assert found == {
            "val": found["val"],
            **{key: pytest.approx(each, rel=1e-5) for key, each in expected.items()},
        }
    assert state.history[-1]["val"] == accuracy(model.eval())
    unlogged = {"seconds", "precision"}
    assert [
        {key: each for key, each in line.items() if key not in unlogged} for line in logged
    ] == state.history
    assert {line["precision"] for line in logged} == {"float32"}
    assert logged[0]["seconds"] is None
    assert all(line["seconds"] > 0 for line in logged[1:])


@pytest.mark.parametrize("parts", [3, 4, 100])
def test_a_batch_in_parts_is_the_batch(parts: int, folder: Path) -> None:
    """3 does not divide 16."""
    ends = []
    for accumulate in (1, parts):
        model = network(norm=False, dropout=0)
        options = replace(EVERYTHING, epochs=1, warm_up=0.0, ema=0.0, accumulate=accumulate)
        given = training_setup(folder, teacher=teacher(), stream=stream(folder, batch_size=16))
        ends.append((train(model, options, given).history[1]["loss"], model.state_dict()))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-6)
    assert apart(ends[1][1], network(norm=False).state_dict()) > 0.01
    assert apart(ends[1][1], ends[0][1]) < 1e-6


def test_the_average_counts_and_the_trained_network_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "CHECK_EVERY", 1)
    model = network()
    trail, scored = [frozen_copy(model.state_dict())], []

    def score(scored_model: nn.Module) -> float:
        assert not scored_model.training
        scored.append(frozen_copy(scored_model.state_dict()))
        return float(len(scored))

    told = training_setup(
        folder, score=score, progress=lambda *_: trail.append(frozen_copy(model.state_dict()))
    )
    state = train(model, replace(EVERYTHING, ema=0.7), told)
    assert len(trail) == 1 + 3 * STEPS
    averages = [{name: value.double().numpy() for name, value in trail[0].items()}]
    for number, values in enumerate(trail[1:], 1):
        decay = min(0.7, (1 + number) / (10 + number))
        former = averages[-1]
        now = {
            name: decay * former[name] + (1 - decay) * value.double().numpy()
            for name, value in values.items()
        }
        whole = {name: value.numpy() for name, value in values.items() if not value.is_floating_point()}
        averages.append({**now, **whole})
    for found, expected in zip([*scored, state.values, state.best], [*averages[::STEPS], averages[-1], averages[-1]],
                               strict=True):  # fmt: skip
        for name, value in found.items():
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-4, atol=1e-5)
    assert equal(frozen_copy(model.state_dict()), trail[-1])
    plain = network()
    train(plain, replace(EVERYTHING, ema=0.0), training_setup(folder))
    assert equal(frozen_copy(plain.state_dict()), trail[-1])


@pytest.mark.parametrize(
    "scores", [[3, 1, 5, 5, 2], [9, 9, 9, 9, 9], [-5, -3, -4, -2, -9], [0, 0, 0, 0, 1]], ids=str
)
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_the_best_is_the_first_of_the_highest_score(scores: list[float], ema: float, folder: Path) -> None:
    scored: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        scored.append(frozen_copy(model.state_dict()))
        return float(scores[len(scored) - 1])

    few = replace(stream(folder), batch_size=32)
    state = train(
        network(), replace(EVERYTHING, epochs=4, ema=ema), training_setup(folder, stream=few, score=score)
    )
    assert [entry["val"] for entry in state.history] == scores
    assert equal(state.best, scored[int(np.argmax(scores))])


@pytest.mark.parametrize(("counts", "epoch"), [(True, 0), (False, 2)])
def test_the_start_is_the_best_only_where_it_counts(counts: bool, epoch: int, folder: Path) -> None:
    scores = iter([9.0, 1.0, 3.0, 2.0])
    model = network()
    start = frozen_copy(model.state_dict())
    state = train(
        model, EVERYTHING, training_setup(folder, score=lambda _: next(scores), start_counts=counts)
    )
    assert best_epoch(state.history, counts)["epoch"] == epoch
    assert equal(state.best, start) == counts


def test_without_labels_the_teacher_alone_counts(folder: Path) -> None:
    """The same steps as with labels that have no share in the loss; a hit is the teacher's answer."""
    (folder / "unlabelled").mkdir()
    with np.load(folder / "train.npz") as arrays:
        np.savez(folder / "unlabelled" / "train.npz", images=arrays["images"])
    ends, options = [], replace(EVERYTHING, epochs=1, distill=1.0)
    for place in (folder, folder / "unlabelled"):
        model = network(dropout=0)
        state = train(model, options, training_setup(folder, teacher=teacher(), stream=stream(place)))
        ends.append((model.state_dict(), state.history[1]["loss"]))
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-6)
    assert apart(ends[1][0], ends[0][0]) < 1e-6
    twins = [network(seed, norm=False, dropout=0) for seed in (7, 7)]
    alike = training_setup(folder, teacher=twins[0], stream=stream(folder / "unlabelled"))
    assert (
        train(twins[1], replace(options, lr=0.0), alike).history[1]["train"]
        == 100
        > state.history[1]["train"]
    )


def test_what_has_no_same_bits_is_named(folder: Path, tmp_path: Path) -> None:
    """As gradients of some operators on GPUs are, under --deterministic."""

    class Unsteady(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError(
                    "upsample_backward_cuda does not have a deterministic implementation, but ..."
                )
            return x

    model = nn.Sequential(network(dropout=0), Unsteady())
    with pytest.raises(TrainingError, match="leave out --deterministic") as caught:
        train(model, replace(PLAIN, precision="float32"), training_setup(folder, tmp_path / "state"))
    assert str(caught.value).startswith("upsample_backward_cuda has no way")
    assert "the last good state is in" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "mode"),
    [
        (World(CPU), None),
        (World(torch.device("cuda")), "reduce-overhead"),
        (World(torch.device("cuda"), 0, 2), None),
    ],
    ids=str,
)
def test_a_pass_is_one_graph_on_a_gpu(place: World, mode: str | None) -> None:
    assert compile_mode(place) == mode


@pytest.mark.parametrize(
    ("options", "most"), [({"channels_last": True}, 1e-5), ({"precision": "bfloat16"}, 0.1)], ids=str
)
def test_other_layouts_and_precisions_train_alike(options: dict[str, Any], most: float, folder: Path) -> None:
    ends = []
    for given in ({}, options):
        model = network(dropout=0)
        state = train(
            model, replace(PLAIN, **given), training_setup(folder, stream=stream(folder, batch_size=16))
        )
        ends.append((model.state_dict(), state.history[-1]["loss"]))
    assert {value.dtype for value in ends[1][0].values()} == {torch.float32, torch.int64}
    assert apart(ends[1][0], ends[0][0]) < most
    assert equal(ends[1][0], ends[0][0]) <= ("precision" not in options)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=most)
