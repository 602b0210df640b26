"""Which error should a budget minimise: python scripts/compare_error_weights.py CHECKPOINT... --data cifar10:ROOT

For each checkpoint and ratio, the weights are decomposed under the budget with each layer's squared error absolute,
relative to its norm, or in between. Printed is the agreement with the dense network on training images, in percent.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ttcompress.data.opening import open_data
from ttcompress.layers.kinds import tt_layer
from ttcompress.networks.opening import open_dense
from ttcompress.networks.surgery import swap
from ttcompress.planning.allocate import within_budget
from ttcompress.planning.candidates import Candidate, LayerOptions
from ttcompress.planning.selection import find_layers
from ttcompress.tt.decompose import decompose_weight, frobenius_norm, squared_spectra
from ttcompress.tt.shapes import FORMATS, tensorize_shape

POWERS = {"absolute": 2.0, "in between": 1.0, "relative": 0.0}
IMAGES = 2000


@torch.inference_mode()
def classes(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(images).argmax(1) for images in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    print("| network | ratio | " + " | ".join(POWERS) + " |\n|---|---|" + "---|" * len(POWERS))
    for checkpoint in arguments.checkpoints:
        compare(checkpoint, arguments.data)


def compare(checkpoint: Path, data: str) -> None:
    network = open_dense(checkpoint)
    images = open_data(data, "train")
    batches = [x for x, _ in images.batches(network.preprocessing or images.statistics(), 250, IMAGES)]
    expected = classes(network.model, batches)
    layers = [layer for layer in find_layers(network.model) if not layer.kept]
    weights = [layer.module.weight.detach() for layer in layers]
    shapes = [{(t := tensorize_shape(name, w.shape)).modes: t for name in FORMATS}.values() for w in weights]
    spectra = [[(t, squared_spectra(w, t)) for t in each] for w, each in zip(weights, shapes, strict=True)]
    total = sum(parameter.numel() for parameter in network.model.parameters())
    fixed = total - sum(weight.numel() for weight in weights)
    for ratio in (1.5, 2.0, 3.0):
        row = []
        for power in POWERS.values():
            options = [
                LayerOptions(w.numel(), tuple(Candidate(t, s, frobenius_norm(w) ** power) for t, s in each))
                for w, each in zip(weights, spectra, strict=True)
            ]
            model = copy.deepcopy(network.model)
            choices = within_budget(options, int(total / ratio) - fixed)
            for layer, weight, choice in zip(layers, weights, choices, strict=True):
                if choice.candidate:
                    form = choice.candidate.tensorization
                    cores = decompose_weight(weight, form, choice.tt_ranks).cores
                    swap(model, layer.fqn, tt_layer(layer.spec).from_cores(layer.module, form, cores))
            row.append(100 * float((classes(model, batches) == expected).float().mean()))
        architecture = network.architecture.name if network.architecture else checkpoint.name
        print(
            f"| {architecture} | {ratio:g}x | " + " | ".join(f"{value:.1f}" for value in row) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
