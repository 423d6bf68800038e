"""Shape of a DFlash drafter, and its translation to and from z-lab's config.json.

The JSON is the one z-lab publishes (a Qwen3 config with `block_size` and `dflash_config`), so that vLLM, SGLang and
z-lab's own loader read what is written here, and their checkpoints load here. One key is ours, `target_sha256`: the
SHA-256 of the target's weights the drafter was trained for. Other loaders ignore it.

Left out, and refused rather than ignored: attention biases, scaled rotary embeddings, sliding-window or causal drafter
layers, activations other than SiLU, and the DFlash2 heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURE = "DFlashDraftModel"


def default_target_layer_ids(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """The layers z-lab taps: evenly spaced from 1 to `num_target_layers - 3`; the middle one for a single tap.

    Source: z-lab's DFlash reference. Small targets can give repeated ids, which raise ValueError.
    """
    if num_taps == 1:
        return (num_target_layers // 2,)
    first, last = 1, num_target_layers - 3
    ids = tuple(round(first + i * (last - first) / (num_taps - 1)) for i in range(num_taps))
    if len(set(ids)) != num_taps or last < first:
        raise ValueError(f"{num_target_layers} layers have no {num_taps} evenly spaced taps; name target_layer_ids")
    return ids


@dataclass(frozen=True)
class DFlashConfig:
    """Everything that fixes a drafter's shapes and semantics.

    `target_layer_ids`: id L is the OUTPUT of target layer L (before the final norm), in the order of concatenation.
    `block_size`: the anchor plus `block_size - 1` masked positions; a round proposes `block_size - 1` tokens.
    `vocab_size` is the target's: the drafter has no embedding and no head of its own.
    Raises ValueError for values that cannot make a drafter.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    block_size: int = 8
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 2048
    target_sha256: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layer_ids", tuple(self.target_layer_ids))
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"drafter {name} must be at least 1, got {getattr(self, name)}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"drafter num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"drafter head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.block_size < 2:
            raise ValueError(f"drafter block_size must be at least 2 (anchor and one proposal), got {self.block_size}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"drafter mask_token_id {self.mask_token_id} is not in the vocabulary of {self.vocab_size}"
            )
        ids = self.target_layer_ids
        if not ids or len(set(ids)) != len(ids) or not all(0 <= i < self.num_target_layers for i in ids):
            raise ValueError(
                f"drafter target_layer_ids {list(ids)} must be distinct layers of 0..{self.num_target_layers - 1}"
            )

    @property
    def num_taps(self) -> int:
        """Number of target layers whose outputs are concatenated into the context features."""
        return len(self.target_layer_ids)

    @property
    def num_proposals(self) -> int:
        """Tokens proposed a round: every block position but the anchor."""
        return self.block_size - 1

    def to_json(self, dtype: str) -> dict[str, Any]:
        """The z-lab config.json as a dict; `dtype` names the stored tensors' dtype, such as "bfloat16"."""
        return {
            "architectures": [ARCHITECTURE],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "block_size": self.block_size,
            "dflash_config": {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)},
            "dtype": dtype,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "max_window_layers": self.num_hidden_layers,
            "model_type": "qwen3",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "target_sha256": self.target_sha256,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DFlashConfig:
        """Read a z-lab config.json. Raises ValueError naming the key that is missing or not supported."""
        nested = raw.get("dflash_config") or {}
        if not isinstance(nested, Mapping):
            raise ValueError("drafter config.json: dflash_config must be an object")
        _refuse_unsupported(raw, nested)

        def value(name: str, *, default: Any = None) -> Any:
            found = nested.get(name, raw.get(name, default))
            if found is None:
                raise ValueError(f"drafter config.json lacks {name}")
            return found

        def integer(name: str, *, default: int | None = None) -> int:
            found = value(name, default=default)
            if isinstance(found, bool) or not isinstance(found, int):
                raise ValueError(f"drafter config.json: {name} must be an integer, got {found!r}")
            return found

        rope = raw.get("rope_parameters") or {}
        hidden_size, num_heads = integer("hidden_size"), integer("num_attention_heads")
        return cls(
            hidden_size=hidden_size,
            intermediate_size=integer("intermediate_size"),
            num_hidden_layers=integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=integer("num_key_value_heads"),
            head_dim=integer("head_dim", default=hidden_size // num_heads),
            vocab_size=integer("vocab_size"),
            mask_token_id=integer("mask_token_id"),
            target_layer_ids=tuple(value("target_layer_ids")),
            num_target_layers=integer("num_target_layers"),
            block_size=integer("block_size"),
            rms_norm_eps=float(value("rms_norm_eps")),
            rope_theta=float(rope.get("rope_theta") or value("rope_theta")),
            max_position_embeddings=integer("max_position_embeddings"),
            target_sha256=raw.get("target_sha256"),
        )


def _refuse_unsupported(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> None:
    """Raise ValueError when the config asks for something this implementation would silently compute otherwise."""
    rope = raw.get("rope_parameters") or {}
    unsupported = {
        "architectures": ARCHITECTURE not in (raw.get("architectures") or []),
        "attention_bias": bool(raw.get("attention_bias")),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "rope_scaling": bool(raw.get("rope_scaling")),
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "layer_types": any(kind != "full_attention" for kind in raw.get("layer_types") or []),
        "is_causal": bool(nested.get("is_causal", raw.get("is_causal", False))),
        "use_swa": bool(nested.get("use_swa", False)),
        "use_sliding_window": bool(raw.get("use_sliding_window")),
        "sample_from_anchor": bool(nested.get("sample_from_anchor", raw.get("sample_from_anchor", False))),
        "partial_rotary_factor": any(place.get("partial_rotary_factor", 1.0) != 1.0 for place in (rope, raw, nested)),
        "attention_value_scale": any(place.get("attention_value_scale", 1.0) != 1.0 for place in (raw, nested)),
        "input_embedding_scale": nested.get("input_embedding_scale", 1.0) != 1.0,
        "output_multiplier": nested.get("output_multiplier", 1.0) != 1.0,
        "final_logit_softcapping": bool(nested.get("final_logit_softcapping")),
    }
    for name, refused in unsupported.items():
        if refused:
            found = nested.get(name, raw.get(name))
            raise ValueError(f"drafter config.json: {name} = {found!r} is not supported by this drafter")
