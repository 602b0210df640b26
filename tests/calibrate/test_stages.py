"""The stages of a calibrated compression: which are kept, what the plan says of them, what a network takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ttcompress.calibrate import stages
from ttcompress.calibrate.calibration import Calibration, draw_calibration
from ttcompress.calibrate.held_out_errors import network_error, output_errors
from ttcompress.calibrate.reference import Reference
from ttcompress.calibrate.stages import Effort, Stages, adopt, compress_calibrated
from ttcompress.calibrate.statistics import measure
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.linear import TTLinear
from ttcompress.networks.surgery import apply_plan, store_cores
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe
from ttcompress.records.common import Json
from ttcompress.records.plan import CompressionPlan
from ttcompress.tt.contract import dense_weight
from ttcompress.tt.quantize import dequantize, quantize
from ttcompress.tt.spool import Spool

EFFORTS = {"fast": Effort(0, 0, 0), "default": Effort(1, 4, 0), "max": Effort(0, 3, 0)}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def small_efforts() -> Iterator[None]:
    """Few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "EFFORTS", EFFORTS)
        yield


class Block(nn.Module):
    """A residual block with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.Conv2d(12, 8, 3, padding="same")
        self.norms = nn.ModuleList([nn.BatchNorm2d(12), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.one(x)))
        return torch.relu(x + self.norms[1](self.two(y)))


def layers_of(name: str) -> list[nn.Module]:
    if name == "mlp":
        return [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20, bias=False), nn.ReLU(), nn.Linear(20, 5)]
    norm: Callable[[int], nn.Module] = nn.Identity if name == "without batch norm" else nn.BatchNorm2d
    body = [Block()] if name == "residual" else [nn.Conv2d(8, 12, 3, 2, padding_mode="reflect", padding=1)]
    width = 8 if name == "residual" else 12
    return [nn.Conv2d(3, 8, 3), norm(8), *body, norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 5)]  # fmt: skip


NETS = ("conv", "mlp", "without batch norm", "residual")


@dataclass(frozen=True)
class Toy:
    """A frozen network and what its compression is made from; shared by the tests and not to be changed."""

    reference: Reference
    state: dict[str, Tensor]
    plan: CompressionPlan

    @property
    def dense(self) -> nn.Module:
        return self.reference.dense

    @property
    def calibration(self) -> Calibration:
        return self.reference.calibration

    def compressed(
        self, effort: str = "default", seed: int = 0
    ) -> tuple[nn.Module, CompressionPlan, list[Json]]:
        return compress_calibrated(self.reference, self.plan, effort, seed)

    def apart(self, model: nn.Module) -> float:
        return network_error(self.dense, model, self.calibration)


def make_toy(name: str) -> Toy:
    torch.manual_seed(0)
    dense = nn.Sequential(*layers_of(name))
    inputs = torch.randn(128, 12) if name == "mlp" else torch.randn(128, 3, 8, 7).cumsum(2)
    dense(inputs)
    [*dense.parameters()][-2].data *= 5
    dense.eval().requires_grad_(False)
    plan = make_plan(dense, Recipe(ranks=3, conv_ranks=3, format="lowrank"))
    calibration = draw_calibration(
        "toy", 128, None, 0, lambda indices: inputs[torch.tensor(indices)].split(32)
    )
    statistics = measure(dense, {layer.fqn: layer.spec for layer in plan.layers}, calibration, 0)
    return Toy(Reference(dense, statistics, calibration), deepcopy(dense.state_dict()), plan)


@pytest.fixture(scope="module", params=NETS)
def toy(request: pytest.FixtureRequest) -> Toy:
    return make_toy(request.param)


@pytest.fixture(scope="module")
def done(toy: Toy) -> tuple[nn.Module, CompressionPlan, list[Json]]:
    return toy.compressed()


def same(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def outputs(model: nn.Module, fqn: str, batches: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    found: list[Tensor] = []
    handle = model.get_submodule(fqn).register_forward_hook(
        lambda *call: found.append(call[2].double().clone())
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return np.asarray(torch.cat(found).numpy())


# -------------------------------------------------------------------------------------------------- compression


def test_the_result_is_the_best_of_the_stages(toy: Toy, done: Any) -> None:
    model, _, log = done
    names = [entry["stage"] for entry in log]
    has_norm = any(isinstance(module, nn.BatchNorm2d) for module in toy.dense.modules())
    assert names == ["weights", "whitened", "sweeps", *["batch norm"] * has_norm, "refinement"]
    assert log[0]["kept"]
    best = inf
    for entry in log:
        assert entry["kept"] == (entry["error"] < best)
        best = min(best, entry["error"])
    assert toy.apart(model) == best < log[0]["error"]


def test_the_dense_network_stays_as_it_is(toy: Toy, done: Any) -> None:
    assert all(torch.equal(value, toy.state[key]) for key, value in toy.dense.state_dict().items())
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in toy.dense.parameters()
    )
    shared = {tensor.data_ptr() for tensor in done[0].state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in toy.dense.state_dict().values()}
    for network in (toy.dense, done[0]):
        assert not any(
            each.training or each._forward_hooks or each._forward_pre_hooks for each in network.modules()
        )


def test_the_plan_tells_the_errors(toy: Toy, done: Any) -> None:
    model, plan, log = done
    kept = [entry["stage"] for entry in log if entry["kept"]]
    assert [layer.fqn for layer in plan.layers] == [layer.fqn for layer in toy.plan.layers]
    assert len(plan.layers) >= 2
    for layer, planned in zip(plan.layers, toy.plan.layers, strict=True):
        ours, theirs = (
            each.get_submodule(layer.fqn).weight.double().detach().numpy() for each in (model, toy.dense)
        )  # type: ignore[operator]
        assert layer.relative_error == pytest.approx(
            np.linalg.norm(theirs - ours) / np.linalg.norm(theirs), rel=1e-5
        )
        assert isinstance(model.get_submodule(layer.fqn), TTConv2d | TTLinear)
        assert (layer.tt_ranks, layer.params_after) == (planned.tt_ranks, planned.params_after)
        assert layer.output_error is not None
        assert [*layer.output_error] == kept
        ours, theirs = (outputs(each, layer.fqn, toy.calibration.held_out()) for each in (model, toy.dense))
        missed = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert layer.output_error[kept[-1]] == pytest.approx(missed, rel=1e-5)


@torch.no_grad()
def test_the_first_stage_is_weight_only_compression(toy: Toy, done: Any) -> None:
    """What each layer misses in the mean, at the dense network's inputs, is in its bias or in the norm after it."""
    _, plan, log = done
    plain = deepcopy(toy.dense)
    planned = apply_plan(plain, toy.plan)
    images = torch.cat([*toy.calibration.fitting(0)])
    for layer in plan.layers:
        own, compressed = (each.get_submodule(layer.fqn) for each in (toy.dense, plain))
        seen: list[Tensor] = []
        handle = own.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))  # type: ignore[misc]
        toy.dense(images)
        handle.remove()
        missed = (own(seen[0]) - compressed(seen[0])).transpose(0, 1).flatten(1).mean(1)
        if compressed.bias is not None:
            compressed.bias += missed  # type: ignore[operator]
        elif layer.fqn == "2.one":
            plain.get_submodule("2.norms.0").running_mean -= missed  # type: ignore[operator]

    errors = output_errors(toy.dense, plain, planned, toy.calibration)
    assert log[0]["error"] == pytest.approx(toy.apart(plain), rel=1e-3)
    assert {layer.fqn: layer.output_error["weights"] for layer in plan.layers} == pytest.approx(
        errors, rel=1e-3
    )


