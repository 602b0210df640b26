"""The loss of a batch: of labels, of a teacher, or of both."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ttcompress.train.options import TrainingOptions


def training_loss(
    logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None, options: TrainingOptions
) -> Tensor:
    """Mean loss over a batch, weighted by `options.distill` where there are both labels (N,) and a teacher.

    Raises:
        ValueError: neither labels nor a teacher.
    """
    label_loss = teacher_loss = None
    if labels is not None:
        label_loss = functional.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)
    if teacher_logits is not None:
        teacher_loss = _distillation_loss(logits, teacher_logits, options.temperature)

    if label_loss is not None and teacher_loss is not None:
        return options.distill * teacher_loss + (1 - options.distill) * label_loss
    if teacher_loss is not None:
        return teacher_loss
    if label_loss is not None:
        return label_loss
    raise ValueError("a loss needs labels or a teacher")


def _distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence from the teacher's softened answers (Hinton et al. 2015)."""
    ours = (logits / temperature).log_softmax(1)
    theirs = (teacher_logits / temperature).log_softmax(1)
    # The gradients of softened answers shrink with the square of the temperature.
    scale = temperature * temperature
    return scale * functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
