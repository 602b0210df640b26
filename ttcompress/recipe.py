"""Recipes: the options of one run, from TOML and the command line, checked before anything is read or computed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from ttcompress.errors import PlanError
from ttcompress.records.layers import Execution
from ttcompress.records.plan import CORE_DTYPES
from ttcompress.tt.shapes import FORMATS

Ranks = int | tuple[int, ...]
EXECUTIONS = tuple(execution.value for execution in Execution)
EFFORTS = ("fast", "default", "max")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step")
AUGMENTATIONS = ("none", "shift", "flip")
PRECISIONS = ("float32", "bfloat16", "float16")
TARGETS = (("ranks", "conv_ranks"), ("eps",), ("ratio",), ("params",), ("macs_ratio",), ("latency_ratio",))
"""What a run can aim at; the options of one group go together."""


class _Check(NamedTuple):
    """What a value has to be: the words of the message, and the test that they describe."""

    wanted: str
    holds: Callable[[Any], bool]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and isfinite(value))


def _is_count(value: Any) -> bool:
    return _is_int(value) and value > 0


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(holds, value))


def _one_of(names: Sequence[str]) -> _Check:
    return _Check(f"one of {', '.join(names)}", lambda value: value in names)


_TEXT = _Check("a text", _is_text)
_PATTERNS = _Check("a list of patterns", _each(_is_text))
_COUNT = _Check("a whole number above 0", _is_count)
_COUNTS = _Check("a list of whole numbers above 0", _each(_is_count))
_FROM_ZERO = _Check("a whole number, 0 or above", lambda value: _is_int(value) and value >= 0)
_RANKS = _Check("a whole number above 0 or a list of them", lambda value: _is_count(value) or _each(_is_count)(value))
_FORMAT = _one_of(("auto", *FORMATS))
_ABOVE_ONE = _Check("above 1", lambda value: _is_number(value) and value > 1)
_ABOVE_ZERO = _Check("a number above 0", lambda value: _is_number(value) and value > 0)
_FROM_ZERO_ON = _Check("a number, 0 or above", lambda value: _is_number(value) and value >= 0)
_SHARE = _Check("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_SWITCH = _Check("true or false", lambda value: isinstance(value, bool))

_SHARED = {"format": _FORMAT, "in_modes": _COUNTS, "out_modes": _COUNTS, "ranks": _RANKS}
_LAYER_CHECKS = {"match": _Check("a pattern", _is_text), **_SHARED}
_CHECKS = {
    **_SHARED,
    "arch": _TEXT,
    "key": _TEXT,
    "conv_ranks": _RANKS,
    "eps": _Check("above 0 and below 1", lambda value: _is_number(value) and 0 < value < 1),
    "ratio": _ABOVE_ONE,
    "params": _COUNT,
    "macs_ratio": _ABOVE_ONE,
    "latency_ratio": _ABOVE_ONE,
    "exec": _one_of(EXECUTIONS),
    "tune": _SWITCH,
    "input_size": _COUNTS,
    "include": _PATTERNS,
    "exclude": _PATTERNS,
    "data": _TEXT,
    "mean": _Check("a list of numbers", _each(_is_number)),
    "std": _Check("a list of numbers above 0", _each(lambda value: _is_number(value) and value > 0)),
    "dtype": _one_of(CORE_DTYPES),
    "device": _TEXT,
    "batch_size": _COUNT,
    "workers": _FROM_ZERO,
    "seed": _Check("a whole number from 0 to below 2**63", lambda value: _is_int(value) and 0 <= value < 2**63),
    "max_drop": _Check("a number of points, 0 or above", lambda value: _is_number(value) and value >= 0),
    "val": _TEXT,
    "calib": _TEXT,
    "calib_images": _COUNT,
    "effort": _one_of(EFFORTS),
    "train": _TEXT,
    "teacher": _TEXT,
    "epochs": _COUNT,
    "lr": _Check("above 0 and at most 1000", lambda value: _is_number(value) and 0 < value <= 1000),
    "optimizer": _one_of(OPTIMIZERS),
    "schedule": _one_of(SCHEDULES),
    "warm_up": _FROM_ZERO_ON,
    "weight_decay": _FROM_ZERO_ON,
    "clip": _FROM_ZERO_ON,
    "ema": _SHARE,
    "label_smoothing": _SHARE,
    "distill": _Check("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "temperature": _ABOVE_ZERO,
    "augment": _one_of(AUGMENTATIONS),
    "mixup": _FROM_ZERO_ON,
    "cutmix": _FROM_ZERO_ON,
    "precision": _one_of(PRECISIONS),
    "channels_last": _SWITCH,
    "compile": _SWITCH,
    "accumulate": _COUNT,
    "deterministic": _SWITCH,
    "from_scratch": _SWITCH,
}
FORM = ("format", "in_modes", "out_modes", "include", "exclude")
"""Options that say which layers get which form."""
_FLOATS = (
    "eps", "ratio", "macs_ratio", "latency_ratio", "mean", "std", "max_drop",
    "lr", "warm_up", "weight_decay", "clip", "ema", "label_smoothing",
    "distill", "temperature", "mixup", "cutmix",
)  # fmt: skip


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
        _raise_all(_problems(vars(self), _LAYER_CHECKS))
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
    exec: str | None = None
    tune: bool | None = None
    input_size: tuple[int, ...] = ()
    in_modes: tuple[int, ...] = ()
    out_modes: tuple[int, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    data: str | None = None
    val: str | None = None
    calib: str | None = None
    calib_images: int | None = None
    effort: str | None = None
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
    workers: int | None = None
    seed: int | None = None
    layers: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        _raise_all(_problems(vars(self), _CHECKS, _flag))
        _freeze(self)

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """Read a recipe; keys are option names, with `_` or `-`.

        Raises:
            PlanError: the file is missing, unreadable or no TOML; or, in one line, all that is wrong with what it says.
        """
        options, problems = _known(_read_toml(path), [*_CHECKS, "layers"])
        rules, wrong = _layer_rules(options.pop("layers", []))
        _raise_all([*problems, *_problems(options, _CHECKS, _flag), *wrong], f"{path}: ")
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
            choices = ", ".join("/".join(map(_flag, group)) for group in (*TARGETS, ("max_drop",)))
            found = " and ".join(map(_flag, got)) or "none"
            raise PlanError(f"state exactly one of {choices}, --plan: got {found}")
        return stated[0]

    def given(self, *names: str) -> list[str]:
        """Those of these options that are stated, as the command line spells them."""
        return [_flag(name) for name in names if _is_stated(getattr(self, name))]

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
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path}: not a TOML file: {error}") from error


def _layer_rules(tables: object) -> tuple[list[dict[str, Any]], list[str]]:
    """The arguments of the layer rules, and every problem with them."""
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        return [], [f"layers must be tables that begin with [[layers]], not {tables!r}"]
    rules, problems = [], []
    for number, table in enumerate(tables, 1):
        rule, wrong = _known(table, _LAYER_CHECKS)
        rules.append({"match": "", **rule})
        wrong += _problems(rules[-1], _LAYER_CHECKS)
        problems += [f"[[layers]] {number}: {problem}" for problem in wrong]
    return rules, problems


def _known(table: Mapping[str, Any], names: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a table under their canonical names, and a problem for every key that is none or comes twice."""
    known, problems = {}, []
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in names:
            nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
            problems.append(f"unknown key {key!r}, the nearest is {nearest!r}")
        elif name in known:
            problems.append(f"{name!r} is given twice")
        known[name] = value
    return {name: known[name] for name in names if name in known}, problems


def _problems(values: Mapping[str, Any], checks: Mapping[str, _Check], label: Callable[[str], str] = str) -> list[str]:
    return [
        f"{label(name)} must be {check.wanted}, not {values[name]!r}"
        for name, check in checks.items()
        if name in values and values[name] not in (None, ()) and not check.holds(values[name])
    ]


def _raise_all(problems: Sequence[str], where: str = "") -> None:
    if problems:
        raise PlanError(where + "; ".join(sorted(problems)))


def _freeze(record: Recipe | LayerRule) -> None:
    """Make lists tuples and whole numbers floats where the option is a float, so that equal options are equal."""
    for name, value in list(vars(record).items()):
        if isinstance(value, list | tuple):
            frozen: object = tuple(float(item) if name in _FLOATS else item for item in value)
        else:
            frozen = float(value) if name in _FLOATS and value is not None else value
        object.__setattr__(record, name, frozen)


def _is_stated(value: object) -> bool:
    return value is not None and value not in ((), [])


def _stated(record: Recipe | LayerRule) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(record).items()
        if _is_stated(value)
    }


def _flag(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")
