"""The losses against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ttcompress.train.loss import training_loss
from ttcompress.train.options import TrainingOptions


@pytest.mark.parametrize(("labelled", "taught"), [(True, False), (False, True), (True, True)])
def test_losses_against_numpy(labelled: bool, taught: bool) -> None:
    generator = np.random.default_rng(0)
    logits, answers = generator.normal(size=(2, 7, 5)) * 3
    labels = generator.integers(0, 5, 7)
    options = TrainingOptions(epochs=1, lr=1, label_smoothing=0.2, distill=0.3, temperature=2.5)

    def log_softmax(values: Any) -> Any:
        return values - np.log(np.exp(values).sum(1, keepdims=True))

    own = -((0.8 * np.eye(5)[labels] + 0.2 / 5) * log_softmax(logits)).sum(1).mean()
    theirs = log_softmax(answers / 2.5)
    divergence = 2.5**2 * (np.exp(theirs) * (theirs - log_softmax(logits / 2.5))).sum(1).mean()
    expected = {(True, True): 0.3 * divergence + 0.7 * own, (True, False): own, (False, True): divergence}
    given = torch.from_numpy(labels) if labelled else None, torch.from_numpy(answers) if taught else None
    assert float(training_loss(torch.from_numpy(logits), *given, options)) == pytest.approx(
        expected[labelled, taught]
    )


def test_neither_labels_nor_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="needs labels or a teacher"):
        training_loss(torch.zeros(2, 3), None, None, TrainingOptions(epochs=1, lr=1))
