from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from ttcompress.data.opening import open_data
from ttcompress.errors import ArchitectureError
from ttcompress.networks import architectures as models
from ttcompress.networks import factories, zoo
from ttcompress.records.report import Architecture, Preprocessing

MLP = Architecture("zoo", "mlp", {"width0": 784, "width1": 300, "width2": 10})
WIDE = Architecture("zoo", "wide")  # 7.5 GB
ZOO = [Architecture("zoo", name) for name in zoo.ZOO if name not in ("mlp", "wide")] + [MLP]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def without_counters(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def network_file(folder: Path, body: str) -> Path:
    file = folder / "net.py"
    file.write_text("from torch import nn\n" + body)
    return file


def message(error: pytest.ExceptionInfo[ArchitectureError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Parameter counts: He et al. (0.27M, 0.46M), Garipov et al. as counted in NUMBERS.md, the rest by hand.
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet110", 1_727_962),
        ("conv", 555_968 + 1_280),
        ("conv-fc", 554_688 + 8192 * 1536 + 1536 * 512 + 5120 + 10 + 1_280 + 4_096),
        ("lenet5", 61_706),
        ("wide", 3072 * 8**6 + 8**6 * 4**6 + 2 * (8**6 + 4**6) + 40_970),
    ],
)
def test_zoo_parameter_counts(name: str, params: int) -> None:
    assert num_params(models.build(Architecture("zoo", name))) == params


def test_conv_splits_into_weights_and_batch_norm() -> None:
    model = models.build(models.resolve("conv"))
    norm = sum(num_params(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm == 1_280
    assert num_params(model) - norm == 555_968


@pytest.mark.parametrize("architecture", ZOO, ids=lambda architecture: architecture.name)
def test_zoo_forward(architecture: Architecture) -> None:
    known = models.preprocessing(architecture)
    assert known is not None
    assert known.input_size is not None
    model = models.build(architecture, device="cpu")
    assert not model.training
    with torch.no_grad():
        logits = model(torch.randn(2, *known.input_size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_option_a_shortcut_pads_planes_evenly_and_subsamples() -> None:
    block = zoo._BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 2:4], x[:, :, ::2, ::2])
    assert not out[:, [0, 1, 4, 5]].any()


def test_pooling_is_tensorflow_same() -> None:
    x = torch.rand(1, 2, 8, 8)
    padded = F.pad(x, (0, 1, 0, 1), value=-1.0)
    assert torch.equal(zoo.conv().pool2(x), F.max_pool2d(padded, 3, 2))


def test_mlp_pads_28_to_32() -> None:
    model = zoo.Mlp(width0=1024, width1=16, width2=10)
    image = torch.rand(3, 1, 28, 28)
    padded = torch.zeros(3, 1, 32, 32)
    padded[:, :, 2:30, 2:30] = image
    assert torch.equal(model(image), model(padded))


def test_mlp_has_no_relu_at_the_end() -> None:
    model = zoo.Mlp(width0=64, width1=512, width2=512, width3=10)
    x = torch.rand(4, 1, 8, 8)
    hidden = F.relu(model.fc2(F.relu(model.fc1(x.flatten(1)))))
    assert torch.equal(model(x), model.fc3(hidden))


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("architecture", ZOO, ids=lambda architecture: architecture.name)
def test_infer_zoo(architecture: Architecture, counters: bool) -> None:
    shapes = shapes_of(models.build(architecture))
    assert models.infer(shapes if counters else without_counters(shapes)) == architecture


@pytest.mark.parametrize(
    "widths", [(784, 625, 10), (1024, 1024, 10), (64, 512, 512, 10), (784, 10), (784, 300, 100, 50, 26)]
)
def test_infer_mlp_widths(widths: tuple[int, ...]) -> None:
    arguments = {f"width{index}": width for index, width in enumerate(widths)}
    shapes = shapes_of(zoo.Mlp(**arguments))
    assert models.infer(shapes) == Architecture("zoo", "mlp", arguments)
    assert models.resolve("mlp", shapes).arguments == arguments


@pytest.mark.parametrize("name", ["resnet20", "conv", "conv-fc", "lenet5"])
def test_infer_zoo_with_other_classes(name: str) -> None:
    shapes = shapes_of(zoo.ZOO[name](num_classes=100))
    assert models.infer(shapes) == Architecture("zoo", name, {"num_classes": 100})


@pytest.mark.parametrize(
    "name", ["alexnet", "densenet121", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "vgg16"]
)
def test_infer_torchvision(name: str) -> None:
    reference = models.build(Architecture("torchvision", name))
    shapes = without_counters(shapes_of(reference))
    assert models.infer(shapes) == Architecture("torchvision", name)


@pytest.mark.parametrize("name", ["googlenet", "squeezenet1_1", "inception_v3"])
def test_infer_torchvision_with_ten_classes(name: str) -> None:
    shapes = shapes_of(models.build(Architecture("torchvision", name, {"num_classes": 10})))
    architecture = models.infer(shapes)
    assert architecture == Architecture("torchvision", name, {"num_classes": 10})
    assert models.mismatch(shapes, models.build(architecture)) is None


def test_googlenet_with_and_without_auxiliary_heads() -> None:
    shapes = shapes_of(models.build(Architecture("torchvision", "googlenet", {"num_classes": 7})))
    main = {key: shape for key, shape in shapes.items() if not key.startswith("aux")}
    assert len(main) < len(shapes)
    assert models.resolve("googlenet", main).arguments == {"aux_logits": 0, "num_classes": 7}
    assert models.resolve("googlenet", shapes).arguments == {"num_classes": 7}


@pytest.mark.parametrize("name", ["regnet_x_400mf", "resnet18", "vit_b_32", "swin_t", "convnext_tiny"])
def test_meta_build_has_the_keys_and_shapes_of_the_real_one(name: str) -> None:
    model = models.build(Architecture("torchvision", name))
    assert shapes_of(model) == shapes_of(torchvision.models.get_model(name))
    tensors = [(key, value) for key, value in model.state_dict().items() if "num_batches_tracked" not in key]
    assert all(value.is_meta for _, value in tensors)
    assert not model.training


def test_largest_regnet_is_not_materialised() -> None:
    model = models.build(Architecture("torchvision", "regnet_y_128gf"))
    assert num_params(model) == 644_812_894
    assert all(parameter.is_meta for parameter in model.parameters())


def test_meta_build_takes_a_state_dict_without_counters() -> None:
    source = models.build(Architecture("torchvision", "resnet18"), device="cpu")
    state = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}
    model = models.build(Architecture("torchvision", "resnet18"))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert not unexpected
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.to("cpu")(x), source(x))


def test_build_with_wrong_arguments() -> None:
    with pytest.raises(ArchitectureError, match=r"torchvision:resnet18 cannot be constructed") as error:
        models.build(Architecture("torchvision", "resnet18", {"depth": 3}))
    message(error)
    with pytest.raises(ArchitectureError, match=r"unknown architecture 'zoo:resnet21'"):
        models.build(Architecture("zoo", "resnet21"))
    with pytest.raises(ArchitectureError, match=r"reads its widths off"):
        models.build(models.resolve("mlp"))


def test_resolve_names() -> None:
    assert models.resolve("vgg16") == Architecture("torchvision", "vgg16")
    assert models.resolve("zoo:resnet20") == Architecture("zoo", "resnet20")
    assert models.resolve("torchvision:resnet18") == Architecture("torchvision", "resnet18")
    assert models.resolve("lenet5") == Architecture("zoo", "lenet5")
    assert models.resolve("mlp-784-300-10") == models.resolve("zoo:mlp-784-300-10") == MLP


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ("vgg61", "vgg16"),
        ("zoo:resnet18", "resnet"),
        ("timm:resnet81", "resnet18"),
        ("xyzzy", "conv-fc"),
        ("mlp-784-0-10", "mlp"),
        ("mlp-", "mlp"),
    ],
)
def test_resolve_unknown_name(reference: str, named: str) -> None:
    with pytest.raises(ArchitectureError, match=re.escape(f"unknown architecture {reference!r}")) as error:
        models.resolve(reference)
    assert named in message(error)


