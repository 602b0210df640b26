"""Spectra of weights against NumPy, in the metric and without; and the files that hold them between runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ttcompress.planning.spectra import TRUSTED, LayerSpectra, TensorizationSpectra, layer_spectra
from ttcompress.tt.shapes import FORMATS, Mode, Tensorization, tensorize_shape
from ttcompress.tt.whiten import ModeMetric, whitened

SHAPES: list[tuple[int, ...]] = [(12, 10), (6, 5, 3, 3), (256, 256)]

pytestmark = pytest.mark.usefixtures("one_thread")


def weight_of(shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(np.random.default_rng(sum(shape)).standard_normal(shape))


def tensorizations(shape: tuple[int, ...]) -> list[Tensorization]:
    return [tensorize_shape(name, shape) for name in FORMATS]


def ones(tensorization: Tensorization) -> list[ModeMetric]:
    """The metric in which weights count as they are."""
    shapes = [(mode.out, mode.inp * mode.window) for mode in tensorization.modes]
    return [ModeMetric(*(torch.ones(size, dtype=torch.float64) for size in shape)) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectra_are_the_squared_singular_values_over_the_squared_norm(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    found = layer_spectra(weight, tensorizations(shape))
    assert len(found.tensorizations) == len(FORMATS)
    for each, tensorization in zip(found.tensorizations, tensorizations(shape), strict=True):
        assert each.norm == pytest.approx(np.linalg.norm(weight), rel=1e-12)
        assert len(each.cuts) == len(tensorization.modes) - 1
        tensor = whitened(weight, tensorization, ones(tensorization)).numpy()
        for k, spectrum in enumerate(each.cuts, start=1):
            rows = int(np.prod(tensor.shape[:k]))
            values = np.linalg.svd(tensor.reshape(rows, -1), compute_uv=False) ** 2
            np.testing.assert_allclose(spectrum.numpy() * each.norm**2, values, atol=1e-10 * each.norm**2)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.4, 1e-3])
def test_a_norm_is_at_least_the_trusted_share_of_that_in_the_whole_metric(share: float) -> None:
    """In a metric that shrinks all but the matrix, the norm shrinks as far as TRUSTED and the spectra not at all."""
    weight = weight_of((12, 10))
    whole, other = tensorize_shape("lowrank", (12, 10)), tensorize_shape("matrix", (12, 10), (4, 3), (5, 2))

    def metric(tensorization: Tensorization) -> list[ModeMetric]:
        first, *rest = ones(tensorization)
        return [ModeMetric(first.out * (1.0 if tensorization == whole else share), first.inp), *rest]

    plain, found = layer_spectra(weight, [whole, other]), layer_spectra(weight, [whole, other], metric)
    norm = float(np.linalg.norm(weight))
    assert [each.norm for each in found.tensorizations] == pytest.approx(
        [norm, max(share, TRUSTED) * norm], rel=1e-9
    )
    for ours, theirs in zip(found.tensorizations, plain.tensorizations, strict=True):
        for one, another in zip(ours.cuts, theirs.cuts, strict=True):
            torch.testing.assert_close(one, another, rtol=1e-6, atol=1e-12)


def test_spectra_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    """Also of a tensorization without a cut, and of more than ten of them, whose numbers begin alike."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        TensorizationSpectra(
            tuple(
                torch.rand(number + 2, generator=generator, dtype=torch.float64) for _ in range(number % 4)
            ),
            number / 3,
        )
        for number in range(13)
    ]
    save_file(LayerSpectra(tuple(layers)).to_tensors(), tmp_path / "spectra.safetensors")
    back = LayerSpectra.from_tensors(load_file(tmp_path / "spectra.safetensors"))
    assert [each.norm for each in back.tensorizations] == [each.norm for each in layers]
    for ours, theirs in zip(back.tensorizations, layers, strict=True):
        assert len(ours.cuts) == len(theirs.cuts)
        assert all(torch.equal(*pair) for pair in zip(ours.cuts, theirs.cuts, strict=True))


def test_files_of_an_earlier_run_are_read_by_these_names() -> None:
    """A stopped run goes on from the files that it left, whatever wrote them."""
    modes = Tensorization("matrix", (Mode(2, 2, 1), Mode(2, 2, 1), Mode(2, 2, 1)))
    tensors = layer_spectra(weight_of((8, 8)), [modes, tensorize_shape("lowrank", (8, 8))]).to_tensors()
    assert sorted(tensors) == ["0.0", "0.1", "1.0", "norm"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    assert tensors["norm"].shape == (2,)
