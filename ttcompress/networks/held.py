"""What holds layers of a network outside its module tree, where no swap reaches; and copies that hold their own."""

from __future__ import annotations

import copy
import dis
import gc
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinMethodType, CellType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ttcompress.errors import ArchitectureError, shortlist
from ttcompress.layers.spec import Replaceable
from ttcompress.networks.factories import one_line

Module = TypeVar("Module", bound=nn.Module)
MOST_OBJECTS = 50_000
"""So many are looked at, those first that are nearest to the network."""
REGISTERED = ("_modules", "_parameters", "_buffers")
"""Where the module tree itself is."""
COMPILED = "_compiled_call_impl"
"""What torch.compile leaves on a module, and copies of it do without: it runs the module as it is then."""
OPAQUE = (
    str, bytes, bytearray, int, float, complex, type(None), type, ModuleType, CodeType, FrameType, torch.dtype,
    torch.device, torch.Size,
)  # fmt: skip
"""What holds no layer, or everything."""
LIBRARIES = ("torch", "torchvision", "ttcompress", "numpy")
"""Their classes and globals hold no layer of a network."""


@dataclass(frozen=True)
class Holders:
    """What was found: who holds modules of the network, by id, and tensors; functions on the ways there."""

    modules: dict[int, str]
    tensors: list[tuple[Tensor, str]]
    functions: list[FunctionType]


def holders(model: nn.Module) -> Holders:
    """All modules of a network and all tensors that its objects hold outside the module tree.

    Followed are attributes, containers, closures, bound methods, partials, weak references, class attributes and the
    globals that functions of the user's name; not classes, Python modules and the insides of libraries.
    """
    tree = {id(module) for module in model.modules()}
    found = Holders({}, [], [])
    reached = dict[int, Any]()
    came_from = dict[int, list[int]]()
    waiting = deque((value, start, 0) for value, start in _roots(model))

    while waiting and len(reached) < MOST_OBJECTS:
        value, start, holder = waiting.popleft()
        if isinstance(value, OPAQUE):
            continue
        came_from.setdefault(id(value), []).append(holder)
        if id(value) in reached:
            continue

        # Held, so that no other object gets its id.
        reached[id(value)] = value
        if id(value) in tree:
            found.modules[id(value)] = start
        elif isinstance(value, Tensor):
            found.tensors.append((value, start))
        else:
            waiting.extend((each, start, id(value)) for each in _referents(value))

    ways = [*found.modules, *(id(tensor) for tensor, _ in found.tensors)]
    passed = set[int]()
    while ways:
        one = ways.pop()
        if one not in passed:
            passed.add(one)
            ways += came_from.get(one, [])
    found.functions.extend(reached[each] for each in passed if isinstance(reached.get(each), FunctionType))
    return found


def _roots(model: nn.Module) -> Iterator[tuple[Any, str]]:
    classes = dict[type, None]()
    for name, module in model.named_modules():
        owner = name or type(model).__name__
        for attribute, value in vars(module).items():
            if attribute not in (*REGISTERED, COMPILED):
                yield value, f"{owner}.{attribute}"
        classes.update(dict.fromkeys(type(module).__mro__))

    for each in classes:
        if not _is_of_library(each.__module__):
            for attribute, value in vars(each).items():
                yield value, f"{each.__name__}.{attribute}"


def _is_of_library(module: object) -> bool:
    return str(module).partition(".")[0] in (*LIBRARIES, "builtins", "abc", "typing")


def _referents(value: Any) -> Iterable[Any]:
    """What an object holds."""
    if isinstance(value, nn.Module):
        return list(vars(value).values())
    if isinstance(value, FunctionType):
        named = () if _is_of_library(value.__module__) else _named_globals(value)
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, value.__defaults__, value.__kwdefaults__, value.__dict__, *named]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, weakref.ReferenceType):
        return [value()]
    if isinstance(value, np.ndarray):
        return [value.base]
    return gc.get_referents(value)


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _named_globals(function: FunctionType) -> list[Any]:
    """The globals that a function names."""
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        names |= {str(line.argval) for line in dis.get_instructions(code) if line.opname == "LOAD_GLOBAL"}
    return [function.__globals__[name] for name in sorted(names) if name in function.__globals__]


