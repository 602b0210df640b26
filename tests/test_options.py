"""The one table of options against everything that is made from it or has to agree with it."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

import ttcompress
from scripts import option_table
from ttcompress.cli import commands
from ttcompress.options import GROUPS, OPTIONS, RUN_OPTIONS, TABLE, Option, options_of
from ttcompress.recipe import TARGETS, Recipe
from ttcompress.settings import Settings
from ttcompress.train.options import TrainingOptions

VERBS = sorted(commands.commands)


def test_a_recipe_has_a_field_for_every_option_of_a_run() -> None:
    assert {field.name for field in fields(Recipe)} == {*RUN_OPTIONS, "layers"}


def test_names_and_flags_are_unique_in_every_verb() -> None:
    assert len({option.name for option in TABLE}) == len(TABLE)
    for verb in VERBS:
        flags = [flag for option in options_of(verb) for flag in option.flags_of(verb)]
        assert len(set(flags)) == len(flags)


def test_every_group_verb_and_need_exists() -> None:
    for option in TABLE:
        assert option.group in GROUPS
        assert option.commands
        assert set(option.commands) <= set(VERBS)
        assert not option.needs or option.needs in OPTIONS


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_exactly_the_options_of_the_table(verb: str) -> None:
    command = commands.commands[verb]
    taken = {
        parameter.name: (*parameter.opts, *parameter.secondary_opts)
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name != "help"
    }
    assert taken == {option.name: option.flags_of(verb) for option in options_of(verb)}


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_whole_grouped_and_ends_with_examples(verb: str) -> None:
    done = CliRunner().invoke(commands, [verb, "--help"])
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    for option in options_of(verb):
        assert " ".join(option.help.split()) in text
        assert f"{option.group}:" in text
        if option.default_words and option.kind.form != "switch":
            assert f"[default: {option.default_words}]" in text
    assert text.partition("Examples:")[2].count("ttcompress ") >= 2
    summary = commands.commands[verb].get_short_help_str(200)
    assert not summary.endswith("...")


def test_every_default_is_a_value_that_the_option_may_have() -> None:
    values: dict[str, Any] = {}
    for option in TABLE:
        values[option.name] = option.default_after(values)
        if values[option.name] not in (None, ""):
            assert option.kind.holds(values[option.name]), option.name


@pytest.mark.parametrize("option", [each for each in TABLE if callable(each.default) or each.default is None])
def test_a_default_without_a_value_is_said_in_words_or_is_nothing(option: Option) -> None:
    assert not callable(option.default) or option.otherwise


def test_settings_hold_every_option_that_has_a_default() -> None:
    own = {field.name for field in fields(Settings)} - {"recipe"}
    with_default = {name for name, option in RUN_OPTIONS.items() if option.default is not None}
    assert own - {"input_size", "outputs", "augment", "channels_last"} == with_default
    assert own <= RUN_OPTIONS.keys()


def test_settings_take_what_is_stated_also_where_it_is_nothing() -> None:
    settings = Settings.of(Recipe(clip=0, seed=0, optimizer="adamw", epochs=2, distill=0.0, tune=False))
    assert (settings.clip, settings.distill, settings.tune) == (0.0, 0.0, False)
    assert settings.lr == 1e-3
    assert settings.warm_up == pytest.approx(2 / 3)
    assert Settings.of(Recipe(lr=0.5, warm_up=0)).lr == 0.5
    assert Settings.of(Recipe(epochs=30)).warm_up == 1.0


def test_training_options_agree_with_the_table() -> None:
    for field in fields(TrainingOptions):
        option = RUN_OPTIONS[field.name]
        fixed = field.default is not MISSING and option.default is not None and not callable(option.default)
        if fixed:
            assert field.default == option.default, field.name


@pytest.mark.parametrize(
    "function", [ttcompress.compress, ttcompress.plan, ttcompress.sweep], ids=["compress", "plan", "sweep"]
)
def test_python_keywords_are_the_options_that_mean_something_there(function: Any) -> None:
    in_memory_only = {"module", "metric", "example", "inplace", "progress", "layers", "unknown"}
    # Files and networks by name are of the command line; here a module and tensors are at hand.
    of_files = {"arch", "key", "limit", "mean", "seq_len", "std", "workers"}
    training = {option.name for option in TABLE if option.group == "Training"}
    wanted = RUN_OPTIONS.keys() - of_files - training
    named = set(inspect.signature(function).parameters) - in_memory_only
    targets = {name for group in TARGETS for name in group}
    expected = {
        ttcompress.compress: wanted | {"plan"},
        ttcompress.plan: wanted - {"data"},
        ttcompress.sweep: wanted - targets - {"val"} | {"ratios", "formats"},
    }[function]
    assert named == expected
    for name in named & RUN_OPTIONS.keys():
        assert inspect.signature(function).parameters[name].default in (None, ())


@pytest.mark.parametrize(
    ("unknown", "nearest"), [("ratios", "ratio"), ("includes", "include"), ("Ratio", "ratio")]
)
def test_an_unknown_keyword_names_the_nearest(unknown: str, nearest: str) -> None:
    import torch

    for function in (ttcompress.compress, ttcompress.plan):
        with pytest.raises(TypeError, match=f"{unknown!r}; did you mean {nearest!r}"):
            function(torch.nn.Linear(4, 4), **{unknown: 2})


def test_the_page_has_the_table() -> None:
    assert option_table.PAGE.read_text() == option_table.page(), "run python -m scripts.option_table"
