"""The loss of a batch: of labels, of a teacher, or of both."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ttcompress.train.setup import Options


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
