"""Compression with calibration and in search of a size, as the Python interface gives it, for networks of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ttcompress
from ttcompress.commands import compressor as compression
from ttcompress.commands.demo import train_digits
from ttcompress.data.opening import open_data
from ttcompress.errors import DataError, PlanError
from ttcompress.networks.zoo import CifarResNet
from ttcompress.planning import spectra as planning

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    """Convolutions without batch norm, two branches that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.Conv2d(16, 24, 1),
        )
        self.body, self.head = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.left(x)) + self.right(x)
        return self.head(functional.gelu(self.body(x.mean((2, 3)))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Patches, one block with attention that is left alone, tokens throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(32, 192), nn.Linear(192, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = self.norms[0](x)
        x = x + self.attend(y, y, y, need_weights=False)[0]
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: CifarResNet(1),
    "without batch norm": Plain,
    "transformer": Transformer,
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(),
                                    nn.Linear(48, 10)),
}  # fmt: skip
every_net = pytest.mark.parametrize("name", NETS)


def pictures(count: int, seed: int) -> Tensor:
    """Smooth, as photographs are."""
    noise = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(noise, (16, 16), mode="bicubic")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name]()
    model.train()(pictures(64, 9))
    return model.eval().requires_grad_(False)


def apart(model: nn.Module, dense: nn.Module, inputs: Tensor) -> float:
    """Squared error of the outputs over their power."""
    expected = dense(inputs)
    return float((model(inputs) - expected).square().sum() / (expected - expected.mean(0)).square().sum())


# ---------------------------------------------------------------------------------------------------------- calibration


@every_net
@torch.no_grad()
def test_calibration_brings_every_kind_of_network_nearer(name: str) -> None:
    """On inputs that it has not seen, at the same number of parameters."""
    dense = make(name)
    state = deepcopy(dense.state_dict())
    plain, _ = ttcompress.compress(dense, ratio=2)
    small, report = ttcompress.compress(dense, ratio=2, calib=pictures(256, 1), effort="fast")
    unseen = pictures(256, 2)
    assert apart(small, dense, unseen) < 0.8 * apart(plain, dense, unseen)
    assert all(torch.equal(value, state[key]) for key, value in dense.state_dict().items())
    assert sum(parameter.numel() for parameter in small.parameters()) == report.plan.params_after
    assert report.plan.compression >= 2
    assert report.calibration is not None
    assert [report.calibration[key] for key in ("data", "images", "held_out", "effort")] == [
        "calib",
        224,
        32,
        "fast",
    ]
    for layer in report.plan.layers:
        assert len(small.get_submodule(layer.cores_fqn)) == len(layer.tensorization.modes)
        assert layer.output_error is not None
        assert "weights" in layer.output_error


def test_more_effort_is_no_further_away() -> None:
    dense, found = make("linear"), {}
    for effort in ("fast", "default", "max"):
        _, report = ttcompress.compress(dense, ratio=4, calib=pictures(48, 1), effort=effort)
        assert report.calibration is not None
        found[effort] = report.calibration["stages"]
    assert len(found["fast"]) == 3
    assert found["default"][:3] == found["fast"]
    least = {effort: min(each["error"] for each in stages) for effort, stages in found.items()}
    assert least["default"] <= least["fast"]
    assert found["max"][-1]["stage"] == "refinement"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay_and_half_precision_is_computed_in_more(dtype: torch.dtype) -> None:
    dense = make("linear").to(dtype)
    small, report = ttcompress.compress(dense, ratio=2, calib=pictures(64, 1), effort="fast")
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert report.plan.layers[0].weight_dtype == str(dtype).removeprefix("torch.")
    inputs = pictures(64, 2)
    plain, _ = ttcompress.compress(make("linear"), ratio=2)
    with torch.no_grad():
        assert apart(small.float(), make("linear"), inputs) < apart(plain, make("linear"), inputs)


def test_calibration_takes_tensors_batches_and_pairs_alike() -> None:
    inputs, dense = pictures(48, 1), make("linear")
    pairs = [(batch, torch.full((len(batch),), -7)) for batch in inputs.split(17)]
    states = [
        ttcompress.compress(dense, ratio=3, calib=calib, effort="fast")[0].state_dict()
        for calib in (inputs, [*inputs.split(17)], pairs)
    ]
    for other in states[1:]:
        assert all(torch.equal(value, other[key]) for key, value in states[0].items())


