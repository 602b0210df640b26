"""Tensors laid aside: in memory up to a limit, beyond it in a temporary file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

IN_MEMORY = 1 << 28
"""Bytes that are kept in memory."""


class Spool:
    """A place for tensors that are needed again later, each of them rarely.

    The file is without a name and gone with the process. TMPDIR says where temporary files are.

    >>> spool = Spool(in_memory=0)
    >>> spool.lay(torch.arange(3))()
    tensor([0, 1, 2])
    """

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._left = in_memory
        self._end = 0

    @cached_property
    def _file(self) -> Any:
        # It is open as long as anything can be fetched from it.
        return tempfile.TemporaryFile()

    def lay(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Lay a tensor aside; the function gives it back, bit for bit, where it was.

        What is kept in memory is given back itself, and may not be written to.
        """
        self._left -= tensor.nbytes
        if self._left >= 0:
            return lambda: tensor

        file, start = self._file, self._end
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        file.seek(start)
        file.write(content.numpy().data)
        file.flush()
        self._end += content.numel()

        def fetch() -> Tensor:
            found = torch.empty(prod(shape), dtype=dtype)
            target = memoryview(found.view(torch.uint8).numpy())  # type: ignore[arg-type]
            done = 0
            while done < len(target):
                done += os.preadv(file.fileno(), [target[done:]], start + done)
            return found.reshape(shape).to(device)

        return fetch
