"""npz files whose arrays are inputs by name: the same results as the same tensors in memory, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run_command
from torch import Tensor, nn

import ttcompress
from ttcompress.calibrate import stages
from ttcompress.errors import DataError
from ttcompress.files.header import read_metadata
from ttcompress.files.writing import write_dense
from ttcompress.networks.input_names import by_input_names

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = """
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids, attention_mask=None, scale=None):
        padding = None if attention_mask is None else attention_mask == 0
        x = self.layer(self.table(input_ids), src_key_padding_mask=padding)
        weights = torch.ones(input_ids.shape) if attention_mask is None else attention_mask.float()
        pooled = (x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        if scale is not None:
            pooled = pooled * scale[:, None]
        return {"last": x, "logits": self.head(pooled)}

def build():
    return Encoder()
"""
COUNT, LENGTH = 64, 7
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, 40, (COUNT, LENGTH), generator=GENERATOR)
LENGTHS = torch.randint(2, LENGTH + 1, (COUNT,), generator=GENERATOR)
MASK = (torch.arange(LENGTH) < LENGTHS[:, None]).long()
CLASSES = torch.randint(0, 5, (COUNT,), generator=GENERATOR)
OPTIONS = {
    "ratio": 1.5,
    "effort": "fast",
    "include": ["*"],
    "outputs": ["logits"],
    "batch_size": 16,
    "device": "cpu",
}


def build() -> nn.Module:
    names: dict[str, Any] = {}
    exec(SOURCE, names)
    torch.manual_seed(0)
    model: nn.Module = names["build"]()
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a network, its checkpoint and inputs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)
    write_dense(tmp_path / "net.pt", build().state_dict())
    inputs = {"input_ids": IDS.numpy().astype(np.int32), "attention_mask": MASK.numpy().astype(np.int8)}
    np.savez(tmp_path / "in.npz", **inputs, labels=CLASSES.numpy().astype(np.int16))
    return tmp_path


def compress(folder: Path, *more: object) -> Any:
    arguments = (
        "--arch",
        "net.py:build",
        "--ratio",
        1.5,
        "--include",
        "*",
        "--batch-size",
        16,
        "-o",
        "out.safetensors",
    )
    return run_command("compress", "net.pt", *arguments, *more, cwd=folder)


def test_arrays_by_name_are_inputs(folder: Path) -> None:
    done = compress(
        folder, "--calib", "npz:in.npz", "--data", "npz:in.npz", "--outputs", "logits", "--effort", "fast"
    )
    assert done.code == 0, done.err

    calib = {"input_ids": IDS, "attention_mask": MASK}
    wanted, report = ttcompress.compress(build(), calib=calib, data=[(calib, CLASSES)], **OPTIONS)  # type: ignore[arg-type]
    found = ttcompress.load(folder / "out.safetensors", factory=build)
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.state_dict().items())

    stored = ttcompress.read_report(folder / "out.safetensors")
    assert stored.accuracy is not None
    assert report.accuracy is not None
    assert stored.accuracy["compressed"] == report.accuracy["compressed"]
    assert (stored.accuracy["data"], stored.accuracy["n"]) == ("npz:in.npz", COUNT)
    assert read_metadata(folder / "out.safetensors")["calibration"]["data"] == "npz:in.npz"

    again = run_command(
        "evaluate", "out.safetensors", "--arch", "net.py:build", "--data", "npz:in.npz", cwd=folder
    )
    assert again.code == 0, again.err
    assert f"{stored.accuracy['compressed']:.2f}" in again.out


class Watched(nn.Module):
    """Which tokens the table ever looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.seen: set[int] = set()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.seen |= set(input_ids.flatten().tolist())
        assert bool(attention_mask.all())
        return self.net(input_ids, attention_mask)["logits"]


def test_padding_is_never_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it holds: the same bytes, and no row of the table that only padding has counts as seen."""
    monkeypatch.setattr(stages, "EFFORTS", {"default": stages.Effort(1, 4)})
    padded = torch.where(MASK == 1, IDS, 0)
    other = torch.where(MASK == 1, IDS, 39 - IDS)
    options = {**OPTIONS, "outputs": [], "effort": "default"}
    results = []
    for ids in (padded, other):
        watched = Watched()
        small, report = ttcompress.compress(
            watched, calib={"input_ids": ids, "attention_mask": MASK}, **options
        )
        results.append((small.state_dict(), report.calibration))
        assert 0 not in watched.seen
    assert results[0][1] == results[1][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


def test_every_token_counts_as_much_as_another() -> None:
    """The moments of samples of two lengths are those of all their tokens, in whatever batches they come."""
    from ttcompress.calibrate.calibration import draw_calibration
    from ttcompress.calibrate.statistics import measure
    from ttcompress.layers.spec import layer_spec

    net = nn.Sequential(nn.Linear(6, 4)).requires_grad_(False)
    samples = [torch.randn(2 if k % 3 else 9, 6, generator=GENERATOR) for k in range(32)]

    def batches(indices: Any) -> Any:
        for length in (2, 9):
            chosen = [samples[k] for k in indices if len(samples[k]) == length]
            if chosen:
                yield torch.stack(chosen)

    calibration = draw_calibration("samples", 32, None, 0, batches)
    found = measure(net, {"0": layer_spec(net[0])}, calibration, 0)["0"]
    fitting = list(calibration.fitting(0))
    tokens = torch.cat([batch.reshape(-1, 6) for batch in fitting]).double()
    torch.testing.assert_close(found.inputs.own, tokens.T @ tokens / len(tokens), rtol=1e-5, atol=1e-6)
    held = torch.cat([batch.reshape(-1, 6) for batch in calibration.held_out()]).double()
    torch.testing.assert_close(found.held_out.own, held.T @ held / len(held), rtol=1e-5, atol=1e-6)
    # What a token costs is its square, in each of four outputs.
    expected = 4 * float(tokens.square().sum()) / calibration.num_images
    costs = []
    for seed in range(16):
        found = measure(net, {"0": layer_spec(net[0])}, calibration, seed)["0"]
        costs.append(found.inputs.trace * found.outputs.trace)
    assert np.mean(costs) == pytest.approx(expected, rel=0.1)


ONES = {"input_ids": np.ones((32, 3), np.int64)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({**ONES, "tokens": np.ones((32, 3))}, "tokens is no input of the network, which takes input_ids, attention_mask, scale"),
        ({"scale": np.ones(32), "attention_mask": np.ones((32, 3))}, "lacks input_ids"),
        ({**ONES, "scale": np.ones(31)}, r"as many rows as there are samples.*scale \(31,\)"),
        ({**ONES, "scale": np.full(32, np.nan)}, "scale holds NaN or Inf"),
        ({**ONES, "scale": np.full(32, 1e300)}, "scale holds numbers that float32 does not"),
        ({**ONES, "scale": np.ones(32, np.complex64)}, "scale is complex64"),
        ({"labels": np.ones(32, np.int64)}, "holds no array that could be an input"),
        ({**ONES, "labels": np.ones(31, np.int64)}, "labels are one whole number"),
        ({"input_ids": np.ones((0, 3), np.int64)}, "at least one"),
        ({"input_ids": np.array(3)}, "as many rows"),
        ({"input_ids": np.full((32, 3), 40)}, "does not take inputs of shapes input_ids"),
        ({"input_ids": np.array([None] * 32)}, "not a readable npz file of plain arrays"),
    ],
)  # fmt: skip
def test_what_is_refused(arrays: dict[str, Any], message: str, folder: Path) -> None:
    np.savez(folder / "bad.npz", **arrays)
    done = compress(folder, "--calib", "npz:bad.npz", "--effort", "fast")
    assert done.code == 2
    assert not (folder / "out.safetensors").exists()
    (line,) = done.err.strip().splitlines()
    assert re.search(message, line), line


def test_accuracy_needs_labels(folder: Path) -> None:
    np.savez(folder / "no.npz", **ONES)
    done = compress(folder, "--data", "npz:no.npz")
    assert (done.code, "no array 'labels'" in done.err) == (2, True)
    assert not (folder / "out.safetensors").exists()


def test_one_array_of_any_name_is_the_one_input() -> None:
    x = torch.ones(3, 4)
    assert by_input_names(nn.Linear(4, 2), {"waveform": x}, "f") is x
    assert by_input_names(nn.Sequential(), {"x": x}, "f") is x
    assert by_input_names(build(), {"tokens": x}, "f") is x
    assert by_input_names(build(), {"input_ids": x}, "f") == {"input_ids": x}

    class Anything(nn.Module):
        def forward(self, *given: Any, **named: Any) -> Any:
            return given, named

    assert by_input_names(Anything(), {"anything": x, "more": x}, "f") == {"anything": x, "more": x}

    class Two(nn.Module):
        def forward(self, target: Tensor, source: Tensor) -> Any: ...

    with pytest.raises(DataError, match="takes target, source"):
        by_input_names(Two(), {"image": x}, "f")
