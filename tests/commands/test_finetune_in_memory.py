"""Training of modules in memory on the user's own loader."""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ttcompress
from ttcompress.errors import DataError, PlanError, TTCompressError
from ttcompress.train.options import TrainingOptions

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(count: int = 256) -> tuple[Tensor, Tensor]:
    """Points in 16 dimensions, of four classes by the signs of the first two."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*problem()), batch_size=50, shuffle=shuffle)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))


def accuracy(model: nn.Module) -> float:
    return ttcompress.evaluate(model, [problem()]).top1


def test_a_compressed_module_wins_its_accuracy_back() -> None:
    dense = network()
    ttcompress.finetune(dense, loader(), epochs=30, lr=0.1, device="cpu")
    assert accuracy(dense) > 95
    small, _ = ttcompress.compress(dense, ranks=1, include=["*"], format="lowrank", device="cpu")
    before = accuracy(small)
    history = ttcompress.finetune(
        small, loader(), teacher=dense, epochs=20, lr=0.05, val=loader(), device="cpu"
    )
    assert accuracy(small) > before
    assert accuracy(small) == max(epoch["val"] for epoch in history)
    assert [epoch["epoch"] for epoch in history] == list(range(21))
    assert not small.training


def test_a_teacher_needs_no_labels_and_is_left_alone() -> None:
    teacher = network()
    ttcompress.finetune(teacher, loader(), epochs=30, lr=0.1)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    pupil = network(1)
    unlabelled = [x for x, _ in loader(shuffle=False)]
    ttcompress.finetune(pupil, unlabelled, teacher=teacher, epochs=40, lr=0.1)
    agree = pupil(problem()[0]).argmax(1) == teacher(problem()[0]).argmax(1)
    assert agree.float().mean() > 0.9
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_without_val_the_last_epoch_is_the_result() -> None:
    """The gradient of one step from the first weights, and another from there: not the better of the two."""
    model, same = network(), network()
    x, y = problem()
    ttcompress.finetune(model, [(x, y)], epochs=2, lr=0.5, warm_up=0, schedule="step", clip=0, weight_decay=0)
    optimizer = torch.optim.SGD(same.parameters(), 0.5, momentum=0.9, nesterov=True)
    for rate in (0.5, 0.05):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(same(x), y).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_smaller_last_batch_counts_by_its_mean() -> None:
    """As in everybody's loop: the loss of a batch is the mean over that batch."""
    model, same = network(), network()
    x, y = problem(10)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    ttcompress.finetune(model, batches, epochs=1, lr=0.1, warm_up=0, schedule="step", clip=0, weight_decay=0)
    optimizer = torch.optim.SGD(same.parameters(), 0.1, momentum=0.9, nesterov=True)
    for step, (inputs, labels) in enumerate(batches):
        # The step schedule falls at 30 % of two steps.
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if step == 0 else 0.01
        optimizer.zero_grad()
        nn.functional.cross_entropy(same(inputs), labels).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parameters_stay() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    ttcompress.finetune(model, loader(), epochs=2)
    assert torch.equal(model[0].weight, before)
    assert not model[0].weight.requires_grad


def test_the_same_seed_gives_the_same_network() -> None:
    def trained(seed: int) -> Tensor:
        model = nn.Sequential(network(), nn.Dropout(0.5))
        ttcompress.finetune(model, loader(shuffle=False), epochs=2, seed=seed)
        return model[0][0].weight

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


@pytest.mark.parametrize(
    ("batches", "options", "error", "wanted"),
    [
        ([], {}, DataError, "gives no batch"),
        (iter([problem()]), {}, DataError, "must have a length"),
        ([problem()[0]], {}, DataError, "with teacher$"),
        ([("x", problem()[1])], {}, TTCompressError, "inputs and labels as tensors, not .str, Tensor"),
        ([problem()], {"epochs": 0}, PlanError, "^epochs must be a whole number above 0"),
        ([problem()], {"optimizer": "adam"}, PlanError, "^optimizer must be one of sgd, adamw"),
        ([problem()], {"device": "tpu"}, PlanError, "^device must be"),
    ],
)
def test_mistakes(batches: Any, options: dict[str, Any], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        ttcompress.finetune(network(), batches, **options)


def test_keywords_are_the_options_of_the_training() -> None:
    given = set(inspect.signature(ttcompress.finetune).parameters)
    own = {"module", "train_loader", "teacher", "val", "device", "progress", "log", "unknown"}
    assert given - own == {field.name for field in fields(TrainingOptions)}
    with pytest.raises(TypeError, match="'learning_rate'; did you mean"):
        ttcompress.finetune(network(), loader(), learning_rate=1)


def test_deterministic_is_for_the_training_alone() -> None:
    found: list[bool] = []
    model = network()
    model.register_forward_pre_hook(lambda *_: found.append(torch.are_deterministic_algorithms_enabled()))
    ttcompress.finetune(model, loader(), epochs=1, deterministic=True, device="cpu")
    assert all(found)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError):
        ttcompress.finetune(
            model, [(torch.ones(2, 3), torch.zeros(2).long())], deterministic=True, device="cpu"
        )
    assert not torch.are_deterministic_algorithms_enabled()
