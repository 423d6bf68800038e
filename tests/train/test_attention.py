"""Blockwise attention against transformers' full attention, outputs and gradients."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel
from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import eager_attention_forward

from speedstack.quant.checkpoint import load_model
from speedstack.train.attention import IMPLEMENTATION, blockwise_attention, enable_blockwise_attention

CPU = torch.device("cpu")
# Sums in another order, of at most a few hundred float32 terms near 1.
RTOL, ATOL = 1e-4, 2e-5


def additive_mask(num_tokens: int, window: int | None) -> torch.Tensor:
    mask = torch.zeros(1, 1, num_tokens, num_tokens)
    for query in range(num_tokens):
        for key in range(num_tokens):
            if key > query or (window is not None and key <= query - window):
                mask[..., query, key] = torch.finfo(torch.float32).min
    return mask


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 150])
@pytest.mark.parametrize("window", [None, 1, 40, 64, 100])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_equals_full_attention(num_tokens: int, window: int | None, has_sinks: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, 4, num_tokens, 12), (2, 2, num_tokens, 12), (2, 2, num_tokens, 8))
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    sinks = torch.randn(4, requires_grad=True) if has_sinks else None
    leaves = [q, k, v, *([sinks] if sinks is not None else [])]
    module: Any = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=True)
    expected, _ = eager_attention_forward(module, q, k, v, additive_mask(num_tokens, window), scaling=0.3)
    out = blockwise_attention(q, k, v, sinks, 0.3, window).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=RTOL, atol=ATOL)
    cotangent = torch.randn_like(out)
    for grad, expected_grad in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=RTOL, atol=ATOL)


@pytest.fixture
def tiny_model(tiny_model_dir: Path) -> PreTrainedModel:
    return load_model(tiny_model_dir).train()


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
    )
    return GptOssForCausalLM(config)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mimo", "gpt_oss"])
def test_a_model_computes_the_same_and_saves_the_same(
    family: str, precision: str, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    model = tiny_model if family == "mimo" else gpt_oss()
    ids = torch.randint(0, 96, (2, 80), generator=torch.Generator().manual_seed(1))
    model.set_attn_implementation("eager")

    def loss_and_grads() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [loss, *(grad.norm() for grad in grads if grad is not None)]

    expected = loss_and_grads()
    enable_blockwise_attention(model, CPU)
    # bfloat16 keeps eight bits, and routing may send a token elsewhere: norms agree to a few of its last places.
    rtol, atol = (1e-3, 1e-6) if precision == "float32" else (0.1, 1e-3)
    for value, expected_value in zip(loss_and_grads(), expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=rtol, atol=atol)
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_padding_is_refused(tiny_model: PreTrainedModel) -> None:
    enable_blockwise_attention(tiny_model, CPU)
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="without padding"):
        tiny_model(input_ids=ids, use_cache=False, attention_mask=torch.zeros(1, 1, 8, 8))


def test_other_devices_and_families_are_left_alone(tiny_model: PreTrainedModel) -> None:
    tiny_model.set_attn_implementation("eager")
    enable_blockwise_attention(tiny_model, torch.device("cuda"))
    assert tiny_model.config._attn_implementation == "eager"
