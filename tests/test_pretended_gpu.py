"""Layers, decomposition and calibration on a GPU that is pretended: nothing is on the wrong device, values are the same."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pretended_gpu import GPU, OnGpu, PretendedGpu, pretended_gpu
from torch import Tensor, nn

import ttcompress
from ttcompress.layers.base import TTLayer
from ttcompress.layers.conv import TTConv2d
from ttcompress.layers.kinds import tt_layer
from ttcompress.layers.linear import TTLinear
from ttcompress.layers.plain import StockForm, plain_forms
from ttcompress.layers.rebuilt import TTWeight
from ttcompress.layers.spec import layer_spec
from ttcompress.networks.plain import cheapest
from ttcompress.records.layers import ConvSpec, WeightSpec
from ttcompress.tt import decompose as tt
from ttcompress.tt.decompose import decompose_weight
from ttcompress.tt.shapes import tensorize_shape
from ttcompress.tt.unfolding import Side, fold
from ttcompress.tt.whiten import Moments, mode_metrics, whitened_svd

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], tuple[str, ...]]] = {
    "linear": (lambda: nn.Linear(37, 24), (5, 37), ("matrix", "lowrank")),
    "embedding": (lambda: nn.Embedding(60, 24), (7,), ("matrix", "lowrank")),
    "conv1d": (lambda: nn.Conv1d(6, 8, 5), (2, 6, 9), ("matrix", "chain")),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 8), ("matrix", "chain", "naive", "lowrank")),
    "conv2d, reflected": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        (2, 6, 9, 8),
        ("chain",),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 8), ("matrix", "chain")),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 4, 5, 6), ("matrix", "naive")),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 8, 4, 2, 1), (2, 6, 5, 4), ("matrix", "chain")),
}
FORMS = [(name, form) for name, (_, _, forms) in LAYERS.items() for form in forms]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch) as mode:
        yield mode


def home(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, OnGpu)
    return tensor.values


def made(name: str, form: str) -> tuple[TTLayer, Tensor]:
    make, shape, _ = LAYERS[name]
    torch.manual_seed(0)
    dense = make()
    spec = layer_spec(dense)
    layer = tt_layer(spec)(spec, tensorize_shape(form, spec.view_shape, groups=spec.groups), 3)
    return layer, torch.randint(60, shape) if name == "embedding" else torch.randn(shape)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_layers_there_are_those_here(name: str, form: str, training: bool, gpu: PretendedGpu) -> None:
    """In every way to run, forward and backward, and without ever waiting."""
    if training and name == "embedding":
        pytest.skip("torch's gradient of index_select makes a tensor where autograd takes the GPU to be")
    layer, x = made(name, form)
    # The cost model takes what is kept into account, which is not the same there.
    for execution in layer.executions[1:]:
        layer.execution = execution
        there = copy.deepcopy(layer).to(GPU).train(training)
        layer.train(training)
        sent = x.to(GPU)
        before = gpu.waits
        with torch.set_grad_enabled(training):
            found = there(sent)
            wanted = layer(x)
        assert gpu.waits == before
        torch.testing.assert_close(home(found.detach()), wanted.detach(), rtol=1e-5, atol=1e-6)
        if training:
            layer.zero_grad()
            found.square().sum().backward()
            wanted.square().sum().backward()
            for ours, theirs in zip(there.parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(home(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)


def test_small_layers_are_rebuilt_there(gpu: PretendedGpu) -> None:
    """A few kernels more take as long there as all the multiply-adds of a small convolution."""
    small = TTConv2d(
        layer_spec(nn.Conv2d(64, 64, 3, padding=1)), tensorize_shape("chain", (64, 64, 3, 3)), 16
    )
    there, x = copy.deepcopy(small).to(GPU), torch.randn(32, 64, 16, 16)
    assert small._call(x).execution == "chain"
    assert there._call(x.to(GPU)).execution == "dense"
    assert choice_of_plain(small, x) == ["Conv2d"] * 3
    assert choice_of_plain(there, x) == ["Conv2d"]

    # Of a large one the weight alone takes longer to be made, and to be read.
    large = TTLinear(layer_spec(nn.Linear(4096, 4096)), tensorize_shape("matrix", (4096, 4096)), 4)
    there, x = copy.deepcopy(large).to(GPU), torch.randn(2, 4096)
    assert large._call(x).execution == there._call(x.to(GPU)).execution == "contract"


def choice_of_plain(layer: TTLayer, x: Tensor) -> list[str]:
    """The stock layers that a layer becomes for inputs of this shape."""
    form = cheapest(layer, plain_forms(layer), tuple(x.shape))
    assert isinstance(form, StockForm)
    return ["Conv2d" if isinstance(each, ConvSpec) else "Linear" for each in form.specs]


def weight(form: str = "matrix") -> TTWeight:
    spec = WeightSpec((24, 36))
    view = tensorize_shape(form, spec.view_shape)
    generator = torch.Generator().manual_seed(0)
    return TTWeight(spec, view, decompose_weight(torch.randn(24, 36, generator=generator), view, 4).cores)


def test_what_is_rebuilt_there_is_kept_until_the_cores_change(gpu: PretendedGpu) -> None:
    here = weight()
    there = copy.deepcopy(here).to(GPU).eval()
    before = gpu.waits
    with torch.no_grad():
        kept = there.weight
        assert there.weight is kept
        torch.testing.assert_close(home(kept), here.weight)

        there.cores[0].mul_(2)
        torch.testing.assert_close(home(there.weight), 2 * here.weight)
        there.load_state_dict({name: core.to(GPU) for name, core in here.state_dict().items()})
        torch.testing.assert_close(home(there.weight), here.weight)
        assert there.train().weight is not there.weight
    assert there.eval().weight.requires_grad
    assert gpu.waits == before


def test_a_graph_keeps_nothing(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would go on with what is kept, whatever becomes of it."""
    there = weight().to(GPU).eval()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        assert there.weight is not there.weight


