"""Memory and time of a calibration above the loaded network: python -m scripts.calibration_memory [NETWORK ...]

Random weights and inputs, each network in a fresh process: images of 224 x 224, sequences of 512 tokens. Printed are the most
memory that the process held beyond what it held with network and inputs loaded, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import ttcompress
from ttcompress.calibrate import stages


class Encoder(nn.Module):
    """An encoder of text in the sizes of BERT-base (Devlin et al. 2019)."""

    def __init__(self, rows: int = 30_522, width: int = 768, depth: int = 12) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(rows, width), nn.Parameter(0.02 * torch.randn(512, width))
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.layers(self.table(ids) + self.places[: ids.shape[1]])
        return x.mean(1)


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        made: nn.Module = torchvision.models.get_model(name, weights=None)
        return made

    return build


NETWORKS = {
    **{name: _vision(name) for name in ("mobilenet_v2", "resnet50", "vit_b_16")},
    "encoder of 512 tokens": Encoder,
}


def measured(name: str, samples: int, steps: int, sweeps: int, batch_size: int) -> dict[str, float]:
    """Megabytes and seconds of one calibration."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = NETWORKS[name]().eval()
    is_text = isinstance(model, Encoder)
    inputs = torch.randint(30_522, (samples, 512)) if is_text else torch.randn(samples, 3, 224, 224)
    stages.EFFORTS = {"default": stages.Effort(sweeps, steps)}

    before, start = _held(), time.perf_counter()
    _, report = ttcompress.compress(
        model, ratio=1.5, calib=inputs, inplace=True, device="cpu", batch_size=batch_size
    )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    at_a_time = (report.calibration or {}).get("at_a_time", min(batch_size, samples))
    network = sum(each.nbytes for each in (*model.parameters(), *model.buffers())) / 2**20
    return {
        "network": network,
        "at a time": at_a_time,
        "above": most - before,
        "seconds": time.perf_counter() - start,
    }


def _held() -> float:
    """Megabytes that the process holds now."""
    (line,) = (
        each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--steps", type=int, default=2, help="of refinement")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(
            json.dumps(
                measured(given.networks[0], given.samples, given.steps, given.sweeps, given.batch_size)
            )
        )
        return

    print(
        "| network | its MB | inputs at a time | MB above the loaded network | seconds |\n|---|---|---|---|---|"
    )
    for name in given.networks:
        command = [
            sys.executable,
            "-m",
            "scripts.calibration_memory",
            name,
            "--here",
            *sys.argv[1 + len(given.networks) :],
        ]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print("|", " | ".join([name, *(f"{value:.0f}" for value in found.values())]), "|", flush=True)


if __name__ == "__main__":
    main()
