"""The options of the command line, made from the one table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import cloup

from ttcompress.options import GROUPS, RUN_OPTIONS, Option, options_of
from ttcompress.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
# Python's own int() and float() also take underscores and the digits of other scripts.
WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|nan)", re.ASCII)


class Number(click.ParamType[Any]):
    """One number, written in plain digits."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "integer" if kind is int else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `4` or `0.5`."""
        if not isinstance(value, str):
            return value
        number = read_number(value, self.kind)
        if number is None:
            self.fail(f"{value!r} is not a valid {self.name}.", param, ctx)
        return number


class Numbers(click.ParamType[Any]):
    """A number, or several with commas between."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `4,4,8`."""
        if not isinstance(value, str):
            return value
        numbers = [read_number(part.strip(" "), self.kind) for part in value.split(",")]
        if None in numbers:
            self.fail(f"{value!r} is not a list of {self.kind.__name__} numbers such as 4,4,8", param, ctx)
        return tuple(numbers)


class Ranks(Numbers):
    """One rank for all cuts, or the inner TT-ranks of one layer."""

    def __init__(self) -> None:
        super().__init__(int)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `4` or `22,20,20`."""
        numbers = super().convert(value, param, ctx)
        return numbers[0] if len(numbers) == 1 else numbers


class CountOrAuto(Number):
    """A whole number, or the word auto."""

    def __init__(self) -> None:
        super().__init__(int)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `8` or `auto`."""
        return value if value == "auto" else super().convert(value, param, ctx)


class Words(click.ParamType[Any]):
    """A name, or several with commas between."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `chain,matrix`."""
        return tuple(word.strip(" ") for word in value.split(",")) if isinstance(value, str) else value


def read_number(text: str, kind: type[int] | type[float]) -> int | float | None:
    """The number that a text is, or None where it is none.

    >>> read_number("12", int), read_number("1_2", int), read_number("1e-3", float)
    (12, None, 0.001)
    """
    pattern = WHOLE if kind is int else REAL
    # No number of this tool has more digits; Python itself refuses to read some thousands of them.
    return kind(text) if len(text) <= 40 and pattern.fullmatch(text) else None


_TYPES: dict[str, Any] = {
    "int": Number(int),
    "float": Number(float),
    "ints": Numbers(int),
    "floats": Numbers(float),
    "ranks": Ranks(),
    "count_or_auto": CountOrAuto(),
    "words": Words(),
    "text": str,
    "texts": str,
    "path": PATH,
}


def takes(command: str) -> Callable[[F], F]:
    """Give a verb all options that the table has for it, in the table's groups."""
    options = options_of(command)

    def decorate(function: F) -> F:
        for title in reversed(GROUPS):
            chosen = [_click_option(option, command) for option in options if option.group == title]
            if chosen:
                function = cloup.option_group(title, *chosen)(function)
        return function

    return decorate


def _click_option(option: Option, command: str) -> Callable[[Any], Any]:
    kind = option.kind
    flags = option.flags_of(command)
    settings: dict[str, Any] = {"help": _help(option)}

    if kind.form == "switch":
        settings |= {"is_flag": True, "default": None if option.of_run else False}
    elif kind.form == "on_off":
        flags, settings = ("/".join(flags),), {**settings, "default": None}
    elif kind.form == "choice":
        settings |= {"type": click.Choice(kind.choices)}
    else:
        settings |= {"type": _TYPES[kind.form], "metavar": option.metavar, "multiple": kind.form == "texts"}

    settings["required"] = option.name in _REQUIRED.get(command, ())
    return cloup.option(*flags, option.name, **settings)


_REQUIRED = {"expand": ("output",), "export": ("onnx",), "sweep": ("ratios", "output")}


def _help(option: Option) -> str:
    words = option.default_words
    is_off = option.kind.form == "switch" or not words
    return option.help if is_off else f"{option.help}  [default: {words}]"


def stated_recipe(given: dict[str, Any]) -> Recipe:
    """The recipe of a call: what its options state, over the file that `--recipe` names."""
    path = given.get("recipe")
    stated = {name: value for name, value in given.items() if name in RUN_OPTIONS}
    recipe = Recipe.from_toml(path) if path else Recipe()
    return recipe.override(**stated).check_needs()
