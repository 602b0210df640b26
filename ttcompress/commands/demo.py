"""The main job on something real with no download: scikit-learn's 8x8 digits and a network trained here in seconds."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ttcompress.data.opening import open_data
from ttcompress.errors import CheckpointError
from ttcompress.files.writing import write_dense
from ttcompress.networks.architectures import build
from ttcompress.records.report import Architecture

FOLDER = Path("ttcompress-demo")
DIGITS_NET = Architecture("zoo", "mlp", {"width0": 64, "width1": 512, "width2": 512, "width3": 10})
EPOCHS = 20


def run_demo(say: Callable[[str], None], run: Callable[[list[str]], object]) -> None:
    """Train, then run the real commands in `ttcompress-demo/`, saying each before it runs.

    Raises:
        CheckpointError: the folder cannot be made here.
    """
    try:
        FOLDER.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{FOLDER}: cannot be made here: {error.strerror}") from error
    dense, compressed, expanded, page = (
        str(FOLDER / f"digits{end}") for end in (".pt", "-tt.safetensors", "-dense.pt", ".html")
    )
    say("Training a 64-512-512-10 network on scikit-learn's digits (1,437 images) ...")
    write_dense(Path(dense), train_digits().state_dict())
    for arguments in (
        ["evaluate", dense, "--data", "digits"],
        ["compress", dense, "--ratio", "4", "--data", "digits", "-o", compressed, "--html", page, "--force"],
        ["expand", compressed, "-o", expanded, "--force"],
        ["report", compressed],
    ):
        say(f"\n$ ttcompress {shlex.join(arguments)}")
        run(arguments)
    say(f"\nAll of it as a page for a browser: {page}")


def train_digits(seed: int = 0) -> nn.Module:
    """The trained network of the demo: Adam on the digits' training split."""
    images = open_data("digits@train")
    (pixels, labels), *_ = images.batches(images.statistics(), len(images))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(DIGITS_NET, device="cpu").train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(pixels)).split(64):  # type: ignore[no-untyped-call]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(pixels[index]), labels[index]).backward()  # type: ignore[no-untyped-call,index]
                optimizer.step()
    return model.eval()