def test_resolve_fills_in_classes() -> None:
    shapes = shapes_of(torchvision.models.resnet18(num_classes=37))
    assert models.resolve("torchvision:resnet18", shapes).arguments == {"num_classes": 37}


def test_stated_widths_have_to_be_those_of_the_checkpoint() -> None:
    shapes = shapes_of(models.build(MLP))
    assert models.resolve("mlp-784-300-10", shapes) == MLP
    with pytest.raises(
        ArchitectureError, match=r"does not fit the checkpoint: other shapes: fc1\.bias is \(300,\)"
    ):
        models.resolve("mlp-784-200-10", shapes)


def test_resolve_explains_what_does_not_fit() -> None:
    shapes = shapes_of(models.build(Architecture("zoo", "resnet20")))
    shapes["conv1.weight"] = (16, 1, 3, 3)
    shapes["head.weight"] = shapes.pop("linear.weight")
    with pytest.raises(ArchitectureError, match="resnet20 does not fit the checkpoint") as error:
        models.resolve("resnet20", shapes)
    assert message(error).endswith(
        "missing: linear.weight; unexpected: head.weight; "
        "other shapes: conv1.weight is (16, 1, 3, 3), the network has (16, 3, 3, 3)"
    )


def test_mismatch_sorts_and_cuts() -> None:
    problem = models.mismatch({}, nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))))
    assert problem == "missing: 0.bias, 0.weight, 1.bias, 1.weight and 4 more"