def held_layers(model: nn.Module) -> dict[str, str]:
    """Linear layers, tables and convolutions by fqn that something outside the module tree holds, or their parameters, and who."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Replaceable)}
    found = holders(model)

    homes = dict[int, list[tuple[str, Tensor]]]()
    for name, layer in layers.items():
        for parameter in layer.parameters(recurse=False):
            memory = _memory(parameter)
            if memory is not None:
                homes.setdefault(memory, []).append((name, parameter))

    held = {name: found.modules[id(layer)] for name, layer in layers.items() if id(layer) in found.modules}
    for tensor, start in found.tensors:
        for name, own in homes.get(_memory(tensor) or 0, []):
            if _overlap(tensor, own):
                held.setdefault(name, start)
    return held


def held_tensors(model: nn.Module) -> set[str]:
    """Names in the state dict of what something outside the module tree holds, itself or its memory."""
    tensors = holders(model).tensors
    memories = {_memory(tensor) for tensor, _ in tensors} - {None}
    found = set[str]()
    for name, own in model.state_dict(keep_vars=True).items():
        if (
            isinstance(own, Tensor)
            and _memory(own) in memories
            and any(_overlap(own, each) for each, _ in tensors)
        ):
            found.add(name)
    return found


def _memory(tensor: Tensor | None) -> int | None:
    """What tells memory apart, on the meta device too; None for tensors without."""
    try:
        return None if tensor is None else int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share memory: those that a file was mapped to are parts of the same."""
    if _memory(one) != _memory(other):
        return False
    (a, b), (c, d) = _extent(one), _extent(other)
    return a < d and c < b


def _extent(tensor: Tensor) -> tuple[int, int]:
    start = int(tensor.storage_offset())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = tensor.element_size()
    return start * size, (start + last + 1) * size if tensor.numel() else start * size


# -------------------------------------------------------------------------------------------------------------- copies


def copied(model: Module, sharing: bool = False) -> Module:
    """A deep copy, whose functions reach into the copy where those of the network reach into the network.

    Where it is `sharing`, its parameters and buffers are its own, but have the memory of the network's.

    Raises:
        ArchitectureError: a part of the network that cannot be copied, or that a copy would share with it.
    """
    try:
        made = _copied(model, _sharing(model) if sharing else {})
    except (Exception, SystemExit) as error:
        raise ArchitectureError(f"the network cannot be copied: {one_line(error)}") from error

    held = held_layers(model)
    shared = sorted(held.keys() - held_layers(made).keys()) if held else []
    if shared:
        holder = held[shared[0]]
        raise ArchitectureError(
            f"{shortlist(shared)}: held by {holder}, which a copy of the network would go on to run; "
            "hold layers in attributes of the network only"
        )
    return made


def _computed(model: Module) -> dict[int, Any]:
    """Values of the tensors that a network computes and holds, as pruning and norms of weights leave them.

    Torch copies no tensor that has a history; the copy computes its own before they are read.
    """
    held = [each for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}


def _sharing(model: Module) -> dict[int, Any]:
    """By the id of a parameter or buffer, another one with the same memory."""
    parameters = {
        id(each): nn.Parameter(each.detach(), each.requires_grad)
        for each in model.parameters()
        if type(each) is nn.Parameter
    }
    return {**parameters, **{id(each): each.detach() for each in model.buffers() if type(each) is Tensor}}


def _copied(model: Module, known: dict[int, Any]) -> Module:
    memo = {**_computed(model), **known}
    cells = dict[int, tuple[CellType, CellType]]()
    twins = list[tuple[FunctionType, FunctionType]]()

    # For Python functions are values: a copy of one has the very closure that the first one has.
    for function in holders(model).functions:
        closure = function.__closure__
        for cell in closure or ():
            cells.setdefault(id(cell), (cell, CellType()))
        own = tuple(cells[id(cell)][1] for cell in closure) if closure else None
        twin = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, own
        )
        memo[id(function)] = twin
        twins.append((function, twin))

    made = copy.deepcopy(model, memo)
    for old, new in cells.values():
        if _is_filled(old):
            new.cell_contents = copy.deepcopy(old.cell_contents, memo)
    for function, twin in twins:
        twin.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        twin.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        vars(twin).update(copy.deepcopy(vars(function), memo))
    return made
