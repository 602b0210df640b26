"""Long refinement where TT-SVD keeps little: when it runs, what it is worth, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ttcompress.calibrate import from_afar, stages
from ttcompress.calibrate.calibration import draw_calibration
from ttcompress.calibrate.from_afar import (
    KEPT,
    LEAST_COMPRESSION,
    RANDOM_STARTS,
    keeps_little,
    refine_from_afar,
    varied,
)
from ttcompress.calibrate.held_out_errors import network_error
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.stages import Effort, compress_calibrated
from ttcompress.calibrate.statistics import measure
from ttcompress.networks.surgery import apply_plan
from ttcompress.networks.weights import cores_of, weight_of
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import LayerRule, Recipe
from ttcompress.records.plan import CompressionPlan

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"fast": Effort(1, 0, 0), "default": Effort(1, 10, 120)}
WITHOUT = {"default": Effort(1, 10, 0)}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "EFFORTS", SMALL)
    monkeypatch.setattr(from_afar, "RACE", 20)


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


FAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Recipe]] = {
    "linear": (
        linear_net,
        (1, 16, 16),
        Recipe(
            layers=(LayerRule("1", in_modes=(4, 4, 4, 4), out_modes=(4, 4, 4, 4), ranks=2),), include=("1",)
        ),
    ),
    "conv": (conv_net, (3, 8, 8), Recipe(ranks=1, conv_ranks=1, format="chain", include=("3",))),
}
NEAR = Recipe(ranks=100, format="lowrank", include=("1",))

Problem = tuple[Reference, CompressionPlan]


def problem(make: Callable[[], nn.Module], shape: tuple[int, ...], recipe: Recipe) -> Problem:
    torch.manual_seed(0)
    dense = make().eval()
    # Images of few sources, as real ones are.
    images = torch.randn(256, 6) @ torch.randn(6, _size(shape))
    images = images.reshape(256, *shape) / 2
    list(dense.parameters())[-2].data *= 5
    dense.requires_grad_(False)
    plan = make_plan(dense, recipe)
    calibration = draw_calibration("toy", 256, None, 0, lambda chosen: images[torch.tensor(chosen)].split(64))
    statistics = measure(dense, {layer.fqn: layer.spec for layer in plan.layers}, calibration, 0)
    return Reference(dense, statistics, calibration), plan


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


@pytest.fixture(scope="module", params=FAR)
def far(request: pytest.FixtureRequest) -> Problem:
    return problem(*FAR[request.param])


def plain_of(reference: Reference, plan: CompressionPlan) -> nn.Module:
    plain = deepcopy(reference.dense)
    apply_plan(plain, plan)
    return plain


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ------------------------------------------------------------------------------------------------------- what it is worth


def test_it_is_nearer_than_tt_svd_and_ordinary_calibration(
    far: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, plan = far
    model, _, log = compress_calibrated(reference, plan, "default", 0)
    by_name = {entry["stage"]: entry for entry in log}
    assert by_name["from afar"]["kept"]
    assert by_name["from afar"]["error"] == network_error(reference.dense, model, reference.calibration)
    assert by_name["from afar"]["error"] < 0.95 * min(entry["error"] for entry in log[:-1])

    monkeypatch.setattr(stages, "EFFORTS", WITHOUT)
    ordinary, _, before = compress_calibrated(reference, plan, "default", 0)
    assert before == log[:-1]
    assert network_error(reference.dense, ordinary, reference.calibration) > by_name["from afar"]["error"]


def test_the_same_seed_gives_the_same_network(far: Problem) -> None:
    reference, plan = far
    plain = plain_of(reference, plan)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        model = deepcopy(plain)
        with torch.enable_grad():
            refine_from_afar(reference, model, plain, plan, 5, seed)
        found.append(state_of(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_it_leaves_the_dense_network_and_the_starts_alone(far: Problem) -> None:
    reference, plan = far
    dense, plain = state_of(reference.dense), plain_of(reference, plan)
    start, model = state_of(plain), deepcopy(plain)
    numbers = torch.random.get_rng_state()
    with torch.enable_grad():
        refine_from_afar(reference, model, plain, plan, 5, 0)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert same(state_of(reference.dense), dense)
    assert same(state_of(plain), start)
    assert not any(each.training for each in model.modules())
    # Batch norm learns its scales, not what the statistics of a batch are.
    statistics = [name for name in start if "running" in name or "num_batches" in name]
    assert all(torch.equal(model.state_dict()[name], start[name]) for name in statistics)


# ------------------------------------------------------------------------------------------- when it runs and what it keeps


def test_where_tt_svd_keeps_more_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, plan = problem(linear_net, (1, 16, 16), NEAR)
    model, found, log = compress_calibrated(reference, plan, "default", 0)
    monkeypatch.setattr(stages, "EFFORTS", WITHOUT)
    ordinary, expected, before = compress_calibrated(reference, plan, "default", 0)
    assert (found, log) == (expected, before)
    assert same(state_of(model), state_of(ordinary))


def test_what_came_before_does_not_matter(far: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps and ordinary refinement are what is left if it fails, and no start of it."""
    model, _, log = compress_calibrated(*far, "default", 0)
    assert log[-1]["kept"]
    monkeypatch.setattr(stages, "EFFORTS", {"default": Effort(0, 0, SMALL["default"].far)})
    alone, _, _ = compress_calibrated(*far, "default", 0)
    assert same(state_of(model), state_of(alone))


