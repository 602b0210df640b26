"""What torchrun says of a process is believed where torchrun has started it, and a meeting that never comes ends."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
from toys import as_torchrun

from ttcompress import processes
from ttcompress.errors import PlanError, TTCompressError
from ttcompress.processes import joined
from ttcompress.torchrun import Place, expected_rank, expected_size, own_place

WHOLE = as_torchrun(2, 4, 29500)


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_all_of_torchruns_variables_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, WHOLE)
    assert own_place() == Place(2, 4, 2, 4, "127.0.0.1:29500")
    assert (expected_rank(), expected_size()) == (2, 4)


@pytest.mark.parametrize("missing", WHOLE)
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_some_of_them_say_nothing(monkeypatch: pytest.MonkeyPatch, missing: str, how: str) -> None:
    _set(monkeypatch, {**WHOLE, missing: ""})
    if how == "unset":
        monkeypatch.delenv(missing)
    assert own_place() == Place()


@pytest.mark.parametrize(
    "alone", [{"RANK": "1"}, {"RANK": "x"}, {"WORLD_SIZE": "-3"}, {"LOCAL_WORLD_SIZE": "0"}]
)
def test_those_of_a_shell_say_nothing(monkeypatch: pytest.MonkeyPatch, alone: dict[str, str]) -> None:
    _set(monkeypatch, alone)
    assert own_place() == Place()


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "four"}, {"RANK": "4"}, {"RANK": "-1"}, {"RANK": "1_0"}, {"RANK": "٣"}, {"WORLD_SIZE": "2.0"},
        {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "4"}, {"LOCAL_RANK": "3"}, {"LOCAL_WORLD_SIZE": "5"},
        {"MASTER_PORT": "http"}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "70000"},
        {"WORLD_SIZE": "9" * 5000}, {"LOCAL_WORLD_SIZE": "0"},
    ],
)  # fmt: skip
def test_contradictions_are_one_line(monkeypatch: pytest.MonkeyPatch, change: dict[str, str]) -> None:
    _set(monkeypatch, {**WHOLE, **change})
    for ask in (own_place, expected_rank, expected_size):
        with pytest.raises(PlanError, match="the environment contradicts itself") as error:
            ask()
        assert "RANK=" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"RANK": "four"}, {"LOCAL_WORLD_SIZE": "5"}])
def test_the_command_ends_with_two(change: dict[str, str]) -> None:
    line = [sys.executable, "-m", "ttcompress", "plan", "--arch", "lenet5", "--ranks", "2"]
    environment = {**os.environ, **WHOLE, **change}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ttcompress: the environment contradicts itself")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("store", ["", "True"])
def test_a_meeting_that_never_comes_ends_with_its_address(
    monkeypatch: pytest.MonkeyPatch, rank: int, store: str
) -> None:
    """Whether nobody is at the address, or this process is there alone."""
    _set(monkeypatch, as_torchrun(rank, 2, 29777))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", store)
    monkeypatch.setattr(processes, "REACHED_WITHIN", timedelta(seconds=1))
    monkeypatch.setattr(processes, "ALL_THERE_WITHIN", timedelta(seconds=1))
    with (
        pytest.raises(TTCompressError, match=r"2 processes do not meet at 127\.0\.0\.1:29777") as error,
        joined(torch.device("cpu"), timedelta(days=30)),
    ):
        raise AssertionError("they met")
    assert error.value.__cause__ is not None
