"""A model's spec: shapes and switches of every layer.

Backends see a `ModelSpec` and weights, never a transformers class, so a new family only needs a file in `families`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class YarnSpec:
    """YaRN's stretched rotary frequencies (Peng et al. 2023, section 3.4), with every default resolved.

    Frequencies with more than `beta_fast` turns in `original_length` positions stay, those with fewer than `beta_slow`
    are divided by `factor`, with a ramp between. Cosines and sines are multiplied by `magnitude`.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer. `window` counts the token itself; None attends to all positions.

    `rotary_dim` divides the frequencies' exponents; if odd, one more dimension rotates (transformers). `ahead`: later
    positions of its step that a row sees, nonzero only in a drafter's block.
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

    has_bias: of the router and both expert projections.
    swiglu_limit: None is silu(gate) * up. Otherwise gpt-oss' variant: the gate clamped from above and up on both sides,
    then (up + 1) * gate * sigmoid(swiglu_alpha * gate).
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
