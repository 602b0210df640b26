"""Passes of a network over several batches that halt at one layer after the other and go on when they are told to.

What they hold while they are halted is laid aside where it is too much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ttcompress.calibrate.observe import Call, hooked
from ttcompress.errors import DataError
from ttcompress.layers.base import TTLayer
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.networks.running import NetworkInput, call, tensors_of
from ttcompress.runtime import freed_at_once
from ttcompress.tt.spool import Spool

WORTH_LAYING_ASIDE = 1 << 16
"""Bytes of a tensor; smaller ones stay."""


class _Aside:
    """Memory of the passes of a network that lies in a file, by its place, until it is needed."""

    def __init__(self) -> None:
        self._spool = Spool()
        self._fetches: dict[int, tuple[UntypedStorage, Callable[[], Tensor]]] = {}

    def lay(self, storage: UntypedStorage) -> None:
        """Put its content into the file, and give its memory back."""
        # A copy: memory that NumPy has seen, as files do, cannot be given back any more.
        self._fetches[storage._cdata] = storage, self._spool.lay_once(_bytes_of(storage).clone())
        storage.resize_(0)

    def call_back(self, place: int) -> None:
        """Fetch what lies in the file, if it does."""
        if place in self._fetches:
            storage, fetch = self._fetches.pop(place)
            content = fetch()
            storage.resize_(content.numel())
            _bytes_of(storage).copy_(content)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What the operations of a pass have made and is still in use.

    What other passes made may be needed too, where a network keeps it: it is called back in time.
    """

    def __init__(self, aside: _Aside) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._aside = aside
        self._seen: dict[int, StorageWeakRef] = {}

    @property
    def alive(self) -> list[UntypedStorage]:
        """The memory of all tensors that the pass may need again."""
        found = []
        for place, seen in list(self._seen.items()):
            storage = UntypedStorage._new_with_weak_ptr(seen.cdata)
            if storage is None:
                del self._seen[place]
            else:
                found.append(storage)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        # What is a view of something else, such as of a weight, was not made here.
        old = {each._cdata for each in _storages((args, given))}
        for place in old:
            self._aside.call_back(place)
        made = func(*args, **given)
        for storage in _storages(made):
            if storage._cdata not in old:
                self._seen[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return made


def _storages(tensors: Any) -> Iterator[UntypedStorage]:
    return (each.untyped_storage() for each in tensors_of(tensors) if each.layout is torch.strided)


def _num_bytes(storages: Sequence[UntypedStorage]) -> int:
    return sum(each.nbytes() for each in storages)


# -------------------------------------------------------------------------------------------------------------- passes


class _Ended(BaseException):
    """A pass is no longer needed; no error, so that a network that catches errors does not catch it."""


class _Pass:
    """One batch on its way, in a thread of its own that runs only while its owner waits for it."""

    def __init__(self, model: nn.Module, inputs: NetworkInput, aside: _Aside) -> None:
        self.at: str | None = None
        self.called: Call | None = None
        self.error: BaseException | None = None
        self._model, self._inputs, self._made, self._aside = model, inputs, _Made(aside), aside
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

    @property
    def held(self) -> int:
        """Bytes of memory that it takes where it is halted."""
        return _num_bytes(self._made.alive)

    def lay_aside(self, shared: Collection[int]) -> None:
        """Put what it holds elsewhere, but for what others share, by its place."""
        for storage in self._made.alive:
            is_own = storage._cdata not in shared and storage.resizable()
            if is_own and storage.nbytes() >= WORTH_LAYING_ASIDE:
                self._aside.lay(storage)

    def call_back(self) -> None:
        """Give it back what was laid aside."""
        for storage in self._made.alive:
            self._aside.call_back(storage._cdata)

    def stop(self) -> None:
        """End it wherever it is; what the network keeps of it stays."""
        self.call_back()
        if self._thread.is_alive():
            self._stopping = True
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        if not self._stopping:
            try:
                with torch.no_grad(), self._made:
                    call(self._model, self._inputs)
            except _Ended:
                return
            except BaseException as error:
                self.error = error
        self.at = None
        self._halted.release()


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class InStep:
    """All passes of a network over some batches, each halted at the first call of the layer that is next.

    What a layer is given is what it would be given in a pass of its own from the start, as long as layers change only
    while the passes are halted before them. So one pass over the network does for all its layers. Passes beyond those
    that take `most` bytes lie in a file while others run.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], batches: Sequence[NetworkInput], most: float
    ) -> None:
        self.is_on_time = True
        """Whether all passes came by the layers in the order in which they were asked for."""
        aside = _Aside()
        self._passes = [_Pass(model, batch, aside) for batch in batches]
        self._held, self._most = [0] * len(batches), most
        self._layers = [each for each in model.modules() if isinstance(each, TTLayer | TTWeight)]
        self._seen: dict[int, set[str]] = {number: set() for number in range(len(batches))}
        self._hooks = hooked(model, dict.fromkeys(names), self._reached)
        self._hooks.__enter__()

    def call(self, number: int, name: str) -> Call | None:
        """What this module is called with for a batch; None where its pass does not come by it next.

        A module that is asked for again, as an attention with several weights, is still halted at.
        """
        each = self._passes[number]
        each.call_back()
        if each.at != name:
            each.go_on()
        if each.at != name:
            self.is_on_time = False
        return each.called if self.is_on_time else None

    def leave(self, number: int) -> None:
        """Let the pass of a batch wait, in a file where all together take too much."""
        each = self._passes[number]
        self._held[number] = each.held
        if sum(self._held) > self._most:
            each.lay_aside(self._shared())
            self._held[number] = each.held

    def _shared(self) -> set[int]:
        """What TT layers keep of one pass for the next."""
        kept = (tensor for layer in self._layers for tensor in layer.cached_tensors())
        return {storage._cdata for storage in _storages([*kept])}

    def end(self) -> None:
        """End all passes, for a network that is to be run otherwise from here on."""
        self.is_on_time = False
        for each in self._passes:
            each.stop()

    def stop(self) -> None:
        """End all passes, and watch the network no longer."""
        self.end()
        self._hooks.__exit__(None, None, None)

    def _reached(self, name: str, module: nn.Module, called: Call) -> Any:
        for number, each in enumerate(self._passes):
            if each.is_mine and name not in self._seen[number]:
                self._seen[number].add(name)
                each.halt(name, called)


@contextmanager
def in_step(
    models: Sequence[nn.Module], names: Sequence[str], batches: Sequence[NetworkInput], most: float
) -> Iterator[list[InStep]]:
    """Passes of several networks over the same batches, which end with the block.

    All together hold `most` bytes while they are halted; the others are laid aside.
    """
    walks = []
    with freed_at_once():
        try:
            for model in models:
                walks.append(InStep(model, names, batches, most / len(models)))
            yield walks
        finally:
            for walk in walks:
                walk.stop()


# ------------------------------------------------------------------------------------------------- what they would take


class Halt(NamedTuple):
    """Where a pass comes by a module first: bytes that it holds there, and seconds since it began."""

    held: int
    seconds: float


class Halts(NamedTuple):
    """All halts of a pass by module, and its seconds in all."""

    by_name: dict[str, Halt]
    seconds: float


@torch.no_grad()
def halts_of(model: nn.Module, names: Sequence[str], inputs: NetworkInput) -> Halts | None:
    """What a pass over these inputs takes; None of a network that takes them not."""
    found: dict[str, Halt] = {}
    made, start = _Made(_Aside()), time.perf_counter()

    def look(name: str, module: nn.Module, called: Call) -> None:
        found.setdefault(name, Halt(_num_bytes(made.alive), time.perf_counter() - start))

    try:
        with hooked(model, dict.fromkeys(names), look), made:
            call(model, inputs)
    except DataError:
        return None
    return Halts(found, time.perf_counter() - start)
