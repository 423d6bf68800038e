"""Fake-quantized experts inside transformers models of three layouts, and what happens to models without them."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from speedstack.quant.experts import (
    contraction_last,
    enable_autocast,
    enable_fake_quant,
    expert_parameters,
    routed_experts,
    weight_names,
)
from speedstack.quant.mxfp4 import ScaleRule, dequantize, quantize
from speedstack.quant.ptq import round_to_nearest

FAMILIES = ["mimo_v2_flash", "qwen3_moe", "gpt_oss"]


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, make_family: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return make_family(request.param)


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    return model(input_ids=ids).logits


@pytest.mark.parametrize("scale_rule", ["even", "floor"])
def test_forward_equals_model_with_rounded_weights(model: PreTrainedModel, scale_rule: ScaleRule) -> None:
    """What training sees is what post-training quantization stores, to the bit; and off, the old model is back."""
    rounded = copy.deepcopy(model)
    round_to_nearest(rounded, scale_rule)
    with torch.no_grad():
        before = logits(model)
        enable_fake_quant(model, scale_rule)
        assert torch.equal(logits(model), logits(rounded))
        assert not torch.equal(before, logits(model))
        enable_autocast(model)
        assert torch.equal(logits(model), before)


def test_gradients_reach_the_masters(model: PreTrainedModel) -> None:
    """The straight-through gradient of a master is the gradient of the rounded weight."""
    rounded = copy.deepcopy(model)
    round_to_nearest(rounded)
    enable_fake_quant(model)
    for each in (model, rounded):
        logits(each).square().mean().backward()
    for (name, parameter), reference in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if parameter.grad is not None and reference.grad is not None:
            assert torch.equal(parameter.grad, reference.grad), name
    for name, parameter in expert_parameters(model).items():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_state_dict_is_untouched(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    enable_fake_quant(model)
    with torch.no_grad():
        logits(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_only_routed_experts_are_rounded(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_to_nearest(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(expert_parameters(model))
    for module_name, module in routed_experts(model).items():
        for weight_name in weight_names(module):
            weight = contraction_last(module, getattr(module, weight_name))
            expected = dequantize(quantize(contraction_last(module, before[f"{module_name}.{weight_name}"])))
            assert torch.equal(weight, expected)


def test_rounding_is_along_the_contraction_axis(make_family: Callable[[str], PreTrainedModel]) -> None:
    """gate_up_proj [E, 2I, H] contracts over H, and gpt-oss' [E, H, 2I] too: one large element spoils its own block."""
    for model, axis in ((make_family("mimo_v2_flash"), 2), (make_family("gpt_oss"), 1)):
        weight = next(
            parameter for name, parameter in expert_parameters(model).items() if name.endswith("gate_up_proj")
        )
        with torch.no_grad():
            weight.fill_(0.01)
            weight[0, 0, 0] = 1e3
        round_to_nearest(model)
        vanished = (weight == 0).nonzero()
        assert len(vanished) == 31
        assert vanished[:, 3 - axis].unique().tolist() == [0] and vanished[:, axis].max() == 31


def test_autocast_matches_bfloat16_weights(model: PreTrainedModel) -> None:
    """Under bf16 autocast the FP32 masters act as bf16 ones, with the same MXFP4 values: no second rounding."""
    enable_fake_quant(model)
    module = next(iter(routed_experts(model).values()))
    half = copy.deepcopy(module).bfloat16()
    for weight_name in weight_names(module):
        master = contraction_last(module, getattr(module, weight_name))
        value = dequantize(quantize(master)).bfloat16()
        getattr(half, weight_name).data.copy_(contraction_last(module, value))
    hidden_states = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    top_k_index = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3], [3, 1], [2, 0]])
    top_k_weights = torch.full((6, 2), 0.5)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(hidden_states, top_k_index, top_k_weights)
        expected = half(hidden_states.bfloat16(), top_k_index, top_k_weights)
    assert out.dtype == torch.float32
    if not module.has_bias:  # a float32 bias is added in float32, a bfloat16 one is not
        assert torch.equal(out.bfloat16(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(hidden_states, top_k_index, top_k_weights).sum().backward()
    for weight_name in weight_names(module):
        grad = getattr(module, weight_name).grad
        assert grad.dtype == torch.float32 and grad.abs().sum() > 0


def test_enable_autocast_changes_nothing_without_autocast(model: PreTrainedModel) -> None:
    with torch.no_grad():
        before = logits(model)
        enable_autocast(model)
        assert torch.equal(logits(model), before)


def test_float16_autocast_is_refused(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    enable_fake_quant(model)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="use bfloat16 autocast"):
        logits(model)


def test_teacher_and_student_differ(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    """The rule belongs to one model: a full-precision copy and one with another rule are not affected."""
    teacher, student, other = make_tiny_model(), make_tiny_model(), make_tiny_model()
    with torch.no_grad():
        before = logits(teacher)
        enable_fake_quant(student, "even")
        enable_fake_quant(other, "floor")
        assert torch.equal(logits(teacher), before)
        assert not torch.equal(logits(student), logits(other))


def test_import_registers_nothing() -> None:
    check = (
        "import speedstack.quant.experts, transformers.integrations.moe as moe; "
        "print(sorted(n for n in moe.ALL_EXPERTS_FUNCTIONS if 'mxfp4' in n or 'autocast' in n))"
    )
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_registered_name_says_the_rule(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    enable_fake_quant(model, "rceil")
    assert model.config._experts_implementation == "mxfp4_qat_rceil"
    assert "mxfp4_qat_rceil" in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("function", [enable_fake_quant, enable_autocast, round_to_nearest, expert_parameters])
def test_models_without_routed_experts(function: Callable[[nn.Module], object]) -> None:
    dense = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no fused routed experts"):
        function(dense)


@pytest.mark.parametrize("function", [enable_fake_quant, round_to_nearest, expert_parameters])
def test_experts_that_bypass_the_registry(function: Callable[[nn.Module], object]) -> None:
    config = Llama4TextConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_local_experts=2,
        interleave_moe_layer_step=1,
    )
    with pytest.raises(ValueError, match=r"Llama4TextExperts \(model\.layers\.0\..*\) bypasses transformers' experts"):
        function(Llama4ForCausalLM(config))


def test_sizes_and_rules_are_checked_when_enabling(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = make_tiny_model()
    with pytest.raises(ValueError, match="unknown scale rule 'best'"):
        enable_fake_quant(model, "best")  # type: ignore[arg-type]
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match=r"multiple of 32, got shape \(48,\)"):
        enable_fake_quant(make_tiny_model(moe_intermediate_size=48))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        enable_fake_quant(model.half())


def test_rounding_names_the_bad_weight(make_tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: nn.Module = make_tiny_model()
    with torch.no_grad():
        expert_parameters(model)["model.layers.2.mlp.experts.down_proj"][3, 1, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.experts\.down_proj: cannot quantize NaN"):
        round_to_nearest(model)
