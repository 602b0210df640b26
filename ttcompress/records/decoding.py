"""JSON from outside, decoded into typed forms or refused in one line that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import TypeVar

import msgspec

from ttcompress.errors import ShapeError, TTCompressError

Form = TypeVar("Form")
DEEPEST = 50
"""Levels of lists and objects in each other; ours have six."""
LARGEST = 2**63
"""No integer reaches it: other readers hold them in 64 bits."""
LONGEST_SHOWN = 60
WORDS = {
    "int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false",
    "array": "a list", "object": "an object", "null": "null",
}  # fmt: skip
"""The types of JSON as msgspec calls them, and as messages do."""


class FieldError(ValueError):
    """A field of a wrong type or value, in one line."""


@contextmanager
def refusing_as(error_type: type[TTCompressError]) -> Iterator[None]:
    """Wrong fields, and shapes that do not fit together, are errors of this type.

    Raises:
        TTCompressError: of that type.
    """
    try:
        yield
    except (FieldError, ShapeError) as error:
        raise error_type(str(error)) from error


@contextmanager
def within(where: str) -> Iterator[None]:
    """Shapes that do not fit together are the fault of this field.

    Raises:
        FieldError: the same with the field before it.
    """
    try:
        yield
    except ShapeError as error:
        raise FieldError(f"{where}: {error}") from error


def decode(data: object, form: type[Form], where: str = "") -> Form:
    """JSON values as a form, a msgspec.Struct or a dataclass; `where` is their own path.

    Raises:
        FieldError: a key is missing, or a value is of another type or out of range.
    """
    try:
        return msgspec.convert(data, form)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        raise FieldError(_sentence(problem, data, where, place.rstrip("`"))) from error


def check_values(data: object) -> None:
    """See that numbers are finite and of usual size and texts can be encoded, also where no form looks.

    Raises:
        FieldError: one is not, or values are nested too deeply.
    """
    todo: list[tuple[tuple[str, ...], object]] = [((), data)]
    while todo:
        path, value = todo.pop()
        if problem := _problem(value, len(path)):
            raise FieldError(f"{''.join(path).removeprefix('.') or 'it'} {problem}")

        if isinstance(value, dict):
            for key, inner in value.items():
                below = (*path, _step(key))
                todo += [(below, key), (below, inner)]
        elif isinstance(value, list | tuple):
            todo += [((*path, f"[{index}]"), inner) for index, inner in enumerate(value)]


def _problem(value: object, depth: int) -> str:
    if depth > DEEPEST:
        return "is nested too deeply"
    if isinstance(value, float) and not isfinite(value):
        return f"must be a finite number, not {shown(value)}"
    if isinstance(value, int) and abs(value) >= LARGEST:
        return f"must be a whole number below 2^63, not {shown(value)}"
    if isinstance(value, str) and not _is_encodable(value):
        return f"must be a text without lone surrogates, not {shown(value)}"
    return ""


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _step(key: str) -> str:
    """A key as a step of a path; names of parameters have dots in them."""
    return f".{key}" if key.isidentifier() and key.isascii() else f"[{shown(key)}]"


def shown(value: object) -> str:
    """A value in a one-line message: as JSON has it, cut where it is long."""
    return shortened(json.dumps(value))


def shortened(text: str) -> str:
    """A text as one-line messages have room for it."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."


def _sentence(problem: str, data: object, where: str, place: str) -> str:
    """What msgspec says of a value, with the value itself, in plain words."""
    # Of a mapping it does not tell the key.
    place, _, is_entry = place.partition("[...")
    field = (where + place).removeprefix(".")
    for start, end in (
        ("Object missing required", "is missing"),
        ("Object contains unknown", "is not known"),
    ):
        if problem.startswith(start):
            name = problem.split("`")[1]
            return f"{field}.{name} {end}".removeprefix(".")

    wanted = _wanted(problem)
    if not wanted:
        return f"{field}: {problem}"
    subject = f"every entry of {field}" if is_entry else field or "it"
    return f"{subject} must be {wanted}, not {shown(_found(data, place))}"


def _found(data: object, place: str) -> object:
    value = data
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", place):
        if isinstance(value, dict):
            value = value[name]
        elif isinstance(value, list | tuple):
            value = value[int(index)]
    return value


BOUNDS = {"of length >= ": "of length from ", ">= ": "from ", "<= ": "up to ", "> ": "above "}


def _wanted(problem: str) -> str:
    """What msgspec expected, in words; nothing where the message is one of our own.

    It names types in backquotes, then perhaps a bound, a length or a pattern.
    """
    expected, _, _ = problem.removeprefix("Expected ").partition(", got ")
    types = re.match("`(.+?)`", expected)
    if types is None:
        return ""
    rest = expected[types.end() :].strip()
    if choice := re.search(r"regex .*\((.+)\)", rest):
        return _alternatives(choice[1].split("|"))

    for sign, words in BOUNDS.items():
        if rest.startswith(sign):
            rest = words + rest.removeprefix(sign)
            break
    names = _alternatives(WORDS.get(name, name) for name in types[1].split(" | "))
    return f"{names} {rest}".strip()


def _alternatives(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
