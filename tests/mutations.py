"""Documents with a field or two of another value or type, for tests of what comes from outside."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from math import inf, nan
from typing import Any

from hypothesis import strategies as st

Place = tuple[str | int, ...]
MISSING = object()
SMALL = st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.text(max_size=3) | st.just([])
EDGES = st.sampled_from(
    [nan, inf, -inf, 2**40, 2**41, 2**53, 2**63, -(2**70), 10**400, 1e308, "\ud800", "int8", {}]
)
VALUES = (
    SMALL
    | EDGES
    | st.lists(SMALL | EDGES, max_size=4)
    | st.dictionaries(st.text(max_size=3), SMALL | EDGES, max_size=2)
)


def changed(data: dict[str, Any], place: Place, value: object) -> dict[str, Any]:
    """A copy with this value in this place, or nothing there."""
    data = copy.deepcopy(data)
    inner: Any = data
    for step in place[:-1]:
        inner = inner[step]
    if value is MISSING:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return data


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*place, key))


def mutated(source: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """One or two values replaced, removed or swapped with others of the same document."""
    result = source
    for _ in range(data.draw(st.integers(1, 2))):
        paths = [place for place in places(result) if place]
        if not paths:
            break
        place = data.draw(st.sampled_from(paths))
        elsewhere: Any = result
        for step in data.draw(st.sampled_from(paths)):
            elsewhere = elsewhere[step]
        value = data.draw(VALUES | st.just(MISSING) | st.just(elsewhere))
        result = changed(result, place, value)
    return result
