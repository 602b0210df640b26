"""What of a network's output counts: of whatever it returns, one tensor that is fitted to and measured."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ttcompress.networks.running import NetworkInput, one_tensor

Answer = Callable[[nn.Module, NetworkInput], Tensor]
"""Of a network and a batch, what is to stay as it is: logits (inputs, classes), or numbers of any other shape.

Where it has two dimensions, all of a row may be moved by the same number (`centred`). It may not be finite."""

plain_answer: Answer = one_tensor
"""The output itself, of networks that return one tensor."""
