"""The networks of the papers that this tool reproduces, small enough to be defined here."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ttcompress.errors import ArchitectureError
from ttcompress.records.report import Preprocessing

DEFAULT_CLASSES = 10
WIDTH = re.compile(r"[1-9][0-9]{0,11}")

_IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (3, 32, 32))
_CIFAR10 = Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (3, 32, 32))
_MNIST = Preprocessing((0.1307,), (0.3081,), (1, 28, 28))


class _BasicBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.added_planes = planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if not self.added_planes:
            return x
        before = self.added_planes // 2
        return F.pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added_planes - before)
        )


class CifarResNet(nn.Module):
    """ResNet for 32x32 images with parameter-free (option A) shortcuts; He et al. 2016, section 4.2.

    Three stages of 16, 32 and 64 planes with `blocks` blocks each: 6 * blocks + 2 layers.
    Maps (N, 3, 32, 32) to (N, num_classes); keys as in the checkpoints published by Idelbayev.
    """

    def __init__(self, blocks: int, num_classes: int = DEFAULT_CLASSES) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [_BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(_BasicBlock(in_planes, planes, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _conv_layers(last_padding: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (in_planes, planes) in enumerate(pairwise((3, 64, 64, 128, 128, 128, 128)), start=1):
        padding = last_padding if index > 4 else 1
        layers[f"conv{index}"] = nn.Conv2d(in_planes, planes, 3, padding=padding, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(planes)
        layers[f"relu{index}"] = nn.ReLU()
        if index in (2, 4):
            # On even sizes TensorFlow's 'same' pads at the end only, which is ceil_mode and no padding here.
            layers[f"pool{index}"] = nn.MaxPool2d(3, 2, ceil_mode=True)
    return layers


def conv(num_classes: int = DEFAULT_CLASSES) -> nn.Sequential:
    """The `conv` network of Garipov et al. 2016 as in their released code, where the last layer has no bias.

    Maps (N, 3, 32, 32) to (N, num_classes); 555,968 weights and 1,280 of batch normalisation.
    """
    layers = _conv_layers(last_padding=0)
    layers["avgpool"] = nn.AvgPool2d(4)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(128, num_classes, bias=False)
    return nn.Sequential(layers)


def conv_fc(num_classes: int = DEFAULT_CLASSES) -> nn.Sequential:
    """The `conv-fc` network of Garipov et al. 2016 as in their released code, 13.9M parameters.

    Maps (N, 3, 32, 32) to (N, num_classes).
    """
    layers = _conv_layers(last_padding=1)
    layers["flatten"] = nn.Flatten()
    for index, (in_features, features) in enumerate(pairwise((8192, 1536, 512)), start=1):
        layers[f"fc{index}"] = nn.Linear(in_features, features, bias=False)
        layers[f"bn{index + 6}"] = nn.BatchNorm1d(features)
        layers[f"relu{index + 6}"] = nn.ReLU()
    layers["fc3"] = nn.Linear(512, num_classes)
    return nn.Sequential(layers)


def lenet5(num_classes: int = DEFAULT_CLASSES) -> nn.Sequential:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling; maps (N, 1, 28, 28) to (N, num_classes)."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (in_planes, planes, padding) in enumerate(((1, 6, 2), (6, 16, 0)), start=1):
        layers[f"conv{index}"] = nn.Conv2d(in_planes, planes, 5, padding=padding)
        layers[f"relu{index}"] = nn.ReLU()
        layers[f"pool{index}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    for index, (in_features, features) in enumerate(pairwise((400, 120, 84)), start=1):
        layers[f"fc{index}"] = nn.Linear(in_features, features)
        layers[f"relu{index + 2}"] = nn.ReLU()
    layers["fc3"] = nn.Linear(84, num_classes)
    return nn.Sequential(layers)


def wide(num_classes: int = DEFAULT_CLASSES) -> nn.Sequential:
    """The wide and shallow network of Novikov et al. 2015 for CIFAR-10, section 6.2.1: 262,144 hidden units.

    Maps (N, 3, 32, 32) to (N, num_classes). Its first two layers take 7.5 GB dense and are meant to be in TT form.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (in_features, features) in enumerate(pairwise((3072, 8**6, 4**6)), start=1):
        layers[f"fc{index}"] = nn.Linear(in_features, features, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm1d(features)
        layers[f"relu{index}"] = nn.ReLU()
        layers[f"dropout{index}"] = nn.Dropout(0.6)
    layers["fc3"] = nn.Linear(4**6, num_classes)
    return nn.Sequential(layers)


class Mlp(nn.Module):
    """Fully-connected ReLU network with layers fc1 ... fcL; maps (N, ...) with width0 entries each to (N, widthL).

    With 1,024 inputs (Novikov et al. 2015, MNIST) images of 28x28 are zero padded to 32x32 first.

    Raises:
        ArchitectureError: fewer than two widths, or not named width0 ... widthL.
    """

    def __init__(self, **widths: int) -> None:
        super().__init__()
        if len(widths) < 2 or set(widths) != {f"width{index}" for index in range(len(widths))}:
            raise ArchitectureError(
                "zoo:mlp reads its widths off a checkpoint's fc1.weight, ...; without one write mlp-784-300-10"
            )
        sizes = [widths[f"width{index}"] for index in range(len(widths))]
        for index, (in_features, features) in enumerate(pairwise(sizes), start=1):
            self.add_module(f"fc{index}", nn.Linear(in_features, features))
        self.in_features = sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images or vectors."""
        if self.in_features == 1024 and x.shape[-2:] == (28, 28):
            x = F.pad(x, (2, 2, 2, 2))
        x = x.flatten(1)
        *hidden, last = self.children()
        for layer in hidden:
            x = F.relu(layer(x))
        logits: Tensor = last(x)
        return logits


def mlp_widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The arguments of `Mlp` read off the shapes of fc1.weight ... fcL.weight; empty where there are none."""
    weights: list[tuple[int, ...]] = []
    while len(shape := shapes.get(f"fc{len(weights) + 1}.weight", ())) == 2:
        weights.append(shape)
    sizes = [shape[1] for shape in weights[:1]] + [shape[0] for shape in weights]
    return {f"width{index}": size for index, size in enumerate(sizes)}


def named_widths(name: str) -> tuple[str, dict[str, int]]:
    """`mlp-784-300-10` as the name `mlp` and the arguments of `Mlp`; other names as they are, without arguments."""
    network, *sizes = name.split("-")
    if network != "mlp" or not sizes or not all(WIDTH.fullmatch(size) for size in sizes):
        return name, {}
    return network, {f"width{index}": int(size) for index, size in enumerate(sizes)}


ZOO: Mapping[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, (depth - 2) // 6) for depth in (20, 32, 44, 56, 110)},
    "conv": conv,
    "conv-fc": conv_fc,
    "lenet5": lenet5,
    "wide": wide,
    "mlp": Mlp,
}


def zoo_preprocessing(name: str, arguments: Mapping[str, int]) -> Preprocessing | None:
    """Normalisation and input size that the network of this name is trained with; None where it is not fixed."""
    if name.startswith("resnet"):
        # The published CIFAR checkpoints were trained with the statistics of ImageNet.
        return _IMAGENET
    if name in ("conv", "conv-fc", "wide"):
        return _CIFAR10
    takes_mnist = name == "lenet5" or arguments.get("width0") in (784, 1024)
    return _MNIST if takes_mnist else None