def test_the_same_seed_gives_the_same_network(toy: Toy, done: Any) -> None:
    model, plan, log = toy.compressed()
    assert same(model, done[0])
    assert (plan, log) == done[1:]
    other, *_ = toy.compressed("max", seed=1)
    again, *_ = toy.compressed("max", seed=1)
    assert same(other, again)


@pytest.mark.parametrize(
    ("effort", "left_out"), [("fast", {"sweeps", "refinement"}), ("max", {"sweeps"}), ("default", set())]
)
def test_no_effort_no_stage(toy: Toy, effort: str, left_out: set[str]) -> None:
    _, _, log = toy.compressed(effort)
    assert {"weights", "whitened", "sweeps", "refinement"} - {entry["stage"] for entry in log} == left_out


def noise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def nan(model: nn.Module) -> None:
    next(iter(model.parameters())).data.fill_(float("nan"))


def slope(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data *= 1.5


@pytest.mark.parametrize("stage", ["refine", "sweep_layers", "recalibrate_batch_norm"])
@pytest.mark.parametrize("spoil", [noise, nan, slope])
def test_a_stage_that_makes_it_worse_is_not_kept(
    toy: Toy, stage: str, spoil: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network before it goes on, as if the stage were not there."""
    place = 0 if stage == "recalibrate_batch_norm" else 1
    monkeypatch.setattr(stages, stage, lambda *_: False)
    expected, plan, without = toy.compressed()
    monkeypatch.setattr(stages, stage, lambda *given: spoil(given[place]))
    model, found, log = toy.compressed()
    assert same(model, expected)
    assert found == plan
    name = {"refine": "refinement", "sweep_layers": "sweeps", "recalibrate_batch_norm": "batch norm"}[stage]
    (entry,) = [entry for entry in log if entry["stage"] == name]
    assert not entry["kept"]
    assert (entry["error"] is None) == (spoil is nan)
    assert [entry for entry in log if entry["stage"] != name] == [
        each for each in without if each["stage"] != name
    ]


def test_progress_is_told(toy: Toy) -> None:
    calls: list[tuple[str, int, int]] = []
    compress_calibrated(toy.reference, toy.plan, "default", 0, lambda *call: calls.append(call))
    named = [layer.fqn for layer in toy.plan.layers]
    told = list(dict.fromkeys(call[0] for call in calls))
    assert told == [
        *(f"decomposing {fqn}" for fqn in named),
        *(f"fitting {fqn}" for fqn in named),
        "recalibrating batch norms",
        "refining",
    ]
    assert all(0 <= number <= total for _, number, total in calls)


# ------------------------------------------------------------------------------------------------------- stages


def values(model: nn.Module) -> dict[str, bytes]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().numpy().tobytes() for name, tensor in named}


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_a_change_that_is_not_kept_is_undone_to_the_bit(
    in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "Spool", partial(Spool, in_memory))
    toy = make_toy("mlp")
    run = Stages(toy.reference, toy.plan)
    run.run("none", lambda model: False)
    assert run.log == []
    assert values(run.model) == values(toy.dense)
    run.run("worse", slope)
    worse = values(run.model)
    assert run.log[0]["kept"]
    run.run("worse still", noise)
    assert values(run.model) == worse
    run.run("back", lambda model: model.load_state_dict(toy.state))
    assert values(run.model) == values(toy.dense)
    assert [entry["kept"] for entry in run.log] == [True, False, True]
    assert run.log[2]["error"] == 0
    run.run("equal", lambda model: None)
    assert [entry["kept"] for entry in run.log] == [True, False, True, False]
    assert all([*errors] == ["worse", "back"] and errors["back"] == 0 for errors in run.errors.values())


def test_parameters_that_are_shared_and_buffers_that_no_file_has_are_undone_too() -> None:
    toy = make_toy("mlp")
    toy.dense.register_buffer("scale", torch.ones(3), persistent=False)
    toy.dense[2].register_parameter("again", toy.dense[4].bias)
    run = Stages(toy.reference, toy.plan)
    run.run("first", lambda model: None)
    before = values(run.model)

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.normal_()

    run.run("spoilt", spoil)
    assert [entry["kept"] for entry in run.log] == [True, False]
    assert values(run.model) == before
    assert run.model[2].again is run.model[4].bias


def test_what_a_training_leaves_takes_no_memory_after_it() -> None:
    toy = make_toy("mlp")
    run = Stages(toy.reference, toy.plan)

    def train(model: nn.Module) -> None:
        model.requires_grad_()
        model(torch.randn(4, 12)).sum().backward()

    run.run("trained", train)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_the_first_stage_is_kept_whatever_comes_of_it() -> None:
    toy = make_toy("mlp")
    run = Stages(toy.reference, toy.plan)
    run.run("broken", nan)
    run.run("mended", lambda model: model.load_state_dict(toy.state))
    assert run.log == [
        {"stage": "broken", "error": None, "kept": True},
        {"stage": "mended", "error": 0.0, "kept": True},
    ]


# -------------------------------------------------------------------------------------------------------- adopt


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_network_adopts_the_cores_as_they_are_and_all_else_in_its_own_types(
    toy: Toy, done: Any, own: torch.dtype, dtype: torch.dtype | None
) -> None:
    compressed, plan, _ = done
    if dtype:
        name = str(dtype).removeprefix("torch.")
        compressed = deepcopy(compressed)
        store_cores(compressed, plan.with_layers([replace(layer, core_dtype=name) for layer in plan.layers]))
    model = deepcopy(toy.dense).to(own)
    frozen = [name for k, (name, _) in enumerate(model.named_parameters()) if k % 2]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.train()
    adopt(model, compressed, plan)
    values = compressed.state_dict()
    assert model.state_dict().keys() == values.keys()
    for key, value in model.state_dict().items():
        wanted = (
            (dtype or torch.float32)
            if ".cores." in key
            else own
            if value.is_floating_point()
            else value.dtype
        )
        assert value.dtype == wanted
        assert torch.equal(value, values[key].to(wanted))
    layers = {layer.fqn for layer in plan.layers}
    for name, parameter in model.named_parameters():
        dense = name.split(".cores.")[0] + ".weight" if ".cores." in name else name
        assert parameter.requires_grad == (dense not in frozen)
    assert all(isinstance(model.get_submodule(fqn), TTLinear | TTConv2d) for fqn in layers)
    assert all(module.training for module in model.modules())
    shared = {tensor.data_ptr() for each in (toy.dense, compressed) for tensor in each.state_dict().values()}
    assert not shared & {tensor.data_ptr() for tensor in model.state_dict().values()}
    if own == dtype == torch.float32 or (own, dtype) == (torch.float32, None):
        images = torch.cat([*toy.calibration.held_out()])
        with torch.no_grad():
            assert torch.equal(model.eval()(images), compressed(images))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_errors_are_those_of_the_stored_cores(toy: Toy, dtype: str) -> None:
    plan = toy.plan.with_layers([replace(layer, core_dtype=dtype) for layer in toy.plan.layers])
    model, stored, _ = compress_calibrated(toy.reference, plan, "fast", 0)
    for layer in stored.layers:
        cores = list(model.get_submodule(layer.fqn).cores)  # type: ignore[arg-type]
        assert all(core.dtype == (torch.float16 if dtype == "float16" else torch.float32) for core in cores)
        if dtype == "int8":
            assert all(torch.equal(core, dequantize(*quantize(core))) for core in cores)
        dense = toy.dense.get_submodule(layer.fqn).weight.detach().double()  # type: ignore[operator]
        missed = dense - dense_weight([core.detach().double() for core in cores], layer.spec.weight_shape)
        assert layer.relative_error == pytest.approx(float(missed.norm() / dense.norm()), rel=1e-3)


def test_what_is_kept_takes_the_refined_values(toy: Toy, done: Any) -> None:
    compressed, plan, log = done
    model = deepcopy(toy.dense)
    adopt(model, compressed, plan)
    kept = {name for name, _ in toy.dense.named_parameters()} & model.state_dict().keys()
    changed = {name for name in kept if not torch.equal(model.state_dict()[name], toy.state[name])}
    assert bool(changed) == (
        log[-1]["kept"] or any(entry["kept"] for entry in log if entry["stage"] == "sweeps")
    )
    assert all(torch.equal(model.state_dict()[name], compressed.state_dict()[name]) for name in kept)