def test_the_seed_draws_the_images() -> None:
    inputs, dense = pictures(96, 1), make("linear")
    one, again, other = (
        ttcompress.compress(dense, ranks=4, calib=inputs, calib_images=32, effort="fast", seed=seed)[
            0
        ].state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("calib", "options", "message"),
    [
        (pictures(8, 1), {}, "calibration needs at least 16 images, not 8"),
        (pictures(32, 1), {"calib_images": 33}, "has 32 images, calib_images asks for 33"),
        (pictures(32, 1) * float("nan"), {}, "NaN or Inf"),
        (pictures(32, 1)[..., 1:], {}, "does not take images of shape"),
        (pictures(32, 1)[:, 1:], {}, "does not take images of shape"),
        ([], {}, "holds no inputs"),
        (None, {"effort": "max"}, "effort needs calib"),
        (None, {"calib_images": 64}, "calib_images needs calib"),
    ],
    ids=["few", "more than there are", "NaN", "size", "channels", "none", "effort alone", "number alone"],
)
def test_calibration_that_does_not_fit(calib: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ttcompress.compress(make("linear"), ratio=2, calib=calib, **options)
    assert "\n" not in str(caught.value)


def test_a_layer_that_does_not_run_is_named() -> None:
    class Idle(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[3](functional.relu(self[0](x.flatten(1))))  # type: ignore[no-any-return]

    model = Idle(nn.Linear(768, 32), nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 10))
    with pytest.raises(DataError, match="does not run 1, 2 on the calibration data: exclude it"):
        ttcompress.compress(model, ratio=1.2, calib=pictures(32, 1))
    _, report = ttcompress.compress(
        model, ratio=1.2, calib=pictures(32, 1), exclude=["1", "2"], effort="fast"
    )
    assert [layer.fqn for layer in report.plan.layers] == ["0"]


# --------------------------------------------------------------------------------------------------------------- search


@pytest.fixture(scope="module")
def digits() -> nn.Module:
    return train_digits().requires_grad_(False)


@pytest.fixture(scope="module")
def batches() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Normalised and labelled, by split."""
    known = open_data("digits@train").statistics()
    made = {split: open_data(f"digits@{split}").batches(known, 512) for split in ("train", "test")}
    return {
        split: [(images, labels) for images, labels in each if labels is not None]
        for split, each in made.items()
    }


def top1(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_search_finds_the_border(
    digits: nn.Module, batches: Any, calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SEARCH_STEP", 1.2)
    options = {"calib": batches["train"], "calib_images": 128, "effort": "fast"} if calibrated else {}
    small, report = ttcompress.compress(
        digits, max_drop=1.0, val=batches["test"], data=batches["test"], **options
    )
    dense = top1(digits, batches["test"])
    assert dense - top1(small, batches["test"]) <= 1.0
    kept = [point for point in report.search if point["drop"] <= 1.0]
    lost = [point for point in report.search if point["drop"] > 1.0]
    assert kept[-1]["compression"] == report.plan.compression == max(point["compression"] for point in kept)
    assert kept[-1]["ratio"] < min(point["ratio"] for point in lost) <= 1.2 * kept[-1]["ratio"]
    for point in report.search:
        assert point["accuracy"] == pytest.approx(dense - point["drop"])
        assert point["compression"] >= point["ratio"]
    assert report.accuracy is not None
    assert report.accuracy["compressed"] == pytest.approx(kept[-1]["accuracy"])
    assert report.plan.compression > 4


def test_calibration_reaches_further(
    digits: nn.Module, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "SEARCH_STEP", 1.2)
    calibrated = {"calib": batches["train"], "calib_images": 128, "effort": "fast"}
    reached = [
        ttcompress.compress(digits, max_drop=1.0, val=batches["train"], **options)[1].plan.compression
        for options in ({}, calibrated)
    ]
    assert reached[1] > reached[0]


def test_spectra_and_statistics_are_computed_once(
    digits: nn.Module, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    compute = planning.squared_spectra
    monkeypatch.setattr(
        planning, "squared_spectra", lambda *given, **named: counted.append(1) or compute(*given, **named)
    )
    monkeypatch.setattr(compression, "SEARCH_STEP", 1.5)
    calls: list[str] = []
    _, report = ttcompress.compress(
        digits,
        max_drop=2.0,
        val=batches["test"],
        calib=batches["train"],
        calib_images=293,
        effort="fast",
        progress=lambda what, done, total: calls.append(what),
    )
    searched = len(counted)
    assert len(report.search) > 2
    assert calls.count("statistics") == 3
    counted.clear()
    ttcompress.compress(digits, ratio=4)
    assert searched == len(counted)


def test_a_search_needs_images_and_a_network_that_can_lose(digits: nn.Module, batches: Any) -> None:
    with pytest.raises(PlanError, match="name it with val"):
        ttcompress.compress(digits, max_drop=1.0)
    with pytest.raises(DataError, match="val is what max_drop"):
        ttcompress.compress(digits, ratio=2, val=batches["test"])
    state = deepcopy(digits.state_dict())
    answers = [(images, digits(images).argmax(1)) for images, _ in batches["test"]]
    with pytest.raises(PlanError, match=r"keeps the drop within 0; the mildest tried: .*x loses ."):
        ttcompress.compress(digits, max_drop=0, val=answers, include=["fc1"], format="matrix")
    assert all(torch.equal(value, state[key]) for key, value in digits.state_dict().items())


def test_a_search_goes_by_any_metric_in_its_own_unit(digits: nn.Module, batches: Any) -> None:
    images = batches["test"][0][0]

    def agreement(model: nn.Module) -> float:
        return -float((model.eval()(images) - digits(images)).square().mean())

    small, report = ttcompress.compress(digits, max_drop=3.0, metric=agreement, include=["fc*"])
    assert report.accuracy is not None
    assert report.accuracy["metric"] == "agreement"
    assert -3.0 <= agreement(small) == report.accuracy["compressed"] < 0
    assert any(point["drop"] > 3.0 for point in report.search)
    assert "lost" in str(report)
    # By val where both are given.
    _, by_val = ttcompress.compress(
        digits, max_drop=3.0, metric=agreement, val=batches["test"], include=["fc*"]
    )
    assert by_val.search[0]["accuracy"] > 0 > report.search[0]["accuracy"]


@pytest.mark.parametrize("error", [KeyError("logits"), RuntimeError("no such batch"), OSError("gone")])
def test_an_error_of_a_metric_is_one_line_with_its_cause(error: Exception) -> None:
    def quality(model: nn.Module) -> float:
        raise error

    for target in ({"ratio": 2}, {"max_drop": 1.0}):
        with pytest.raises(DataError, match=r"^quality failed: ") as caught:
            ttcompress.compress(make("linear"), metric=quality, **target)  # type: ignore[arg-type]
        assert caught.value.__cause__ is error
