"""Weights of every kind go to ONNX: what onnxruntime answers is what torch answers (the command itself compares)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

import ttcompress
from ttcompress.commands.export import export_file

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

NETWORKS = """
from torch import nn


class Rows(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.core, self.head = core, nn.Linear(64, 10)

    def forward(self, x):
        y = self.core(x.flatten(1).unflatten(1, (48, 64)))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def attention():
    return Rows(nn.TransformerEncoderLayer(64, 4, 96, 0.0, batch_first=True))


def recurrent():
    return Rows(nn.LSTM(64, 32, 2, bidirectional=True, batch_first=True))


def gated():
    return Rows(nn.GRU(64, 64, batch_first=True))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, groups=4), nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )
"""


@pytest.mark.parametrize("name", ["attention", "recurrent", "gated", "convolutions"])
def test_every_kind_is_exported_and_answers_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kinds_to_export.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("kinds_to_export", None)
    build = getattr(import_module("kinds_to_export"), name)

    small, report = ttcompress.compress(build().eval(), ranks=4, conv_ranks=4, include=["*"])
    assert report.plan.layers
    ttcompress.save(small, report, tmp_path / "net.safetensors")
    arch = f"{tmp_path / 'kinds_to_export.py'}:{name}"
    done = export_file(tmp_path / "net.safetensors", tmp_path / "net.onnx", arch=arch, input_size=(3, 32, 32))
    assert done.to_json()["difference"] < 1e-5
