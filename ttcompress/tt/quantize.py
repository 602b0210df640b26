"""TT-cores as whole numbers of eight bits, with a scale for each slice of their last axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttcompress.errors import ShapeError

LEVELS = 127
GROUPED_DIM = 6
"""Dimensions of a core with groups in front: group, TT-rank, out, in, window, TT-rank."""
_COARSE = -256
"""Clears the last eight bits of a float32, so that a scale times a code is exact, and found again."""


def as_stored(cores: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the cores with the values that they have after being stored in this type; int8 ones as float32.

    Raises:
        ShapeError: values beyond the range of the type.
    """
    if dtype == torch.int8 and is_grouped(cores[0]):
        groups = [as_stored(group, dtype) for group in zip(*cores, strict=True)]
        stored = [torch.stack(group) for group in zip(*groups, strict=True)]
    elif dtype == torch.int8:
        stored = [dequantize(*quantize(core)) for core in balanced(cores)]
    else:
        stored = [core.to(dtype) for core in cores]

    are_finite = all(bool(core.isfinite().all()) for core in stored)
    if not are_finite:
        raise ShapeError(f"TT-cores of these values leave the range of {dtype}: choose a wider dtype")
    return stored


def quantize(core: Tensor) -> tuple[Tensor, Tensor]:
    """Round a core to codes times scales.

    Codes are int8 in the shape of the core, scales float32, one for each slice of the last axis; where groups come
    in front, these have scales of their own. What `dequantize` makes of the result is quantized to the same codes and
    scales.
    """
    values = core.float()
    lead = core.shape[:1] if is_grouped(core) else ()
    most = values.abs().reshape(*lead, -1, core.shape[-1]).amax(-2)
    bits = (most / LEVELS).view(torch.int32)
    scales = (bits & _COARSE).view(torch.float32)

    # A slice of zeros has scale 0, and codes 0.
    divisors = scales.where(scales > 0, 1)
    codes = (values / _beside(divisors, core)).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 core that codes and scales stand for."""
    return codes.float() * _beside(scales, codes)


def is_grouped(core: Tensor) -> bool:
    """Tell whether a core has an axis of groups in front."""
    return core.dim() == GROUPED_DIM


def _beside(scales: Tensor, core: Tensor) -> Tensor:
    """View scales so that they meet the last axis of a core, and the first where that is of groups."""
    if not is_grouped(core):
        return scales
    ones = [1] * (core.dim() - 2)
    return scales.view(len(scales), *ones, -1)


def balanced(cores: Sequence[Tensor]) -> list[Tensor]:
    """Return the same tensor in other cores, float64, whose slices along the first axis are of one size.

    These share the scales of the last axis, so that small ones would lose most of their digits. What they are
    multiplied by is taken from the slices of the core before, each of which has a scale of its own.
    """
    exact = [core.double() for core in cores]

    for k in range(len(exact) - 1, 0, -1):
        core = exact[k]
        columns = core.reshape(-1, core.shape[-1]).abs().amax(0)
        # Measured in units of the scales, and left as it is where all are zero.
        relative = core / columns.where(columns > 0, 1)
        sizes = relative.abs().reshape(len(core), -1).amax(1)
        sizes = sizes.where(sizes > 0, 1)

        ones = [1] * (core.dim() - 1)
        exact[k] = core / sizes.view(-1, *ones)
        exact[k - 1] = exact[k - 1] * sizes

    return exact
