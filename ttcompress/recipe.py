"""Recipes: the options of one run, from TOML and the command line, checked before anything is read or computed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ttcompress.errors import PlanError
from ttcompress.options import RULE_KINDS, RUN_OPTIONS, Kind, flag
from ttcompress.records.reading import read_text

Ranks = int | tuple[int, ...]
TARGETS = (("ranks", "conv_ranks"), ("eps",), ("ratio",), ("params",), ("macs_ratio",), ("latency_ratio",))
"""What a run can aim at; the options of one group go together."""
FORM = ("format", "rank_multiple", "any_time", "in_modes", "out_modes", "include", "exclude")
"""Options that say which layers get which form."""
LONGEST_SHOWN = 60
_RUN_KINDS = {name: option.kind for name, option in RUN_OPTIONS.items()}


@dataclass(frozen=True)
class LayerRule:
    """What one `[[layers]]` table says about the layers whose fqn its pattern matches; None and () mean not stated.

    Raises:
        PlanError: on construction, naming every value of the wrong kind.
    """

    match: str
    format: str | None = None
    in_modes: tuple[int, ...] = ()
    out_modes: tuple[int, ...] = ()
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        _raise_all(_problems(vars(self), RULE_KINDS))
        _freeze(self)


@dataclass(frozen=True)
class Recipe:
    """The options of one run, wherever they come from; None and () mean not stated.

    Raises:
        PlanError: on construction, naming every value out of range or of the wrong kind.
    """

    arch: str | None = None
    key: str | None = None
    ranks: Ranks | None = None
    conv_ranks: Ranks | None = None
    eps: float | None = None
    ratio: float | None = None
    params: int | None = None
    macs_ratio: float | None = None
    latency_ratio: float | None = None
    max_drop: float | None = None
    format: str | None = None
    rank_multiple: int | str | None = None
    any_time: bool | None = None
    exec: str | None = None
    tune: bool | None = None
    input_size: tuple[int, ...] = ()
    in_modes: tuple[int, ...] = ()
    out_modes: tuple[int, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None
    val: str | None = None
    calib: str | None = None
    calib_images: int | None = None
    effort: str | None = None
    outputs: tuple[str, ...] = ()
    train: str | None = None
    teacher: str | None = None
    epochs: int | None = None
    lr: float | None = None
    optimizer: str | None = None
    schedule: str | None = None
    warm_up: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    ema: float | None = None
    label_smoothing: float | None = None
    distill: float | None = None
    temperature: float | None = None
    augment: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    precision: str | None = None
    channels_last: bool | None = None
    compile: bool | None = None
    accumulate: int | None = None
    deterministic: bool | None = None
    from_scratch: bool | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    workers: int | None = None
    seed: int | None = None
    layers: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        _raise_all(_problems(vars(self), _RUN_KINDS, flag))
        _freeze(self)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe; keys are option names, with `_` or `-`.

        Raises:
            PlanError: the file is missing, unreadable or no TOML; or, in one line, all that is wrong with what it says.
        """
        options, problems = _known(_read_toml(path), [*RUN_OPTIONS, "layers"])
        rules, wrong = _layer_rules(options.pop("layers", []))
        _raise_all([*problems, *_problems(options, _RUN_KINDS, flag), *wrong], f"{path}: ")
        return cls(**options, layers=tuple(LayerRule(**rule) for rule in rules))

    @property
    def is_weights_only(self) -> bool:
        """Whether weights are compressed by their names alone, without a network (`--arch none`)."""
        return self.arch == "none"

    @property
    def has_target(self) -> bool:
        """Whether anything says how far to compress."""
        stated = any(_is_stated(getattr(self, name)) for group in TARGETS for name in group)
        return stated or bool(self.layers) or self.max_drop is not None

    @property
    def target(self) -> str:
        """What the run aims at: `ranks`, `eps`, `ratio`, `params`, `macs_ratio`, `latency_ratio` or `max_drop`.

        It is `ranks` also where every layer rule has its own. `max_drop` is the aim where it stands alone; beside
        another target it is a gate.

        Raises:
            PlanError: none is stated, or more than one.
        """
        got = [name for group in TARGETS for name in group if _is_stated(getattr(self, name))]
        stated = [group[0] for group in TARGETS if not set(group).isdisjoint(got)]
        if not stated and self.layers and all(_is_stated(rule.ranks) for rule in self.layers):
            return "ranks"
        if not stated and self.max_drop is not None:
            return "max_drop"
        if len(stated) != 1:
            choices = ", ".join("/".join(map(flag, group)) for group in (*TARGETS, ("max_drop",)))
            found = " and ".join(map(flag, got)) or "none"
            raise PlanError(f"state exactly one of {choices}, --plan: got {found}")
        return stated[0]

    def given(self, *names: str) -> list[str]:
        """Those of these options that are stated, as the command line spells them."""
        return [flag(name) for name in names if _is_stated(getattr(self, name))]

    def check_needs(self) -> Recipe:
        """See that every option that is stated has what it needs; return the recipe.

        Raises:
            PlanError: one lacks it.
        """
        for name, option in RUN_OPTIONS.items():
            needed = option.needs
            if needed and _is_stated(getattr(self, name)) and not _is_stated(getattr(self, needed)):
                raise PlanError(f"{flag(name)} needs {flag(needed)}")
        return self

    def override(self, **options: Any) -> Recipe:
        """A new recipe in which every stated option replaces its own; a target among them displaces the other targets.

        Raises:
            PlanError: a value out of range or of the wrong kind.
        """
        given = {name: value for name, value in options.items() if _is_stated(value)}
        displaced = [name for group in TARGETS if given.keys().isdisjoint(group) for name in group]
        if len(displaced) < sum(map(len, TARGETS)):
            given |= dict.fromkeys(displaced)
        return replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        """The options that are stated, as the file's metadata records them."""
        options = _stated(self)
        if self.layers:
            options["layers"] = [_stated(rule) for rule in self.layers]
        return options


