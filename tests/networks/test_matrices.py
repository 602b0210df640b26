"""Checkpoints without an architecture: names round-trip exactly, matrices become layers, nothing is copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ttcompress.networks.matrices import Weights
from ttcompress.networks.stored import stored_tensors, tied_parameters
from ttcompress.planning.planner import make_plan
from ttcompress.recipe import Recipe

ODD_NAMES = (
    "", "weight", ".weight", "a..weight", "a.", "training", "forward.weight", "a.training.weight", "x y/z.weight",
    "[0].weight", "*.weight", "h.weight.weight", "ü.weight", "_parameters.weight", "a", "a.weight", "a.bias",
)  # fmt: skip
TENSORS = {
    "fc.weight": torch.randn(6, 4),
    "fc.bias": torch.randn(6),
    "transposed.weight": torch.randn(4, 6).bfloat16(),
    "transposed.bias": torch.randn(6),
    "norm.weight": torch.ones(4),
    "conv.weight": torch.randn(4, 3, 2, 2),
    "scalar": torch.tensor(2.0),
    "empty.weight": torch.empty(0, 4),
    "narrow.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "packed.weight": torch.ones(4, 4, dtype=torch.int32),
    "bn.running_var": torch.ones(3),
    "bn.num_batches_tracked": torch.tensor(3),
}


def same_memory(ours: Tensor, theirs: Tensor) -> bool:
    return ours.data_ptr() == theirs.data_ptr() and ours.dtype == theirs.dtype and ours.shape == theirs.shape


def test_names_and_memory_are_those_of_the_checkpoint() -> None:
    tensors = {
        **TENSORS,
        **{name: torch.randn(3, 2) for name in ODD_NAMES if name != "a.bias"},
        "a.bias": torch.ones(3),
    }
    model = Weights(tensors)
    assert model.state_dict().keys() == tensors.keys() == stored_tensors(model, tensors).keys()
    assert all(same_memory(value, tensors[name]) for name, value in model.state_dict().items())


def test_matrices_are_layers_with_the_bias_that_fits() -> None:
    layers = {
        name: module for name, module in Weights(TENSORS).named_modules() if isinstance(module, nn.Linear)
    }
    assert layers.keys() == {"fc", "transposed"}
    assert (layers["fc"].in_features, layers["fc"].out_features) == (4, 6)
    assert layers["fc"].bias is not None
    assert layers["transposed"].bias is None


def test_what_counts_as_a_parameter() -> None:
    parameters = dict(Weights(TENSORS).named_parameters())
    assert TENSORS.keys() - parameters.keys() == {"packed.weight", "bn.running_var", "bn.num_batches_tracked"}


def test_every_kept_parameter_has_its_reason() -> None:
    plan = make_plan(
        Weights({**TENSORS, "big.weight": torch.randn(32, 32)}), Recipe(ranks=1, include=("big",))
    )
    assert [layer.fqn for layer in plan.layers] == ["big"]
    assert {kept.name: kept.reason for kept in plan.kept} == {
        "fc.weight": "not selected",
        "fc.bias": "bias",
        "transposed.weight": "not selected",
        "transposed.bias": "bias",
        "norm.weight": "a vector",
        "conv.weight": "not selected",
        "scalar": "a number",
        "empty.weight": "empty",
        "narrow.weight": "float8_e4m3fn",
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens", "embedding"),
        ("embeddings.word_embeddings", "embedding"),
        ("transformer.wte", "embedding"),
        ("tok_embeddings", "embedding"),
        ("shared", "embedding"),
        ("lm_head", "output layer"),
        ("output", "output layer"),
        ("classifier", "output layer"),
        ("model.layers.0.mlp.gate", "router"),
        ("model.layers.0.input_layernorm", "norm"),
        ("bert.embeddings.LayerNorm", "embedding"),
        ("model.layers.0.mlp.gate_proj", ""),
        ("model.layers.0.self_attn.o_proj", ""),
        ("encoder.layer.0.attention.output.dense", ""),
        ("h.0.attn.c_attn", ""),
        ("classifier.0", ""),
        ("blocks.0.mlp.fc1", ""),
    ],
)
def test_default_candidates(name: str, kind: str) -> None:
    left_out = Weights({f"{name}.weight": torch.ones(2, 2)}).left_out()
    assert left_out == ({name: f"{kind} by its name"} if kind else {})


def test_tied_matrices_are_one_layer_and_are_stored_once() -> None:
    table = torch.randn(32, 32)
    tensors = {
        "a.weight": table,
        "b.weight": table.view(32, 32),
        "c.weight": table.T,
        "d.weight": torch.randn(32, 32),
    }
    model = Weights(tensors)
    assert tied_parameters(model) == {"b.weight": "a.weight"}
    assert stored_tensors(model, tensors).keys() == tensors.keys() - {"b.weight"}
    plan = make_plan(model, Recipe(ranks=1))
    assert [layer.fqn for layer in plan.layers] == ["a", "c", "d"]
    assert plan.params_before == 3 * 1024


def test_a_layer_whose_name_is_a_pattern_can_be_named() -> None:
    model = Weights({"h[0].weight": torch.randn(32, 32), "h.weight": torch.randn(32, 32)})
    assert [layer.fqn for layer in make_plan(model, Recipe(ranks=1, include=("h[0]",))).layers] == ["h[0]"]


def test_weights_of_any_name_and_of_up_to_five_axes() -> None:
    shapes = {
        "conv.weight": (8, 4, 3, 3), "conv.bias": (8,), "speech.weight": (8, 4, 5), "video.weight": (4, 8, 3, 3, 3),
        "attention.in_proj_weight": (96, 32), "attention.out_proj.weight": (32, 32), "attention.out_proj.bias": (32,),
        "lstm.weight_ih_l0": (64, 32), "lstm.weight_hr_l0": (32, 64), "lstm.bias_ih_l0": (64,), "tokens": (1, 8, 8),
        "mask.bias": (1, 1, 16, 16), "cls": (1, 1, 8), "six.weight": (2,) * 6, "gain.weight": (8, 1, 1),
    }  # fmt: skip
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    model = Weights(tensors)
    assert model.state_dict().keys() == tensors.keys()
    plan = make_plan(model, Recipe(ranks=1, conv_ranks=1, include=("*",)))
    found = {layer.weight_name: (layer.spec.kind, layer.spec.view_shape) for layer in plan.layers}
    assert found == {
        name: ("linear" if name.startswith("attention.out") else "weight", shapes[name])
        for name in ("conv.weight", "speech.weight", "video.weight", "attention.in_proj_weight",
                     "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hr_l0", "tokens")
    }  # fmt: skip
    reasons = {kept.name: kept.reason for kept in plan.kept}
    assert reasons["mask.bias"] == "bias"
    assert reasons["cls"] == reasons["gain.weight"] == "a vector"
    assert reasons["six.weight"] == "6-d, no weight"