def test_fast_leaves_it_out(far: Problem) -> None:
    _, _, log = compress_calibrated(*far, "fast", 0)
    assert [entry["stage"] for entry in log if entry["stage"] in ("from afar", "refinement")] == []


@pytest.mark.parametrize("value", [10.0, float("nan")])
def test_what_makes_it_worse_is_not_kept(far: Problem, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, plan = far
    monkeypatch.setattr(stages, "EFFORTS", WITHOUT)
    ordinary, *_ = compress_calibrated(reference, plan, "default", 0)
    monkeypatch.setattr(stages, "EFFORTS", SMALL)

    def spoil(reference: Any, model: nn.Module, *rest: Any) -> None:
        for parameter in model.parameters():
            parameter.data.copy_(
                value * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            )

    monkeypatch.setattr(stages, "refine_from_afar", spoil)
    model, _, log = compress_calibrated(reference, plan, "default", 0)
    assert not log[-1]["kept"]
    assert same(state_of(model), state_of(ordinary))


@pytest.mark.parametrize("winner", range(1 + RANDOM_STARTS))
def test_the_best_of_the_race_goes_on(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, plan = problem(*FAR["linear"])
    plain = plain_of(reference, plan)
    started: list[dict[str, Tensor]] = []

    def record(reference: Any, model: nn.Module, steps: int, *rest: Any) -> None:
        started.append(state_of(model))

    def error(reference: Any, model: nn.Module) -> float:
        return 1.0 + (len(started) != winner + 1)

    monkeypatch.setattr(from_afar, "_train", record)
    monkeypatch.setattr(from_afar, "_error", error)
    refine_from_afar(reference, deepcopy(plain), plain, plan, 5, 0)
    *raced, gone_on = started
    assert len(raced) == 1 + RANDOM_STARTS
    assert same(gone_on, raced[winner])
    assert same(raced[0], state_of(plain))
    # Random starts differ from each other, in cores alone.
    assert not same(raced[1], raced[2])
    assert all(torch.equal(raced[1][name], raced[0][name]) for name in raced[0] if "cores" not in name)


def test_random_cores_have_the_norm_of_the_weight(far: Problem) -> None:
    reference, plan = far
    plain = plain_of(reference, plan)
    drawn = deepcopy(plain)
    drawn.load_state_dict(from_afar._random(reference.dense, plain, plan, 3))
    for layer in plan.layers:
        ours, theirs = weight_of(drawn, layer), weight_of(reference.dense, layer)
        assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=1e-3)
        sizes = {round(float(core.norm() / core.numel() ** 0.5), 6) for core in cores_of(drawn, layer)}
        assert all(size > 0 for size in sizes)


@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_what_tt_svd_keeps_is_its_share_of_the_squared_norm(rank: int) -> None:
    """Against the singular values of NumPy."""
    dense = linear_net().requires_grad_(False)
    plan = make_plan(dense, Recipe(ranks=rank, format="lowrank", include=("1",)))
    plain = deepcopy(dense)
    apply_plan(plain, plan)
    squared = torch.linalg.svdvals(dense[1].weight.double()).square()  # type: ignore[index]
    share = float(squared[:rank].sum() / squared.sum())
    compression = 256 * 256 / (2 * 256 * rank)
    assert abs(share - KEPT) > 1e-3
    assert keeps_little(dense, plain, plan) == (share < KEPT and compression >= LEAST_COMPRESSION)


# --------------------------------------------------------------------------------------------------------- what it sees


def test_grey_images_are_moved_and_no_more() -> None:
    images = torch.rand(64, 1, 16, 16) + 1
    found = varied(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    for image, each in zip(padded, found, strict=True):
        windows = [image[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        assert any(torch.equal(each, window) for window in windows)


def test_images_of_colour_are_flipped_too() -> None:
    images = torch.rand(64, 3, 4, 4)
    found = varied(images, torch.Generator().manual_seed(0))
    flips = [torch.equal(each, image.flip(-1)) for image, each in zip(images, found, strict=True)]
    stays = [torch.equal(each, image) for image, each in zip(images, found, strict=True)]
    assert all(flip != stay for flip, stay in zip(flips, stays, strict=True))
    assert 10 < sum(flips) < 54


def test_tokens_stay_and_vectors_are_mixed() -> None:
    tokens = torch.randint(0, 9, (5, 7))
    assert torch.equal(varied(tokens, torch.Generator()), tokens)
    vectors = torch.rand(32, 5)
    assert not torch.equal(varied(vectors, torch.Generator().manual_seed(0)), vectors)
