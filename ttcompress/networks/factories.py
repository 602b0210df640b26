"""Functions of the user's own that build networks: found, imported and called, with whatever goes wrong in one line."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ttcompress.errors import ArchitectureError, TTCompressError, shortlist

Factory = Callable[[], nn.Module]
KINDS = ("zoo", "torchvision", "timm", "transformers")
"""Prefixes of references that are no modules."""


def built_by(name: str, factory: Factory | None) -> nn.Module:
    """What a factory returns, on the CPU.

    Raises:
        ArchitectureError: there is none, it fails, or it returns no network that can be gone through.
    """
    if factory is None:
        raise ArchitectureError(
            f"the network comes from {name}: pass --arch net.py:build (or factory= in Python)"
        )
    with _blaming(f"{name} failed"), torch.device("cpu"):
        model = factory()
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"{name} returned a {type(model).__name__}, it has to return an nn.Module")
    check_module(model, name)
    return model


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Whatever code of the user's raises as one line; an exit of its own is no success of ours."""
    try:
        yield
    except (KeyboardInterrupt, TTCompressError):
        raise
    except BaseException as error:
        raise ArchitectureError(f"{what}: {one_line(error)}") from error


def check_module(model: nn.Module, name: str = "the network") -> None:
    """See that a network can be gone through and has weights.

    Raises:
        ArchitectureError: layers that wait for their first input, modules in a circle, or a state dict that fails.
    """
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"{name} has to be an nn.Module, not {type(model).__name__}")
    try:
        waiting = [fqn for fqn, value in model.named_parameters() if is_lazy(value)]
        waiting += [fqn for fqn, value in model.named_buffers() if is_lazy(value)]
        if not waiting:
            model.state_dict()
    except RecursionError as error:
        raise ArchitectureError(
            f"{name} holds itself: a module of it is inside itself, as a parent kept by a child"
        ) from error
    except Exception as error:
        raise ArchitectureError(f"the state dict of {name} fails: {one_line(error)}") from error
    if waiting:
        lazy = shortlist(waiting)
        raise ArchitectureError(
            f"{name} has lazy layers without weights ({lazy}): run it once on an input, or give their sizes"
        )


def is_factory(reference: str) -> bool:
    """Whether a reference names a function: of a file, path/to/net.py:build, or of a module, package.module:build."""
    head, _, name = reference.rpartition(":")
    if reference.endswith(".py") or head.endswith(".py"):
        return True
    if head in KINDS or not name.isidentifier() or not all(part.isidentifier() for part in head.split(".")):
        return False
    return _module_file(head) is not None


def _module_file(module: str) -> Path | None:
    """The file of a module that can be imported from here, found without importing it."""
    first, *rest = module.split(".")
    with _on_path(Path.cwd()), suppress(Exception):
        found = importlib.machinery.PathFinder.find_spec(first)
        for part in rest:
            if found is None or found.submodule_search_locations is None:
                return None
            found = importlib.machinery.PathFinder.find_spec(part, list(found.submodule_search_locations))
        return Path(found.origin) if found is not None and found.origin else None
    return None


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """While a file is imported its neighbours come first, as for a script; later imports of its functions find them."""
    text = str(folder.resolve())
    sys.path.insert(0, text)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(text)
        if text not in sys.path:
            sys.path.append(text)


def split_factory(reference: str) -> tuple[Path, str]:
    """The file of a reference, and the name of the function in it.

    Raises:
        ArchitectureError: it names no function, or there is no such file.
    """
    head, _, name = reference.rpartition(":")
    if not head.endswith(".py"):
        path = _module_file(head) if name else None
        if path is None:
            raise ArchitectureError(f"{reference} names no factory: write path/to/net.py:factory")
        return path, name
    if not name:
        raise ArchitectureError(f"{reference} names no factory: write path/to/net.py:factory")

    with _blaming(f"{head} cannot be read"):
        path = Path(head).expanduser()
        exists = path.is_file()
    if not exists:
        raise ArchitectureError(f"no file {path}: --arch path/to/net.py:factory needs one")
    return path, name


def load_factory(reference: str) -> Factory:
    """Import `path/to/net.py` of the reference `path/to/net.py:factory` and return its function `factory`.

    The file may import its neighbours. A module is named `package.module:factory`, found from the folder of work.

    Raises:
        ArchitectureError: no such file or function, or an exception while the file was imported.
    """
    path, name = split_factory(reference)
    head = reference.rpartition(":")[0]
    if head.endswith(".py"):
        module = _import_file(path)
    else:
        with _blaming(f"{head} failed on import"), _on_path(Path.cwd()):
            module = importlib.import_module(head)

    factory = getattr(module, name, None)
    if not callable(factory):
        functions = [
            key for key, value in vars(module).items() if callable(value) and not key.startswith("_")
        ]
        raise ArchitectureError(f"{path} has no function {name!r}; it has {shortlist(functions) or 'none'}")
    return factory  # type: ignore[no-any-return]


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ttcompress_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ArchitectureError(f"{path} cannot be imported as a Python file")

    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by name.
    sys.modules[spec.name] = module
    try:
        with _blaming(f"{path} failed on import"), _on_path(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def one_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    name, line = type(error).__name__, next(iter(str(error).splitlines()), "")
    return f"{name}: {line}" if line else name
