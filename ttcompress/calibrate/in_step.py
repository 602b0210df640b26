"""Passes of a network over several batches that halt at one layer after the other and go on when they are told to."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ttcompress.calibrate.observe import Call, hooked
from ttcompress.errors import DataError
from ttcompress.networks.running import NetworkInput, call, tensors_of
from ttcompress.runtime import freed_at_once


class _Ended(BaseException):
    """A pass is no longer needed; no error, so that a network that catches errors does not catch it."""


class _Pass:
    """One batch on its way, in a thread of its own that runs only while its owner waits for it."""

    def __init__(self, model: nn.Module, inputs: NetworkInput) -> None:
        self.at: str | None = None
        self.called: Call | None = None
        self.error: BaseException | None = None
        self._model, self._inputs = model, inputs
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_mine(self) -> bool:
        """Whether the caller is what runs in this pass."""
        return threading.current_thread() is self._thread

    def go_on(self) -> None:
        """Run to the next halt, or to the end, where `at` is None."""
        self.at = self.called = None
        self._go.release()
        self._halted.acquire()
        if self.error is not None:
            raise self.error

    def halt(self, name: str, called: Call) -> None:
        """Called from within, where a module is reached."""
        self.at, self.called = name, called
        self._halted.release()
        self._go.acquire()
        if self._stopping:
            raise _Ended

    def stop(self) -> None:
        """End it wherever it is."""
        if self._thread.is_alive():
            self._stopping = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        if not self._stopping:
            try:
                with torch.no_grad():
                    call(self._model, self._inputs)
            except _Ended:
                return
            except BaseException as error:
                self.error = error
        self.at = None
        self._halted.release()


class InStep:
    """All passes of a network over some batches, each halted at the first call of the layer that is next.

    What a layer is given is what it would be given in a pass of its own from the start, as long as layers change only
    while the passes are halted before them. So one pass over the network does for all its layers.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], batches: Sequence[NetworkInput]) -> None:
        self.is_on_time = True
        """Whether all passes came by the layers in the order in which they were asked for."""
        self._passes = [_Pass(model, batch) for batch in batches]
        self._seen: dict[int, set[str]] = {number: set() for number in range(len(batches))}
        self._hooks = hooked(model, dict.fromkeys(names), self._reached)
        self._hooks.__enter__()

    def calls(self, name: str) -> list[Call] | None:
        """What this module is called with for each batch; None where some pass does not come by it next.

        A module that is asked for again, as an attention with several weights, is still halted at.
        """
        found = []
        for each in self._passes:
            if each.at != name:
                each.go_on()
            if each.at != name or each.called is None:
                self.is_on_time = False
                return None
            found.append(each.called)
        return found

    def stop(self) -> None:
        """End all passes."""
        for each in self._passes:
            each.stop()
        self._hooks.__exit__(None, None, None)

    def _reached(self, name: str, module: nn.Module, called: Call) -> Any:
        for number, each in enumerate(self._passes):
            if each.is_mine and name not in self._seen[number]:
                self._seen[number].add(name)
                each.halt(name, called)


@contextmanager
def in_step(
    models: Sequence[nn.Module], names: Sequence[str], batches: Sequence[NetworkInput]
) -> Iterator[list[InStep]]:
    """Passes of several networks over the same batches, which end with the block."""
    walks = []
    with freed_at_once():
        try:
            for model in models:
                walks.append(InStep(model, names, batches))
            yield walks
        finally:
            for walk in walks:
                walk.stop()


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What operations make, so that it can be counted as long as it is alive."""

    def __init__(self, inputs: NetworkInput) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in tensors_of(inputs):
            self._remember(tensor)

    @property
    def alive(self) -> int:
        """Bytes of all that is still in use."""
        in_use = {key: each for key, each in self._storages.items() if not _is_gone(each[0])}
        self._storages = in_use
        return sum(size for _, size in in_use.values())

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_of(made):
            self._remember(tensor)
        return made


def _is_gone(storage: StorageWeakRef) -> bool:
    gone: bool = storage.expired()  # type: ignore[no-untyped-call]
    return gone


@torch.no_grad()
def bytes_at_halts(model: nn.Module, names: Sequence[str], inputs: NetworkInput) -> dict[str, int]:
    """Memory that a pass over these inputs holds where it comes by each module first; nothing of a network that takes them not.

    Parameters do not count, inputs do.
    """
    held: dict[str, int] = {}
    made = _Made(inputs)

    def look(name: str, module: nn.Module, called: Call) -> None:
        held.setdefault(name, made.alive)

    try:
        with hooked(model, dict.fromkeys(names), look), made:
            call(model, inputs)
    except DataError:
        return {}
    return held