def _read_toml(path: str | Path) -> dict[str, Any]:
    text = read_text(Path(path), PlanError)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{path}: not a TOML file: {error}") from error


def _layer_rules(tables: object) -> tuple[list[dict[str, Any]], list[str]]:
    """The arguments of the layer rules, and every problem with them."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return [], [f"layers must be tables that begin with [[layers]], not {_shown(tables)}"]
    rules, problems = [], []
    for number, table in enumerate(tables, 1):
        rule, wrong = _known(table, RULE_KINDS)
        rules.append({"match": "", **rule})
        wrong += _problems(rules[-1], RULE_KINDS)
        problems += [f"[[layers]] {number}: {problem}" for problem in wrong]
    return rules, problems


def _known(table: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a table under their canonical names, and a problem for every key that is none or comes twice."""
    known, problems = {}, []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in names:
            nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
            problems.append(f"unknown key {_shown(key)}, the nearest is {nearest!r}")
        elif name in known:
            problems.append(f"{name!r} is given twice")
        known[name] = value
    return {name: known[name] for name in names if name in known}, problems


def _problems(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], label: Callable[[str], str] = str
) -> list[str]:
    """What is wrong with the values that are stated, a line each."""
    stated = {name: value for name, value in values.items() if name in kinds and value not in (None, ())}
    return [
        f"{label(name)} must be {kinds[name].wanted}, not {_shown(value)}"
        for name, value in stated.items()
        if not kinds[name].holds(value)
    ]


def _shown(value: object) -> str:
    """A value in a one-line message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no whole number of thousands of digits.
        return "a huge number"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."


def _raise_all(problems: Sequence[str], where: str = "") -> None:
    if problems:
        raise PlanError(where + "; ".join(sorted(problems)))


def _freeze(record: Recipe | LayerRule) -> None:
    """Make lists tuples, and whole numbers floats where the option is one, so that equal options are equal."""
    kinds = RULE_KINDS if isinstance(record, LayerRule) else _RUN_KINDS

    for name, value in list(vars(record).items()):
        is_real = name in kinds and kinds[name].is_real
        frozen: object = value
        if isinstance(value, list | tuple):
            frozen = tuple(float(item) if is_real else item for item in value)
        elif is_real and value is not None:
            frozen = float(value)
        object.__setattr__(record, name, frozen)


def _is_stated(value: object) -> bool:
    return value is not None and value not in ((), [])


def _stated(record: Recipe | LayerRule) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(record).items()
        if _is_stated(value)
    }
