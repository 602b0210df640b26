"""The one table of options: what each is called, takes, means, and is where nobody states it.

The command line, the check of recipes and of Python keywords, `Recipe`, `Settings` and the table of docs/cli.md are
made from it or compared with it by a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from ttcompress.errors import PlanError
from ttcompress.records.layers import Execution
from ttcompress.records.plan import CORE_DTYPES
from ttcompress.tt.shapes import FORMATS

EXECUTIONS = tuple(execution.value for execution in Execution)
EFFORTS = ("fast", "default", "max")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "step")
AUGMENTATIONS = ("none", "shift", "flip")
RUNTIMES = ("torch", "compile", "onnx", "onnx-int8")
LAYER_FORMS = ("tt", "plain")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")

HOW_MUCH = "How much"
LAYERS = "Which layers, in which form"
CALIBRATION = "Calibration"
ACCURACY = "Accuracy"
TRAINING = "Training"
RUNNING = "Running"
FILES = "Input and output"
GROUPS = (HOW_MUCH, LAYERS, CALIBRATION, ACCURACY, TRAINING, RUNNING, FILES)
"""The parts of `--help`, in their order."""

COMPRESSING = ("compress", "plan", "finetune")
SHAPING = (*COMPRESSING, "sweep")
OPENING = (*SHAPING, "evaluate")
LEARNING = ("compress", "finetune")

LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-3}
LONGEST_WARM_UP = 1 / 3
"""Share of the training in which the learning rate rises, at most, where one epoch is not less."""

LARGEST = 2**63
"""No whole number reaches it: files and other programs hold them in 64 bits."""

# -------------------------------------------------------------------------------------------------- what a value can be


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) and abs(value) < LARGEST) or (isinstance(value, float) and isfinite(value))


def _is_count(value: Any) -> bool:
    return _is_int(value) and 0 < value < LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _each(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and bool(value) and all(map(holds, value))


@dataclass(frozen=True)
class Kind:
    """What the value of an option has to be: the words of the message, the test that they describe, how it is written.

    `form` is how the command line reads it: `int`, `float`, `text`, `path`, `choice`, `switch` (on or not stated),
    `on_off`, or, with commas between, `ints`, `floats`, `ranks`, `words`; `texts` are given by repeating the option.
    """

    wanted: str
    holds: Callable[[Any], bool]
    form: str
    choices: tuple[str, ...] = ()

    @property
    def is_real(self) -> bool:
        """Whether values are real numbers, so that whole ones are the same as others."""
        return self.form in ("float", "floats")


def one_of(choices: Sequence[str]) -> Kind:
    """One of a few names."""
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices, "choice", tuple(choices))


TEXT = Kind("a text", _is_text, "text")
PATH = Kind("a path", _is_text, "path")
PATTERNS = Kind("a list of patterns", _each(_is_text), "texts")
COUNT = Kind("a whole number above 0", _is_count, "int")
COUNTS = Kind("a list of whole numbers above 0", _each(_is_count), "ints")
FROM_ZERO = Kind("a whole number, 0 or above", lambda value: _is_int(value) and 0 <= value < LARGEST, "int")
SEED = Kind(
    "a whole number from 0 to below 2**63", lambda value: _is_int(value) and 0 <= value < LARGEST, "int"
)
RANKS = Kind(
    "a whole number above 0 or a list of them",
    lambda value: _is_count(value) or _each(_is_count)(value),
    "ranks",
)
MULTIPLE = Kind(
    "a whole number above 0 or auto", lambda value: _is_count(value) or value == "auto", "count_or_auto"
)
ABOVE_ONE = Kind("above 1", lambda value: _is_number(value) and value > 1, "float")
RATIOS = Kind("a list of numbers above 1", _each(ABOVE_ONE.holds), "floats")
ABOVE_ZERO = Kind("a number above 0", lambda value: _is_number(value) and value > 0, "float")
NOT_NEGATIVE = Kind("a number, 0 or above", lambda value: _is_number(value) and value >= 0, "float")
POINTS = Kind("a number of points, 0 or above", NOT_NEGATIVE.holds, "float")
PROPER = Kind("above 0 and below 1", lambda value: _is_number(value) and 0 < value < 1, "float")
SHARE = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1, "float")
WHOLE_SHARE = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, "float")
RATE = Kind("above 0 and at most 1000", lambda value: _is_number(value) and 0 < value <= 1000, "float")
NUMBERS = Kind("a list of numbers", _each(_is_number), "floats")
NUMBERS_ABOVE_ZERO = Kind("a list of numbers above 0", _each(ABOVE_ZERO.holds), "floats")
SWITCH = Kind("true or false", lambda value: isinstance(value, bool), "switch")
ON_OFF = Kind("true or false", SWITCH.holds, "on_off")

FORMAT_NAMES = Kind(
    f"a list of {', '.join(('auto', *FORMATS))}",
    _each(lambda value: value in ("auto", *FORMATS)),
    "words",
    ("auto", *FORMATS),
)

# ------------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Option:
    """One option: `ratio` in Python and in recipes is `--ratio` on the command line.

    Args:
        commands: the verbs that take it.
        default: what it is where nobody states it. A function finds it from the options before it in the table; None
            stands for what `otherwise` says in words.
        metavar: what stands for the value in help texts.
        of_run: whether it is part of what is to be done (and so of recipes), or of one call, as `--force` is.
        flags: how it is spelled where that is not `--` and its name; `flags_in` by verb.
        needs: an option without which it means nothing.
    """

    name: str
    kind: Kind
    group: str
    commands: tuple[str, ...]
    help: str
    default: Any = None
    otherwise: str = ""
    metavar: str = ""
    of_run: bool = True
    flags: tuple[str, ...] = ()
    flags_in: Mapping[str, str] = field(default_factory=dict)
    needs: str = ""

    def flags_of(self, command: str) -> tuple[str, ...]:
        """How one verb spells it, all ways."""
        if command in self.flags_in:
            return (self.flags_in[command],)
        return self.flags or (flag(self.name),)

    @property
    def default_words(self) -> str:
        """What it is where nobody states it, as help texts say it."""
        if self.otherwise or self.default is None:
            return self.otherwise
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def default_after(self, values: Mapping[str, Any]) -> Any:
        """What it is where nobody states it, given the options that stand before it in the table."""
        return self.default(values) if callable(self.default) else self.default


def flag(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")


def _warm_up(values: Mapping[str, Any]) -> float:
    return min(1.0, float(values["epochs"]) * LONGEST_WARM_UP)


def _learning_rate(values: Mapping[str, Any]) -> float:
    return LEARNING_RATES[values["optimizer"]]


_SINGLE_LAYER = " For the one layer that is selected, in the format matrix."

TABLE: tuple[Option, ...] = (
    # How much: exactly one of these.
    Option(
        "ranks", RANKS, HOW_MUCH, COMPRESSING,
        "TT-ranks of Linear layers: one cap for all cuts, or the inner ranks of one layer, A,B,.. Convolutions "
        "stay dense unless --conv-ranks is given too.",
        metavar="R",
    ),
    Option("conv_ranks", RANKS, HOW_MUCH, COMPRESSING, "The same for convolutions of all kinds.", metavar="R"),
    Option(
        "eps", PROPER, HOW_MUCH, COMPRESSING,
        "Each weight to a relative Frobenius error of at most E, with the fewest parameters. The rounding "
        "of --dtype to a narrower type comes on top (int8: about 0.01), and the report has the sum.",
        metavar="E",
    ),
    Option(
        "ratio", ABOVE_ONE, HOW_MUCH, COMPRESSING,
        "Parameters before over after, of the whole network: at least X, at most 2 % more, with the least "
        "total squared error.",
        metavar="X",
    ),
    Option("params", COUNT, HOW_MUCH, COMPRESSING, "The same budget as a number of parameters.", metavar="N"),
    Option(
        "ratios", RATIOS, HOW_MUCH, ("sweep",), "The same for every point of a sweep, such as 1.5,2,3,4,6.", metavar="X,Y,..",
        of_run=False,
    ),
    Option(
        "macs_ratio", ABOVE_ONE, HOW_MUCH, COMPRESSING,
        "The same over the multiply-adds of one input, those outside the compressed layers included; "
        "layers are then run by their cores, as counted.",
        metavar="X",
    ),
    Option(
        "latency_ratio", ABOVE_ONE, HOW_MUCH, COMPRESSING,
        "The same over the time of one input, measured on --device against the dense network. Time is not "
        "the same twice, so neither are such files.",
        metavar="X",
    ),
    Option(
        "max_drop", POINTS, HOW_MUCH, SHAPING,
        "Alone: the smallest network whose accuracy on --val falls by no more than P points, found by "
        "bisection. Beside another target a gate: the file is written, and the exit code is 1 where "
        "accuracy on --data falls by more.",
        metavar="P",
    ),
    Option(
        "plan", PATH, HOW_MUCH, COMPRESSING, "Apply a plan written by `plan -o`, edited or not.",
        metavar="FILE",
        of_run=False,
    ),
    Option(
        "recipe", PATH, HOW_MUCH, SHAPING, "A TOML file of these options; what is given here wins.",
        metavar="FILE", of_run=False,
    ),
    # Which layers.
    Option(
        "include", PATTERNS, LAYERS, SHAPING,
        "Layers by name: a glob (`*` crosses dots) or re:REGEX; repeatable. It replaces the default; +P adds "
        "to it.",
        otherwise="all but the first convolution and the last Linear", metavar="P",
    ),
    Option("exclude", PATTERNS, LAYERS, SHAPING, "Layers to leave dense, subtracted last.", metavar="P"),
    Option(
        "format", one_of(("auto", *FORMATS)), LAYERS, SHAPING,
        "The TT format; auto compares all of them (with ranks by hand it is matrix for Linear and chain "
        "for convolutions).",
        default="auto",
    ),
    Option(
        "rank_multiple", MULTIPLE, LAYERS, SHAPING,
        "TT-ranks that --eps and budgets choose are multiples of N, or all that a cut carries; below N powers "
        "of two. auto: 8 where both sides of a layer have 128 and more and the budget can be met so, else 1.",
        default="auto", metavar="N",
    ),
    Option(
        "any_time", SWITCH, LAYERS, SHAPING,
        "Under --ratio, --params and --eps: choose forms by error alone. Without it one that runs no faster "
        "than the dense layer is chosen only where the plan would lose over 3 % otherwise, and a note says so.",
        default=False,
    ),
    Option(
        "formats", FORMAT_NAMES, LAYERS, ("sweep",), "Every ratio in each of these formats, instead of --format.",
        metavar="A,B,..", of_run=False,
    ),
    Option("in_modes", COUNTS, LAYERS, SHAPING, "Factors of the inputs." + _SINGLE_LAYER, metavar="A,B,.."),
    Option("out_modes", COUNTS, LAYERS, SHAPING, "Factors of the outputs." + _SINGLE_LAYER, metavar="A,B,.."),
    Option(
        "dtype", one_of(CORE_DTYPES), LAYERS, SHAPING,
        "Storage type of the cores; int8 with a float32 scale for each slice of a core's last axis. "
        "Accuracy and errors are measured on what is stored.",
        otherwise="that of the weight",
    ),
    Option(
        "exec", one_of(EXECUTIONS), LAYERS, SHAPING,
        "How layers run, where they can: contract (the input with the cores), chain (of convolutions), "
        "dense (the weight rebuilt), auto (whichever costs less by a model, at every call). Recorded in "
        "the file.",
        default="auto",
    ),
    Option(
        "tune", SWITCH, LAYERS, (*SHAPING, "expand", "bench"),
        "Decide that by measurement on --device: what is faster with one input and with 32 alike, else "
        "auto. For stock layers (expand --factors, bench): what is faster with as many inputs as a batch has.",
        default=False,
    ),
    Option(
        "input_size", COUNTS, LAYERS, (*SHAPING, "expand", "export", "bench"),
        "Of one input, such as 3,224,224, or tokens of a text, where something runs: for export, bench, --macs-ratio, "
        "--latency-ratio, --tune and --factors.",
        otherwise="what the file records, or the architecture is known for", metavar="A,B,..",
    ),
    # Calibration.
    Option(
        "calib", TEXT, CALIBRATION, SHAPING,
        "Unlabelled images (split train by default): plan and decompose on output error instead of weight "
        "error.",
        metavar="DATA",
    ),
    Option(
        "calib_images", COUNT, CALIBRATION, SHAPING,
        "How many of them, drawn by the seed; one in eight is held out to decide.", default=1024,
        metavar="N",
        needs="calib",
    ),
    Option(
        "effort", one_of(EFFORTS), CALIBRATION, SHAPING,
        "fast: statistics and least-squares sweeps; default: and 150 steps of joint refinement; max: 400 "
        "steps and two sweeps.",
        default="default", needs="calib",
    ),
    # Accuracy.
    Option(
        "data", TEXT, ACCURACY, OPENING,
        "Labelled images to measure accuracy on: KIND:PATH[@train|@test], or digits.", metavar="DATA",
    ),
    Option(
        "val", TEXT, ACCURACY, COMPRESSING,
        "Labelled images that --max-drop searches by, or by which a training chooses the best epoch "
        "(split train by default, so name images of their own).",
        otherwise="in a training: held out of --train", metavar="DATA",
    ),
    Option(
        "mean", NUMBERS, ACCURACY, OPENING, "Mean of each channel, for pixels in [0, 1].",
        otherwise="what the architecture was trained with, else of the data", metavar="M",
    ),
    Option(
        "std", NUMBERS_ABOVE_ZERO, ACCURACY, OPENING, "Standard deviation of each channel.",
        otherwise="likewise",
        metavar="S",
    ),
    Option(
        "limit", COUNT, ACCURACY, ("compress", "finetune", "sweep", "evaluate"), "Only the first N images of --data.",
        metavar="N", needs="data",
    ),
    # Training.
    Option(
        "train", TEXT, TRAINING, LEARNING,
        "Training images (split train by default); without labels a teacher is needed.", metavar="DATA",
    ),
    Option(
        "epochs", COUNT, TRAINING, LEARNING, "Passes over the training images.", default=30, metavar="N",
        flags_in={"compress": "--finetune"},
    ),
    Option(
        "teacher", TEXT, TRAINING, LEARNING, "The network to learn from, dense or compressed.",
        otherwise="the dense one, where its checkpoint lies beside MODEL", metavar="FILE",
    ),
    Option(
        "optimizer", one_of(OPTIMIZERS), TRAINING, LEARNING, "sgd has Nesterov momentum 0.9.",
        default="sgd",
    ),
    Option(
        "lr", RATE, TRAINING, LEARNING, "Highest learning rate.", default=_learning_rate,
        otherwise="0.01 for sgd, 0.001 for adamw", metavar="X",
    ),
    Option(
        "schedule", one_of(SCHEDULES), TRAINING, LEARNING,
        "Of the learning rate; step is a tenth at 30, 60 and 90 % of the training.", default="cosine",
    ),
    Option(
        "warm_up", NOT_NEGATIVE, TRAINING, LEARNING, "Epochs in which the learning rate rises.", default=_warm_up,
        otherwise="1, at most a third of all", metavar="E",
    ),
    Option(
        "weight_decay", NOT_NEGATIVE, TRAINING, LEARNING, "Of dense weights and of the weights that "
        "TT-cores stand for.",
        default=1e-4, metavar="X",
    ),
    Option(
        "clip", NOT_NEGATIVE, TRAINING, LEARNING, "Largest norm of a gradient, 0 for any.", default=5.0,
        metavar="X",
    ),
    Option(
        "ema", SHARE, TRAINING, LEARNING, "Decay of a moving average of the weights, which then is the "
        "result; 0: none.",
        default=0.0, metavar="D",
    ),
    Option("label_smoothing", SHARE, TRAINING, LEARNING, "Share spread over all classes.", default=0.0, metavar="X"),
    Option(
        "distill", WHOLE_SHARE, TRAINING, LEARNING, "Share of the teacher in the loss, 0 for none.", default=0.9,
        metavar="S",
    ),
    Option("temperature", ABOVE_ZERO, TRAINING, LEARNING, "Of the teacher's answers.", default=4.0, metavar="T"),
    Option(
        "augment", one_of(AUGMENTATIONS), TRAINING, LEARNING, "flip shifts, too.",
        otherwise="flip; digits and grey images only shift",
    ),
    Option(
        "mixup", NOT_NEGATIVE, TRAINING, LEARNING, "Mix images, shares drawn from Beta(A, A); 0: not.", default=0.0,
        metavar="A",
    ),
    Option(
        "cutmix", NOT_NEGATIVE, TRAINING, LEARNING, "The same with windows of images.", default=0.0,
        metavar="A",
    ),
    Option(
        "precision", one_of(PRECISIONS), TRAINING, LEARNING,
        "Of autocast; cores and optimizer stay float32. auto: bfloat16 where steps timed at the start are at "
        "least a tenth faster so, else float32, which trainings of under half a minute keep.",
        default="auto",
    ),
    Option(
        "channels_last", ON_OFF, TRAINING, LEARNING, "Memory format of images and weights.",
        otherwise="on CPUs and in half precision, where it is faster",
        flags=("--channels-last", "--no-channels-last"),
    ),
    Option("compile", SWITCH, TRAINING, LEARNING, "Train the network through torch.compile.", default=False),
    Option("accumulate", COUNT, TRAINING, LEARNING, "Parts in which a batch is computed.", default=1, metavar="N"),
    Option(
        "deterministic", SWITCH, TRAINING, LEARNING, "The same result each time on a GPU too, slower.", default=False,
    ),
    Option(
        "from_scratch", SWITCH, TRAINING, ("finetune",),
        "Train --arch from random weights, without MODEL, in TT form where ranks or a plan say so; a list "
        "of TT-ranks is then taken as it is, also beyond what a weight of that shape can have.",
        default=False, needs="arch",
    ),
    Option(
        "resume", SWITCH, TRAINING, LEARNING, "Go on from OUT.training, where the same command was "
        "stopped.",
        default=False, of_run=False,
    ),
    # Running.
    Option("device", TEXT, RUNNING, (*OPENING, "bench"), "auto, cpu, cuda or cuda:N.", default="auto", metavar="D"),
    Option(
        "batch_size", COUNT, RUNNING, (*OPENING, "expand"),
        "Images a batch. For expand --factors: how many a call is going to have.",
        default=128, otherwise="128; 1 for expand", metavar="N",
    ),
    Option(
        "workers", FROM_ZERO, RUNNING, OPENING, "Processes that read image folders.", default=0,
        metavar="N",
    ),
    Option(
        "seed", SEED, RUNNING, SHAPING,
        "Recorded in the file; seeds torch and draws the calibration images.", default=0, metavar="N",
    ),
    Option(
        "batch_sizes", COUNTS, RUNNING, ("bench",), "Images a batch.", default=(1, 32), otherwise="1,32",
        metavar="A,B,..", of_run=False,
    ),
    Option(
        "training", SWITCH, RUNNING, ("bench",), "Training steps (forward and backward) instead of "
        "inference.",
        default=False, of_run=False,
    ),
    Option(
        "runtime", one_of(RUNTIMES), RUNNING, ("bench",),
        "Where both networks run: torch as it is, through torch.compile, or in onnxruntime, exported as export does it; "
        "onnx-int8 after onnxruntime's dynamic quantisation.",
        default="torch", of_run=False,
    ),
    Option(
        "layers", one_of(LAYER_FORMS), RUNNING, ("export", "bench"),
        "tt: as they are loaded; plain: in stock layers, each in the form that is cheaper (expand --factors).",
        otherwise="tt for export and --training, else plain", of_run=False,
    ),
    Option(
        "threads", COUNT, RUNNING, ("bench",), "Processor threads of the runtime.",
        otherwise="as many as torch takes", metavar="N", of_run=False,
    ),
    Option(
        "fail_if_slower", SWITCH, RUNNING, ("bench",),
        "Exit with 1 if the compressed network takes over 5 % longer at any batch size.", default=False, of_run=False,
    ),
    # Input and output.
    Option(
        "arch", TEXT, FILES, (*OPENING, "expand", "export", "bench"),
        "NAME, torchvision:NAME, timm:NAME, zoo:NAME, mlp-784-300-10 (widths), path/to/net.py:factory, "
        "package.module:factory; or none: "
        "matrices by name.",
        otherwise="what config.json says, else found by keys and shapes", metavar="REF",
    ),
    Option(
        "key", TEXT, FILES, (*OPENING, "export"), "Which state dict of a checkpoint that holds several.",
        default="",
        metavar="NAME",
    ),
    Option(
        "output", PATH, FILES, (*SHAPING, "expand"), "Where to write; of a sweep, a folder.", metavar="OUT", of_run=False,
        flags=("-o", "--output"),
    ),
    Option(
        "factors", SWITCH, FILES, ("expand",),
        "Keep the cores where they are the cheaper way, as rows of stock layers; OUT is a .safetensors file that "
        "load reads.",
        default=False, of_run=False,
    ),
    Option("onnx", PATH, FILES, ("export",), "Where to write.", metavar="OUT", of_run=False),
    Option(
        "html", PATH, FILES, ("compress", "finetune", "sweep", "evaluate", "report", "bench"),
        "Write what is known as one page for a browser: curve, layers, samples, training, time.", metavar="OUT",
        of_run=False,
    ),
    Option(
        "force", SWITCH, FILES, (*SHAPING, "expand", "export", "evaluate", "report", "bench"),
        "Replace an existing output.", default=False, of_run=False,
    ),
    Option(
        "dry_run", SWITCH, FILES, ("compress",), "Print the plan and write nothing.", default=False, of_run=False,
    ),
    Option(
        "save", SWITCH, FILES, ("bench",), "Write the figures into the report of FILE.", default=False, of_run=False,
    ),
    Option("csv", SWITCH, FILES, ("sweep",), "Print the table as CSV.", default=False, of_run=False),
    Option(
        "json", SWITCH, FILES, (*OPENING, "report", "export", "bench"),
        "Print one JSON object instead of tables (report of several files: a list).", default=False, of_run=False,
    ),
)  # fmt: skip
OPTIONS: Mapping[str, Option] = {option.name: option for option in TABLE}
RUN_OPTIONS: Mapping[str, Option] = {name: option for name, option in OPTIONS.items() if option.of_run}
"""The options of recipes, of Python keywords and of what a file records."""
RULE_KINDS: Mapping[str, Kind] = {
    "match": Kind("a pattern", _is_text, "text"),
    **{name: OPTIONS[name].kind for name in ("format", "in_modes", "out_modes", "ranks")},
}
"""What a `[[layers]]` table of a recipe may say."""


def options_of(command: str) -> list[Option]:
    """The options that a verb takes, in the order of the table."""
    return [option for option in TABLE if command in option.commands]


def check_values(**given: Any) -> None:
    """See that options which are no part of a recipe have values of their kinds.

    Raises:
        PlanError: one has not.
    """
    for name, value in given.items():
        kind = OPTIONS[name].kind
        if value is not None and not kind.holds(value):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise PlanError(f"{flag(name)} must be {kind.wanted}, not {shown}")
