"""CIFAR-10, Garipov et al. 2016, table 1: `conv` with its convolutions and `conv-fc` with all layers in TT form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from pathlib import Path
from types import MappingProxyType

from scripts.papers.rows import (
    Group,
    Row,
    Runs,
    Where,
    cells,
    header,
    minutes,
    paragraph,
    trained_for,
    variance,
    wins,
)
from scripts.papers.training import (
    dense,
    dense_measured,
    from_pretrained,
    from_scratch,
    measured,
    recipe_of,
    trained,
)
from ttcompress.commands.compress import compress_file
from ttcompress.commands.expand import expand_file
from ttcompress.recipe import Recipe
from ttcompress.records.report import Report

# Top-1 accuracy of the paper by row; compression is part of the name.
CONV_PAPER = {
    "conv-tt-2.02x": 89.9,
    "conv-tt-2.53x": 89.2,
    "conv-tt-3.23x": 89.3,
    "conv-tt-4.02x": 88.7,
    "conv-naive-2.02x": 88.3,
    "conv-naive-2.90x": 87.6,
}
CONV_FC_PAPER = {
    "conv-fc-tt-fc-10.72x": 90.3,
    "conv-fc-tt-fc-19.38x": 89.8,
    "conv-fc-tt-fc-21.01x": 89.8,
    "conv-fc-tt-conv-tt-fc-9.69x": 90.1,
    "conv-fc-tt-conv-tt-fc-41.65x": 89.7,
    "conv-fc-tt-conv-tt-fc-82.87x": 89.4,
}
RELEASED = "conv-tt-3.23x"
"""Is trained from scratch with the released TT-ranks, which are beyond what a window of 9 can carry."""
SCHEDULES = {
    "conv": """From scratch as in the paper: SGD 0.1, a tenth of it after 30, 60 and 90 % of the epochs, batch 100.
        TT-ranks are feasible ones at the compression of the paper, but for 3.23x from scratch, which has the released
        ones, so that its compression differs a little.""",
    "conv-fc": """From scratch as in the paper: SGD 0.1 (0.03 where convolutions are in TT form too), a tenth of it
        after 30, 60 and 90 % of the epochs, batch 100; where convolutions are in TT form too, half of the epochs go to
        the network with dense FC layers, half to the whole. TT-ranks are feasible ones at the compression of the
        paper.""",
}
"""How networks are trained from scratch, as the page says it."""
LR = 0.03
"""After TT-SVD, without a teacher: one that has had half of a training itself holds the network at its own accuracy."""
BASELINES = {"conv": 90.7, "conv-fc": 90.5}


def runs(network: str, paper: dict[str, float], where: Where) -> Runs:
    yield "baseline", partial(baseline, where, network)
    for name in paper:
        yield f"{name}, from pretrained", partial(pretrained_row, where, network, name)
        yield f"{name}, from scratch", partial(scratch_row, where, name)


def baseline(where: Where, network: str) -> Row:
    file = trained_dense(where, network, where.epochs)
    found = dense_measured(file, where.need("cifar10"))
    return {"recipe": f"cifar10/{network}", **found, "seeds": 1, "epochs": where.epochs}


def trained_dense(where: Where, network: str, epochs: int) -> Path:
    output = where.work / f"{network}-dense-{epochs}.pt"
    return dense(output, recipe_of(f"cifar10/{network}"), where.need("cifar10"), epochs)


def pretrained_row(where: Where, network: str, name: str) -> Row:
    """Half of the epochs dense, half in TT form."""
    half = where.epochs // 2
    source, recipe = trained_dense(where, network, half), recipe_of(f"cifar10/{name}")
    report, errors = from_pretrained(
        source,
        recipe,
        where.need("cifar10"),
        where.epochs - half,
        where.work / f"{name}-{where.epochs}",
        LR,
        distill=0.0,
    )
    ours = {**errors, "compression": report.plan.compression}
    return measured(f"cifar10/{name}", report, ours, where.epochs)


def scratch_row(where: Where, name: str) -> Row:
    """In one go, or as the paper trains both kinds of layers: the convolutions first, with dense FC layers."""
    file = f"cifar10/{name}-released" if name == RELEASED else f"cifar10/{name}"
    recipe, data = recipe_of(file), where.need("cifar10")
    output = where.work / f"{name}-scratch-{where.epochs}.safetensors"
    if "tt-conv-tt-fc" in name:
        report = in_two_stages(output, recipe, data, where.epochs)
    else:
        report = from_scratch(output, replace(recipe, epochs=where.epochs), data)
    return measured(file, report, {"compression": report.plan.compression}, where.epochs)


def in_two_stages(output: Path, recipe: Recipe, data: str, epochs: int) -> Report:
    """Both stages with the recipe's own options, half of the epochs each.

    TT-SVD of an expanded convolution at its own TT-ranks gives its cores again, so that stage two goes on from them.
    """
    half = epochs // 2
    convs = tuple(rule for rule in recipe.layers if rule.match.startswith("conv"))
    first, whole = output.with_suffix(".one.safetensors"), output.with_suffix(".two.safetensors")
    if not whole.exists():
        from_scratch(first, replace(recipe, layers=convs, epochs=half), data)
        expand_file(first, first.with_suffix(".pt"), force=True)
        compress_file(first.with_suffix(".pt"), whole, Recipe(arch=recipe.arch, layers=recipe.layers, seed=0))
    stage = replace(recipe, arch=None, layers=(), epochs=epochs - half, distill=0.0, train=data, data=data)
    return trained(output, stage, whole)


# ----------------------------------------------------------------------------------------------------------------- page


def section(network: str, paper: dict[str, float], rows: Sequence[Row]) -> Iterator[str]:
    found = {row["row"]: row for row in rows}
    bases = {row["epochs"]: row for row in rows if row["row"] == "baseline"}
    yield from paragraph(
        f"""
        Top-1 accuracy on the 10,000 test images, one seed; in brackets the change against the baseline of the same
        number of epochs{noise(bases.values())}. The paper trains 100 epochs of all images with crop, flip and contrast; here as
        many as the row says, of 45,000 images with crop and flip, the other 5,000 choose the epoch.
        {SCHEDULES[network]}
        From pretrained: the first half of the epochs (rounded down) dense as the baseline (*dense half*), then TT-SVD,
        calibration without labels, and the other half with labels (SGD {LR}, cosine, batch 128), so that its rate
        falls twice where that of the baseline falls once. The dense half is no teacher here: after few epochs it would
        hold the network at its own accuracy.
        """
    )
    yield from header(
        "row",
        "paper",
        "compression",
        "epochs",
        "from scratch",
        "dense half",
        "TT-SVD",
        "calibrated",
        "from pretrained",
        "minutes",
    )
    for base in bases.values() or [None]:
        epochs = trained_for(base) if base else "-"
        own = accuracy(base, "error")
        yield cells("baseline", BASELINES[network], "1", epochs, own, "", "", "", "", minutes(base))
    for name, top1 in paper.items():
        scratch, pretrained = (found.get(f"{name}, from {start}") for start in ("scratch", "pretrained"))
        both = [row for row in (scratch, pretrained) if row]
        yield cells(
            name,
            f"{top1} ({top1 - BASELINES[network]:+.1f})",
            " / ".join(dict.fromkeys(f"{row['ours']['compression']:.2f}x" for row in both)) or "-",
            " / ".join(dict.fromkeys(map(trained_for, both))) or "-",
            accuracy(scratch, "error", bases),
            accuracy(pretrained, "dense_error"),
            accuracy(pretrained, "decomposed"),
            accuracy(pretrained, "calibrated"),
            accuracy(pretrained, "error", bases),
            minutes(scratch, pretrained),
        )
    starts = [(found.get(f"{name}, from pretrained"), found.get(f"{name}, from scratch")) for name in paper]
    pairs = [(one, two) for one, two in starts if one and two and one["epochs"] == two["epochs"]]
    if pairs:
        yield ""
        yield f"From pretrained against from scratch at equal total epochs: {wins(pairs)}."


def noise(bases: Iterable[Row]) -> str:
    """The standard error of a change, from the test images alone, by baseline where there are several."""
    errors = sorted({f"{sqrt(2 * variance(base)):.1f}" for base in bases})
    return f" (standard error {' to '.join(errors)} points)" if errors else ""


def accuracy(row: Row | None, key: str, bases: Mapping[int, Row] = MappingProxyType({})) -> str:
    """In percent, with the change against the baseline that was trained for as many epochs, where there is one."""
    if row is None:
        return "not run"
    base = bases.get(row["epochs"])
    change = f" ({base['ours']['error'] - row['ours'][key]:+.2f})" if base else ""
    return f"{100 - row['ours'][key]:.2f}{change}"


CONV = Group(
    "CIFAR-10 `conv` (Garipov et al. 2016, table 1a)",
    partial(runs, "conv", CONV_PAPER),
    partial(section, "conv", CONV_PAPER),
    needs=("cifar10", "epochs", "work"),
)
CONV_FC = Group(
    "CIFAR-10 `conv-fc` (Garipov et al. 2016, table 1b)",
    partial(runs, "conv-fc", CONV_FC_PAPER),
    partial(section, "conv-fc", CONV_FC_PAPER),
    needs=("cifar10", "epochs", "work"),
)