# ------------------------------------------------------------------------------------------------------- decomposition


@pytest.mark.parametrize("given", [{"max_rank": 4}, {"eps": 0.3}, {}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["matrix", "naive"])
def test_tt_svd(form: str, dtype: torch.dtype, given: dict[str, Any], gpu: PretendedGpu) -> None:
    shape = (24, 36) if form == "matrix" else (8, 6, 3, 3)
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = tensorize_shape(form, shape)
    wanted, found = (decompose_weight(each, view, **given) for each in (exact, exact.to(GPU)))
    assert [home(core).shape for core in found.cores] == [core.shape for core in wanted.cores]
    assert found.relative_error == pytest.approx(wanted.relative_error, rel=1e-4, abs=1e-6)


def test_blocks_are_larger_there(gpu: PretendedGpu) -> None:
    """A GPU has to be told of each; what they add up to is the same."""
    shape = (64, 1 << 15)
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    view = tensorize_shape("lowrank", shape)
    here, there = fold(exact, view), fold(exact.to(GPU), view)
    counts = [len([*each.blocks(1, Side.RIGHT, torch.float32)]) for each in (here, there)]
    assert counts[0] > counts[1] == 1
    torch.testing.assert_close(home(there.gram(1, Side.RIGHT)), here.gram(1, Side.RIGHT))


@pytest.mark.parametrize("solver", [torch.linalg.eigh, torch.linalg.eigvalsh])
def test_a_solver_that_gives_up(solver: Any, gpu: PretendedGpu, caplog: pytest.LogCaptureFixture) -> None:
    """The CPU's results go back to where the matrix was."""

    def unsteady(gram: Tensor) -> Any:
        if gram.is_cuda:
            raise torch.linalg.LinAlgError("failed to converge")
        return solver(gram)

    gram = torch.randn(5, 5)
    gram = gram @ gram.T
    with caplog.at_level(logging.WARNING):
        found = tt.solved_for_eigenvalues(gram.to(GPU), unsteady)
    assert "on the CPU" in caplog.text
    tensors = [found] if isinstance(found, Tensor) else [*found]
    wanted = [solver(gram)] if isinstance(found, Tensor) else [*solver(gram)]
    for ours, theirs in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(home(ours), theirs)


@pytest.mark.parametrize(("size", "is_diagonal"), [(24, False), (24, True), (5000, False)])
def test_moments_and_whitening(size: int, is_diagonal: bool, gpu: PretendedGpu) -> None:
    x = torch.randn(size, 40, generator=torch.Generator().manual_seed(1))
    here, there = (Moments(size, is_diagonal=is_diagonal) for _ in range(2))
    for part in x.split(20, dim=1):
        here.add(part)
        there.add(part.to(GPU))
    torch.testing.assert_close(home(there.own), here.own)
    torch.testing.assert_close(home(there.blended(0.1).own), here.blended(0.1).own)
    if size == 24:
        exact = torch.randn(6, size)
        view = tensorize_shape("lowrank", (6, size))
        wanted, found = (
            whitened_svd(each, view, (1, 3, 1), mode_metrics(view, moments, None))
            for each, moments in ((exact, here), (exact.to(GPU), there))
        )
        # Single vectors may have another sign, which the product has not.
        products = [each[0].flatten(0, 3) @ each[1].flatten(1) for each in (found, wanted)]
        torch.testing.assert_close(home(products[0]), products[1])


# ---------------------------------------------------------------------------------------------------------- whole runs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    ).eval()


RUNS = [
    {"eps": 0.8},
    {"ranks": 3, "conv_ranks": 3},
    {"ranks": 3, "conv_ranks": 3, "effort": "fast"},
    pytest.param({"ratio": 1.5, "effort": "fast"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_compressed_there_as_here(options: dict[str, Any], gpu: PretendedGpu) -> None:
    images = torch.randn(48, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    given = {**options, "calib": images} if "effort" in options else options
    (here, wanted), (there, found) = (
        ttcompress.compress(network(), device=device, seed=0, **given) for device in ("cpu", "cuda:0")
    )
    shapes = [[(each.fqn, each.tt_ranks) for each in report.plan.layers] for report in (wanted, found)]
    assert shapes[0] == shapes[1]
    # The network goes back to where it was.
    assert not any(isinstance(each, OnGpu) for each in there.state_dict().values())
    for ours, theirs in zip(found.plan.layers, wanted.plan.layers, strict=True):
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(there(images[:4]), here(images[:4]), rtol=1e-2, atol=1e-3)
