"""Which form of a layer is fastest, by a measurement on its device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ttcompress.layers.base import TTLayer
from ttcompress.layers.plain import Form
from ttcompress.measure.timing import at_its_best, by_turns, runner
from ttcompress.networks.plain import Shape, cheapest

SHARE = 0.05
"""Of the time that a benchmark takes, for each form of each layer."""
GAIN = 0.98
"""A form other than the first one has to take less than this share of its time."""


def fastest(layer: TTLayer, forms: Sequence[Form], shape: Shape | None) -> Form:
    """The form that takes least time on inputs of this shape, each in the memory format that is faster for it."""
    if shape is None or len(forms) == 1:
        return cheapest(layer, forms, shape)

    core = layer.cores[0]
    dtype = torch.promote_types(core.dtype, torch.float32) if core.device.type == "cpu" else core.dtype
    x = torch.randn(shape, device=core.device, dtype=dtype)

    def prepared(form: Form) -> tuple[nn.Module, torch.Tensor]:
        built = form.build(layer, dtype).eval().requires_grad_(False)
        best, _ = at_its_best(built, x)
        return built, best

    first = runner(*prepared(forms[0]), training=False)
    ratios = [1.0]
    for form in forms[1:]:
        timings = by_turns(first, runner(*prepared(form), training=False), core.device, SHARE)
        ratios.append(timings.ratio / GAIN)
    return forms[ratios.index(min(ratios))]
