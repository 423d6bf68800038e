"""Blockwise attention against transformers' full attention, outputs and gradients."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mimo_v2_flash.modeling_mimo_v2_flash import eager_attention_forward

from speedstack.quant.checkpoint import load_model
from speedstack.train.core.attention import IMPLEMENTATION, blockwise_attention, enable_blockwise_attention

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


@pytest.mark.parametrize("sink", [0.0, -4.0, -8.0])
def test_gradients_in_bfloat16_are_as_good_as_transformers(sink: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 200, 16), (1, 2, 200, 16), (1, 2, 200, 16), (1, 4, 200, 16))
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    sinks = torch.full((4,), sink)

    def gradients(dtype: torch.dtype, is_blockwise: bool) -> list[torch.Tensor]:
        q, k, v, cotangent = (tensor.to(dtype) for tensor in tensors)
        leaves = [q, k, v, sinks.to(torch.float64 if dtype == torch.float64 else torch.float32)]
        for leaf in leaves:
            leaf.requires_grad_(True)
        if is_blockwise:
            out = blockwise_attention(q, k, v, leaves[3], 0.25, 128).transpose(1, 2)
        else:
            module: Any = SimpleNamespace(num_key_value_groups=2, sinks=leaves[3].to(dtype), training=True)
            out, _ = eager_attention_forward(module, q, k, v, additive_mask(200, 128).to(dtype), scaling=0.25)
        return list(torch.autograd.grad(out, leaves, cotangent.transpose(1, 2)))

    exact = gradients(torch.float64, is_blockwise=False)
    for ours, theirs, true in zip(
        gradients(torch.bfloat16, True), gradients(torch.bfloat16, False), exact, strict=True
    ):
        error, their_error = (((value.double() - true).norm() / true.norm()).item() for value in (ours, theirs))
        # Eight bits each: one may be luckier than the other, none may be several times as far off.
        assert error < 2 * their_error + 2**-9


def test_padding_packing_and_dropout_are_refused(tiny_model: PreTrainedModel) -> None:
    enable_blockwise_attention(tiny_model, CPU)
    ids = torch.zeros(1, 8, dtype=torch.long)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    tiny_model(input_ids=ids, use_cache=False, attention_mask=torch.ones_like(padding))
    for refused in ({"attention_mask": padding}, {"position_ids": documents}):
        with pytest.raises(ValueError, match="without padding, packing"):
            tiny_model(input_ids=ids, use_cache=False, **refused)
    q, k, v = torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="3 queries, 4 keys"):
        blockwise_attention(q, k, v, None, 1.0, None)
    with pytest.raises(ValueError, match="window 0"):
        blockwise_attention(k, k, v, None, 1.0, 0)


def test_other_devices_families_and_dropout_are_left_alone(
    tiny_model: PreTrainedModel, make_tiny_model: Callable[..., PreTrainedModel]
) -> None:
    tiny_model.set_attn_implementation("eager")
    enable_blockwise_attention(tiny_model, torch.device("cuda"))
    assert tiny_model.config._attn_implementation == "eager"
    dropping = make_tiny_model(attention_dropout=0.1)
    enable_blockwise_attention(dropping, CPU)
    assert dropping.config._attn_implementation == "eager"
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=2
    )
    other = Qwen3MoeForCausalLM(config)
    enable_blockwise_attention(other, CPU)
    assert other.config._attn_implementation != IMPLEMENTATION
