"""Tiny random models of the families we name, all sizes multiples of 32, every parameter random."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
LATENT_ATTENTION = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
GROUPED_ROUTER = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": COMMON | LATENT_ATTENTION | GROUPED_ROUTER | {"moe_intermediate_size": 32, "n_routed_experts": 4},
    "deepseek_v3": COMMON | LATENT_ATTENTION | GROUPED_ROUTER | {"moe_intermediate_size": 32, "n_routed_experts": 4},
    "deepseek_v4": COMMON
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 4,
        "hc_mult": 2,
        "sliding_window": 8,
        "max_position_embeddings": 128,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
    },
    "glm4_moe": COMMON | GROUPED_ROUTER | {"moe_intermediate_size": 32, "n_routed_experts": 4, "head_dim": 32},
    "gpt_oss": COMMON | {"num_local_experts": 4, "head_dim": 32},
    "minimax_m2": COMMON | {"num_local_experts": 4, "head_dim": 32},
    "mixtral": COMMON | {"num_local_experts": 4},
    "olmoe": COMMON | {"num_experts": 4},
    "qwen2_moe": COMMON | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4},
    "qwen3_moe": COMMON
    | {
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "head_dim": 32,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(scope="session")
def make_family(make_tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`make_family(model_type, **overrides)`: a float32 model in eval mode; the same weights at every call.

    `overrides` replace single fields of its configuration.
    """

    def make(model_type: str, **overrides: Any) -> PreTrainedModel:
        if model_type == "mimo_v2_flash":
            return make_tiny_model(**overrides)
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(FAMILIES[model_type] | overrides)))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2, generator=generator)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0.0, 0.1, generator=generator)
        model.set_experts_implementation("grouped_mm")
        return model.eval()

    return make