def test_two_different_class_counts_do_not_fit() -> None:
    shapes = shapes_of(models.build(Architecture("torchvision", "resnet18", {"num_classes": 10})))
    shapes["fc.bias"] = (11,)
    with pytest.raises(ArchitectureError, match="does not fit"):
        models.resolve("resnet18", shapes)


def test_infer_without_match_names_the_nearest() -> None:
    shapes = shapes_of(models.build(Architecture("zoo", "resnet20")))
    shapes["extra.weight"] = (3, 3)
    del shapes["bn1.bias"]
    with pytest.raises(ArchitectureError, match="no known architecture fits") as error:
        models.infer(shapes)
    text = message(error)
    assert "nearest are zoo:resnet20 (2 keys differ)" in text
    assert "missing: bn1.bias; unexpected: extra.weight" in text
    assert "--arch none" in text
    assert "--arch net.py:build (docs/cli.md" in text


def test_infer_with_several_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ZOO", {"one": zoo.lenet5, "two": zoo.lenet5})
    with pytest.raises(
        ArchitectureError, match="several architectures, zoo:one, zoo:two: choose with --arch"
    ) as error:
        models.infer(shapes_of(zoo.lenet5()))
    message(error)


def test_infer_of_foreign_keys() -> None:
    with pytest.raises(
        ArchitectureError, match=r"has the checkpoint's keys \(tok_embeddings\.weight\)"
    ) as error:
        models.infer({"tok_embeddings.weight": (100, 10)})
    message(error)


def test_factory(tmp_path: Path) -> None:
    file = network_file(tmp_path, "def build():\n    return nn.Linear(3, 2)\n")
    reference = f"{file}:build"
    architecture = models.resolve(reference, {"weight": (2, 3), "bias": (2,)})
    assert architecture == Architecture(
        "factory", "net.py:build", sha256=hashlib.sha256(file.read_bytes()).hexdigest()
    )
    model = models.build(architecture, factories.load_factory(reference))
    assert isinstance(model, nn.Linear)
    assert model.weight.device.type == "cpu"
    assert not model.training
    assert models.preprocessing(architecture) is None


