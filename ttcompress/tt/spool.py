"""Tensors laid aside: in memory up to a limit, beyond it in a temporary file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IN_MEMORY = 1 << 26
"""Bytes that are kept in memory, unless somebody says otherwise."""


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
        self._free: dict[int, list[int]] = {}

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

        start = self._write(tensor, self._end)
        self._end += tensor.nbytes
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        return lambda: self._read(torch.empty(shape, dtype=dtype), start).to(device)

    def lay_once(self, tensor: Tensor) -> Callable[[], Tensor]:
        """The same in the file, where its place is free again when it has been fetched, which is done once."""
        free = self._free.setdefault(tensor.nbytes, [])
        start = self._write(tensor, free.pop() if free else self._end)
        self._end = max(self._end, start + tensor.nbytes)
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device

        def fetch() -> Tensor:
            found = self._read(torch.empty(shape, dtype=dtype), start)
            free.append(start)
            return found.to(device)

        return fetch

    def _write(self, tensor: Tensor, start: int) -> int:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self._file.seek(start)
        self._file.write(content.numpy().data)
        self._file.flush()
        return start

    def _read(self, into: Tensor, start: int) -> Tensor:
        target = memoryview(into.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(target):
            done += os.preadv(self._file.fileno(), [target[done:]], start + done)
        return into
