"""Before a file is written the network that it holds is run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ttcompress.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
NET = (
    "class Net(nn.Sequential):\n"
    "  def __init__(self):\n"
    "    super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))\n"
)
RUN = "super().forward(x.flatten(1)"
OTHERWISE = {
    "random number": f"{NET}    self.shift = float(torch.rand(()))\n  def forward(self, x): return {RUN} + self.shift)",
    "random constants": f"{NET}    self.noise = torch.randn(64)\n  def forward(self, x): return {RUN} + self.noise)",
    "fails once loaded": f"{NET}    sys.made = self.n = getattr(sys, 'made', 0) + 1\n"
    f"  def forward(self, x):\n    if self.n > 2: raise AttributeError('f')\n    return {RUN})",
}
"""Networks whose answers depend on more than their files hold."""


@pytest.mark.parametrize("kind", [*OTHERWISE, "dropout"])
@pytest.mark.parametrize(
    "more", [["--data", "digits"], ["--input-size", "64", "--macs-ratio", "1.2"]], ids=["data", "size"]
)
def test_a_file_that_would_answer_otherwise_is_not_written(
    kind: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vars(sys).pop("made", None)
    random = NET + "  def forward(self, x): return super().forward(nn.functional.dropout(x, 0.5))"
    file = tmp_path / "net.py"
    file.write_text(
        f"import sys, torch\nfrom torch import nn\n{OTHERWISE.get(kind, random)}\ndef build(): return Net()\n"
    )
    torch.manual_seed(0)
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).state_dict(),
        tmp_path / "c.pt",
    )
    output = tmp_path / "o.safetensors"
    target = [] if "--macs-ratio" in more else ["--ratio", "1.2"]
    words = [
        "compress",
        str(tmp_path / "c.pt"),
        "--arch",
        f"{file}:build",
        "--include",
        "*",
        *target,
        *more,
        "-o",
        str(output),
    ]
    if kind == "dropout":
        main(words)
        assert output.exists()
        return
    with pytest.raises(SystemExit) as ended:
        main(words)
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    assert len(err.splitlines()) == 1
    assert not output.exists()