def test_factory_file_may_define_dataclasses(tmp_path: Path) -> None:
    body = (
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Config:\n    width: 'int' = 3\n"
        "def build():\n    return nn.Linear(Config().width, 2)\n"
    )
    reference = f"{network_file(tmp_path, body)}:build"
    assert models.build(models.resolve(reference), factories.load_factory(reference)).in_features == 3


@pytest.mark.parametrize(
    ("body", "name", "complaint"),
    [
        ("def other(): pass\n", "build", r"has no function 'build'; it has other"),
        ("1 / 0\n", "build", r"failed on import: ZeroDivisionError: division by zero"),
        ("def build(:\n", "build", r"failed on import: SyntaxError"),
        (
            "def build():\n    raise ValueError('first\\nsecond')\n",
            "build",
            r"net\.py:build failed: ValueError: first",
        ),
        ("def build(): return 3\n", "build", r"net\.py:build returned a int, it has to return an nn\.Module"),
        ("def build(): return nn.Linear(2, 2)\n", "build", r"net\.py:build does not fit .*unexpected: x"),
    ],
)
def test_factory_errors(tmp_path: Path, body: str, name: str, complaint: str) -> None:
    file = network_file(tmp_path, body)
    with pytest.raises(ArchitectureError, match=complaint) as error:
        models.resolve(f"{file}:{name}", {"x": (1,)})
    message(error)


def test_factory_reference_errors(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"no file .*absent\.py"):
        models.resolve(f"{tmp_path / 'absent.py'}:build")
    with pytest.raises(ArchitectureError, match=r"net\.py names no factory: write path/to/net\.py:factory"):
        models.resolve("net.py")
    with pytest.raises(ArchitectureError, match=r"net\.py:build: pass --arch"):
        models.build(Architecture("factory", "net.py:build"))


def test_preprocessing() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert models.preprocessing(models.resolve("vgg16")) == Preprocessing(*imagenet, (3, 224, 224), 256)
    assert models.preprocessing(models.resolve("inception_v3")) == Preprocessing(
        *imagenet, (3, 299, 299), 342
    )
    assert models.preprocessing(models.resolve("resnet20")) == Preprocessing(*imagenet, (3, 32, 32))
    vit = models.preprocessing(models.resolve("vit_h_14"))
    assert vit is not None
    assert vit.input_size == (3, 518, 518)
    conv = models.preprocessing(models.resolve("conv-fc"))
    assert conv == Preprocessing((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), (3, 32, 32))
    mnist = Preprocessing((0.1307,), (0.3081,), (1, 28, 28))
    assert models.preprocessing(models.resolve("lenet5")) == mnist
    assert models.preprocessing(MLP) == mnist
    assert models.preprocessing(Architecture("zoo", "mlp", {"width0": 64, "width1": 10})) is None


@pytest.mark.parametrize("file", ["resnet20-12fca82f.th", "resnet32-d509ac18.th"])
def test_published_checkpoints_reach_their_accuracy(
    file: str, checkpoints: Path, small_cifar10_root: Path
) -> None:
    stored = torch.load(checkpoints / file, map_location="cpu", weights_only=True)["state_dict"]
    state = {key.removeprefix("module."): value for key, value in stored.items()}
    architecture = models.infer({key: tuple(value.shape) for key, value in state.items()})
    assert architecture == Architecture("zoo", file.split("-")[0])
    model = models.build(architecture)
    model.load_state_dict(state, strict=False, assign=True)
    images = open_data(f"cifar10:{small_cifar10_root}")
    known = models.preprocessing(architecture)
    assert known is not None
    right = 0
    with torch.no_grad():
        for batch, labels in images.batches(known, 125, limit=500):
            assert labels is not None
            right += int((model(batch).argmax(1) == labels).sum())
    assert right / 500 > 0.88
