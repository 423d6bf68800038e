"""What a model is, as far as decoding it goes: shapes and switches of every layer, read from a Hugging Face config.

Backends see a `ModelSpec` and weights, never a transformers class, so a new family is a new reader here and nothing
else. Three families are read: MiMo-V2-Flash (sigmoid router with correction bias, sliding windows with sinks, different
query/key and value head sizes, partial rotary), Qwen3-MoE (softmax router, QK-norm) and gpt-oss (biases, YaRN, clamped
SwiGLU). Any other is refused by name. `config_file` reads shapes that transformers has no class for.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class YarnSpec:
    """YaRN's stretched rotary frequencies (Peng et al. 2023, section 3.4), with every default resolved.

    Frequencies that turn more than `beta_fast` times in `original_length` positions stay, those that turn less than
    `beta_slow` times are divided by `factor`, a ramp lies between. Cosines and sines are multiplied by `magnitude`.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer. Head sizes are in elements; `window` counts the token itself; None attends to all.

    `rotary_dim` is the divisor of the frequencies' exponents; an odd one rotates one dimension more (transformers).
    `ahead`: positions after its own that a row sees, as far as its step has them: none but in a drafter's block.
    """

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    rotary_dim: int
    rope_theta: float
    window: int | None = None
    has_sinks: bool = False
    has_qk_norm: bool = False
    value_scale: float = 1.0
    has_bias: bool = False
    yarn: YarnSpec | None = None
    ahead: int = 0

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5)


@dataclass(frozen=True)
class DenseSpec:
    """A dense SwiGLU."""

    intermediate_size: int


@dataclass(frozen=True)
class MoeSpec:
    """A router and its SwiGLU experts, without shared experts.

    has_bias: the router's logits and both of an expert's projections have biases.
    swiglu_limit: None is silu(gate) * up. Otherwise gpt-oss' variant: the gate is clamped from above and up on both
        sides at the limit, then (up + 1) * gate * sigmoid(swiglu_alpha * gate).
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    scoring: Literal["sigmoid", "softmax"]
    has_correction_bias: bool
    renormalize: bool
    routed_scale: float = 1.0
    has_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    attention: AttentionSpec
    mlp: DenseSpec | MoeSpec


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model: embedding, layers, final norm, LM head."""

    model_type: str
    vocab_size: int
    hidden_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def spec_from_config(config: Any) -> ModelSpec:
    """Reads a transformers config (`PreTrainedConfig`).

    Raises:
        ValueError: the family, or a setting of it, is not one that the runtime computes; the message names it.
    """
    readers = {"gpt_oss": _gpt_oss_layers, "mimo_v2_flash": _mimo_v2_flash_layers, "qwen3_moe": _qwen3_moe_layers}
    if config.model_type not in readers:
        raise ValueError(
            f"the runtime cannot decode model type {config.model_type!r}; it can decode {', '.join(sorted(readers))}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"activation {config.hidden_act!r} is not supported by the runtime, only silu is")
    if config.attention_bias and config.model_type == "mimo_v2_flash":
        raise ValueError("attention_bias=True is not supported by the runtime for mimo_v2_flash")
    eos = config.eos_token_id
    try:
        return ModelSpec(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            layers=readers[config.model_type](config),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"a field of this {config.model_type} configuration must be wrong or is missing: "
            f"{type(error).__name__}: {error}"
        ) from error


def _default_rope(parameters: dict[str, Any], where: str) -> float:
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"rotary type {parameters['rope_type']!r} of {where} is not supported, only 'default' is")
    return float(parameters["rope_theta"])


def _yarn(parameters: dict[str, Any]) -> YarnSpec | None:
    """The stretch of a rotary embedding, None where there is none; defaults as in transformers."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rotary type {kind!r} of attention is not supported, only 'default' and 'yarn' are")
    if parameters.get("mscale") or parameters.get("mscale_all_dim"):
        raise ValueError("mscale of a 'yarn' rotary embedding is not supported by the runtime")
    factor, magnitude = float(parameters["factor"]), parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return YarnSpec(
        factor=factor,
        original_length=parameters["original_max_position_embeddings"],
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=parameters.get("truncate", True),
        magnitude=float(magnitude),
    )


def _gpt_oss_layers(config: Any) -> tuple[LayerSpec, ...]:
    rope = config.rope_parameters
    layers = []
    for attention_type in config.layer_types:
        attention = AttentionSpec(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            qk_head_dim=config.head_dim,
            v_head_dim=config.head_dim,
            rotary_dim=config.head_dim,
            rope_theta=float(rope["rope_theta"]),
            window=config.sliding_window if attention_type == "sliding_attention" else None,
            has_sinks=True,
            has_bias=config.attention_bias,
            yarn=_yarn(rope),
        )
        moe = MoeSpec(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            intermediate_size=config.intermediate_size,
            # The softmax of the chosen logits alone is the softmax of all, renormalized over the chosen.
            scoring="softmax",
            has_correction_bias=False,
            renormalize=True,
            has_bias=True,
            # Releases of transformers whose config lacks the two compute with these numbers.
            swiglu_limit=float(getattr(config, "swiglu_limit", 7.0)),
            swiglu_alpha=float(getattr(config, "swiglu_alpha", 1.702)),
        )
        layers.append(LayerSpec(attention, moe))
    return tuple(layers)


def _mimo_v2_flash_layers(config: Any) -> tuple[LayerSpec, ...]:
    if config.n_group != 1:
        raise ValueError(f"expert groups (n_group={config.n_group}) are not supported by the runtime")
    layers = []
    for attention_type, mlp_type in zip(config.layer_types, config.mlp_layer_types, strict=True):
        is_sliding = attention_type == "sliding_attention"
        rope = config.rope_parameters[attention_type]
        attention = AttentionSpec(
            num_heads=config.num_attention_heads,
            # transformers hard-wires twice the key/value heads on sliding layers
            num_kv_heads=config.num_key_value_heads * (2 if is_sliding else 1),
            qk_head_dim=config.head_dim,
            v_head_dim=config.v_head_dim,
            rotary_dim=int(config.head_dim * rope.get("partial_rotary_factor", 0.334)),
            rope_theta=_default_rope(rope, attention_type),
            window=config.sliding_window if is_sliding else None,
            has_sinks=is_sliding,
            value_scale=1.0 if config.attention_value_scale is None else config.attention_value_scale,
        )
        mlp: DenseSpec | MoeSpec = DenseSpec(config.intermediate_size)
        if mlp_type == "sparse":
            mlp = MoeSpec(
                num_experts=config.n_routed_experts,
                top_k=config.num_experts_per_tok,
                intermediate_size=config.moe_intermediate_size,
                scoring="sigmoid",
                has_correction_bias=True,
                renormalize=config.norm_topk_prob,
                routed_scale=config.routed_scaling_factor,
            )
        layers.append(LayerSpec(attention, mlp))
    return tuple(layers)


def _qwen3_moe_layers(config: Any) -> tuple[LayerSpec, ...]:
    if config.use_sliding_window:
        raise ValueError("use_sliding_window=True is not supported by the runtime for qwen3_moe")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = AttentionSpec(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        rotary_dim=head_dim,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        has_qk_norm=True,
        has_bias=config.attention_bias,
        yarn=_yarn(config.rope_parameters),
    )
    moe = MoeSpec(
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        scoring="softmax",
        has_correction_bias=False,
        renormalize=config.norm_topk_prob,
    )
    layers = []
    for index in range(config.num_hidden_layers):
        is_sparse = index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        layers.append(LayerSpec(attention, moe if is_sparse else DenseSpec(config.intermediate_size)))
    return tuple(layers)
