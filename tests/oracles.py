"""What several tests check against, in NumPy and float64."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Full = NDArray[np.float64]


def weight_in_numpy(cores: Sequence[Tensor], shape: Sequence[int]) -> Full:
    """The dense weight by one einsum over cores of the stored shape, padding cut."""
    count = len(cores)
    operands: list[object] = []
    for k, core in enumerate(cores):
        operands += [core.double().numpy(), [k, 10 + k, 20 + k, 30 + k, k + 1]]
    order = [base + k for base in (10, 20, 30) for k in range(count)]
    whole = np.einsum(*operands, [0, *order, count])  # type: ignore[call-overload]
    sizes = [prod(core.shape[axis] for core in cores) for axis in (1, 2, 3)]
    return np.asarray(whole.reshape(sizes)[: shape[0], : shape[1]].reshape(tuple(shape)))
