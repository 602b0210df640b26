"""Numbers on the command line are plain digits, whatever Python itself would read as a number."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from command_line import Done
from hypothesis import given
from hypothesis import strategies as st

from ttcompress.cli_options import read_number
from ttcompress.options import RUN_OPTIONS, TABLE, Option

Run = Callable[..., Done]
NUMBERS = [option for option in TABLE if option.kind.form in ("int", "float", "ints", "floats", "ranks")]
NO_NUMBERS = [
    "2_0", "\uff12", "\u0662", "\u0d69", "\u00b2", "\u2460", "0x10", "0b1", "1e", "e3", "1e5e5", "--5", "5-", "- 5",
    "", " ", "4;4", "4 4", "4\u00a0", "\ufeff4", "4\n", "True", "None", "infinity", "1,,2", ",", "1,", "9" * 41,
]  # fmt: skip


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_what_is_no_plain_number_is_refused(option: Option, run: Run) -> None:
    verb = option.commands[0]
    for text in NO_NUMBERS:
        done = run(verb, "net.pt", f"{option.flags_of(verb)[0]}={text}")
        assert (text, done.code, done.out, done.err.count("\n")) == (text, 2, "", 1)
        assert done.err.startswith("ttcompress: Invalid value for")


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("+4", 4), ("-4", -4), ("007", 7), ("0", 0)])
def test_whole_numbers(text: str, value: int) -> None:
    assert read_number(text, int) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("4.", 4.0), (".5", 0.5), ("1e-3", 1e-3), ("+2E2", 200.0), ("-0.5", -0.5), ("1e400", float("inf"))],
)
def test_real_numbers(text: str, value: float) -> None:
    assert read_number(text, float) == value


@given(st.text(max_size=8))
def test_a_number_has_ascii_characters_only(text: str) -> None:
    for kind in (int, float):
        number = read_number(text, kind)
        assert number is None or (text.isascii() and "_" not in text and not text.isspace())


def test_lists_may_have_spaces_after_the_commas(run: Run) -> None:
    done = run("plan", "--arch", "mlp-64-64-64-10", "--ranks", "4, 4", "--include", "fc2", "--json")
    assert done.code in (0, 2)
    assert "Invalid value" not in done.err


def test_every_number_of_a_run_is_among_them() -> None:
    """So that none is read by another way."""
    assert {"ranks", "ratio", "seed", "mean", "batch_size"} <= {
        option.name for option in NUMBERS
    } & RUN_OPTIONS.keys()
