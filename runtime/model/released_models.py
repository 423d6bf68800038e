"""Released models by name, as transformers configs, and tiny models of the same families.

Sources: config.json of openai/gpt-oss-20b, Qwen/Qwen3-30B-A3B and XiaomiMiMo/MiMo-V2-Flash. Everything that decides a
shape or a result is written out, because defaults change between transformers releases.
"""

from typing import Any

from speedstack.dflash.config import DFlashConfig
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import ModelSpec

MODELS = ("gpt-oss-20b", "mimo-v2-flash", "qwen3-30b-a3b")
# Not a release: Qwen3-30B-A3B scaled down for CPUs, still larger than their caches.
LAPTOP_MODEL = "qwen3-moe-1b"
MIMO_GLOBAL_LAYERS = (0, 5, 11, 17, 23, 29, 35, 41, 47)


def released_config(model: str, num_layers: int | None = None) -> Any:
    """The transformers config of a released model or LAPTOP_MODEL, cut to `num_layers` if given.

    Raises ValueError, with the known names, for an unknown model.
    """
    return _config(model, _REAL, num_layers)


def tiny_config(model: str, num_layers: int | None = None) -> Any:
    """The same family with all its ingredients in two or three layers, too small to fill a kernel tile.

    Raises ValueError as `released_config`.
    """
    return _config(model, _TINY, num_layers)


def released_spec(model: str) -> ModelSpec:
    """A released model's shapes. Raises ValueError as `released_config`."""
    return spec_from_config(released_config(model))


def drafter_config(spec: ModelSpec) -> DFlashConfig:
    """A two-layer DFlash drafter for these shapes, with the target's heads; it taps the first and last layer."""
    attention, last = spec.layers[-1].attention, len(spec.layers) - 1
    return DFlashConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=3 * spec.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.v_head_dim,
        vocab_size=spec.vocab_size,
        mask_token_id=spec.vocab_size - 1,
        target_layer_ids=tuple(sorted({0, last})),
        num_target_layers=len(spec.layers),
        block_size=5,
        rms_norm_eps=spec.rms_norm_eps,
        rope_theta=1e4,
    )


def _config(model: str, fields: dict[str, dict[str, Any]], num_layers: int | None) -> Any:
    if model not in fields:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(fields)}")
    from transformers import GptOssConfig, MiMoV2FlashConfig, Qwen3MoeConfig

    kinds = {
        "gpt-oss-20b": GptOssConfig,
        "mimo-v2-flash": MiMoV2FlashConfig,
        "qwen3-30b-a3b": Qwen3MoeConfig,
        LAPTOP_MODEL: Qwen3MoeConfig,
    }
    chosen = dict(fields[model])
    if num_layers is not None:
        assert 1 <= num_layers <= chosen["num_hidden_layers"]
        chosen["num_hidden_layers"] = num_layers
        for name in ("layer_types", "mlp_layer_types"):
            if name in chosen:
                chosen[name] = chosen[name][:num_layers]
    return kinds[model](**chosen)  # type: ignore[operator]


def _mimo_rope(factor: float) -> dict[str, dict[str, Any]]:
    kinds = {"full_attention": 5e6, "sliding_attention": 1e4}
    return {
        kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
        for kind, theta in kinds.items()
    }


def _yarn(original_length: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": original_length,
    }


_REAL: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_parameters": _yarn(4096),
        "max_position_embeddings": 131072,
    },
    "mimo-v2-flash": {
        "vocab_size": 152576,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 48,
        "layer_types": [
            "full_attention" if layer in MIMO_GLOBAL_LAYERS else "sliding_attention" for layer in range(48)
        ],
        "mlp_layer_types": ["dense"] + ["sparse"] * 47,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 192,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        # The file says 128, without the token itself.
        "sliding_window": 129,
        "rope_parameters": _mimo_rope(0.334),
        "attention_value_scale": 0.707,
        "norm_topk_prob": True,
        "max_position_embeddings": 262144,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 40960,
    },
    LAPTOP_MODEL: {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 384,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 4096,
    },
}

# Hidden sizes are multiples of an MXFP4 block; the rest is odd on purpose: three heads a group, five experts.
_TINY: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "vocab_size": 70,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "rope_parameters": _yarn(32),
        "max_position_embeddings": 1024,
    },
    "mimo-v2-flash": {
        "vocab_size": 70,
        "hidden_size": 96,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "v_head_dim": 20,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "sliding_window": 9,
        "rope_parameters": _mimo_rope(0.334),
        "attention_value_scale": 0.707,
        "norm_topk_prob": True,
        "max_position_embeddings": 1024,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 70,
        "hidden_size": 96,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "max_position_embeddings": 1024,
    },
}
