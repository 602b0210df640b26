"""Small networks to calibrate: python scripts/train_small.py vit|lstm|mlp OUT.pt --data cifar10:ROOT|mnist:ROOT

`vit` is a vision transformer for 32x32 images, `lstm` a recurrent network that reads images row by row; they are read
with --arch scripts/train_small.py:vit and :lstm. `mlp` is the zoo net of widths 784-512-512-10. All train from scratch
on a CPU core, in minutes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VisionTransformer

from ttcompress.calibrate.refine import moved
from ttcompress.data.opening import open_data
from ttcompress.measure.accuracy import predict
from ttcompress.networks.zoo import Mlp, zoo_preprocessing

BATCH, RATE = 128, 1e-3
WIDTHS = {"width0": 784, "width1": 512, "width2": 512, "width3": 10}


def vit() -> nn.Module:
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10
    )


class Rows(nn.Module):
    """A two-layer bidirectional LSTM over the rows of an image of 28x28, and a Linear on its mean output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, 96, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(192, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows, _ = self.lstm(images.squeeze(1))
        return self.head(rows.mean(1))  # type: ignore[no-any-return]


def lstm() -> nn.Module:
    return Rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=["vit", "lstm", "mlp"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, test = open_data(arguments.data, "train"), open_data(arguments.data, "test")
    known = (zoo_preprocessing("mlp", WIDTHS) if arguments.network == "mlp" else None) or images.statistics()
    model = {"vit": vit, "lstm": lstm, "mlp": lambda: Mlp(**WIDTHS)}[arguments.network]()
    batches = [(x, y) for x, y in images.batches(known, 1000) if y is not None]
    train(model, torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]), arguments.epochs)
    print(f"{predict(model, test.batches(known, 500)).accuracy().top1:.2f} % on the test split")
    torch.save(model.state_dict(), arguments.output)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """AdamW on a one-cycle schedule; colour images are flipped and moved."""
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for part in torch.randperm(len(images), generator=generator).split(BATCH)[: steps // epochs]:
            batch = images[part]
            if batch.shape[1] == 3:
                batch = moved(
                    torch.where(torch.rand(len(part), 1, 1, 1) < 0.5, batch.flip(-1), batch), generator
                )
            loss = functional.cross_entropy(model(batch), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}", flush=True)


if __name__ == "__main__":
    main()
