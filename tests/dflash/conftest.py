"""Small drafters and a tiny random MiMo target shared by the drafter tests."""

from typing import Any

import pytest
import torch

from speedstack.dflash.config import DFlashConfig
from speedstack.dflash.model import DFlashDraftModel


@pytest.fixture
def draft_config() -> DFlashConfig:
    return DFlashConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        mask_token_id=2,
        target_layer_ids=(0, 2),
        num_target_layers=3,
        block_size=4,
    )


@pytest.fixture
def drafter(draft_config: DFlashConfig) -> DFlashDraftModel:
    model = DFlashDraftModel(draft_config)
    model.init_weights(seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def target() -> Any:
    """Random three-layer MiMo; weights large enough that greedy text varies and top logits are far apart."""
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

    torch.manual_seed(0)
    config = MiMoV2FlashConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        v_head_dim=16,
        sliding_window=8,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.3,
    )
    config._attn_implementation = "eager"
    return MiMoV2FlashForCausalLM(config).eval()
