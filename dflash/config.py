"""A drafter's shapes and semantics; `dflash.formats` translates them.

The defaults are z-lab's DFlash. Options, off by default: proposals from the anchor's slot, DSpark's Markov head, a
pruned vocabulary, and MiMo's features (sliding windows, attention sinks, a value scale, partial rotary embedding, its
own mask embedding).

Left out: attention biases, scaled rotary embeddings, activations other than SiLU, DSpark's confidence head, and the
heads and convolutions of DFlash2.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

LayerType = Literal["full_attention", "sliding_attention"]


def default_target_layer_ids(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """z-lab's tapped layers: evenly spaced from 1 to `num_target_layers - 3`; the middle one for a single tap.

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
    """A drafter's shapes and semantics. Raises ValueError for values that cannot make a drafter.

    `target_layer_ids`: id L is the OUTPUT of target layer L (before the final norm), in concatenation order.
    `num_target_layers`: None if a foreign checkpoint does not say.
    `block_size`: the anchor plus `block_size - 1` masked positions.
    `vocab_size`: the target's; the drafter has no embedding or head of its own.

    Options:
    `sample_from_anchor`: slot k predicts the token after it; otherwise its own token, and the anchor's slot 0 nothing.
    `markov_rank`: rank of a head that corrects logits by the previous token (DSpark); 0 for none.
    `draft_vocab_size`: number of target tokens that can be proposed; None for all.
    `layer_types`: per layer; None is full attention. `sliding_attention` sees keys less than `sliding_window` positions
    away, within the block only earlier ones if `sliding_is_causal`.
    `attention_sinks`: a learned softmax logit per head. `attention_value_scale`: factor on all values.
    `partial_rotary_factor`: share of a head's dimensions that rotate.
    `mask_embedding`: masked slots have their own embedding instead of the target's row of `mask_token_id`.
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
    num_target_layers: int | None
    block_size: int = 8
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 2048
    target_sha256: str | None = None
    sample_from_anchor: bool = False
    markov_rank: int = 0
    draft_vocab_size: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    sliding_window: int | None = None
    sliding_is_causal: bool = True
    attention_sinks: bool = False
    attention_value_scale: float = 1.0
    partial_rotary_factor: float = 1.0
    mask_embedding: bool = False

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
            raise ValueError(f"drafter block_size must be at least 2 (anchor and one mask), got {self.block_size}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"drafter mask_token_id {self.mask_token_id} is not in the vocabulary of {self.vocab_size}"
            )
        ids = self.target_layer_ids
        last = max(ids, default=0) if self.num_target_layers is None else self.num_target_layers - 1
        if not ids or len(set(ids)) != len(ids) or not all(0 <= i <= last for i in ids):
            raise ValueError(f"drafter target_layer_ids {list(ids)} must be distinct layers of 0..{last}")
        self._check_options()

    def _check_options(self) -> None:
        if self.markov_rank < 0:
            raise ValueError(f"drafter markov_rank must not be negative, got {self.markov_rank}")
        if self.draft_vocab_size is not None and not 1 <= self.draft_vocab_size < self.vocab_size:
            raise ValueError(
                f"drafter draft_vocab_size {self.draft_vocab_size} must be less than the vocabulary of "
                f"{self.vocab_size}; leave it out for a drafter that proposes any token"
            )
        self._check_windows()
        if not self.attention_value_scale > 0:
            raise ValueError(f"drafter attention_value_scale must be positive, got {self.attention_value_scale}")
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"drafter partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotary_dim} of "
                f"{self.head_dim} dimensions: it must be an even number of them, at least 2"
            )

    def _check_windows(self) -> None:
        kinds = None if self.layer_types is None else tuple(self.layer_types)
        for kind in kinds or ():
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(f"drafter layer type {kind!r} is neither full_attention nor sliding_attention")
        if kinds is not None and len(kinds) != self.num_hidden_layers:
            raise ValueError(f"drafter layer_types names {len(kinds)} layers of {self.num_hidden_layers}")
        if kinds is not None and "sliding_attention" not in kinds:
            kinds = None
        object.__setattr__(self, "layer_types", kinds)
        if kinds is None:
            # Normalized, so that equal drafters have equal configs.
            object.__setattr__(self, "sliding_window", None)
            object.__setattr__(self, "sliding_is_causal", True)
        elif self.sliding_window is None or self.sliding_window < 1:
            raise ValueError(f"drafter sliding_attention layers need a sliding_window, got {self.sliding_window}")

    @property
    def num_taps(self) -> int:
        """Number of target layers concatenated into the context features."""
        return len(self.target_layer_ids)

    @property
    def num_proposals(self) -> int:
        """Tokens proposed per round: one per block slot, except the anchor's if it predicts nothing."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_draft_tokens(self) -> int:
        """Size of the draft vocabulary: columns of `DFlashDraftModel.logits`."""
        return self.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size

    def window(self, layer: int) -> int | None:
        """A drafter layer's sliding window, None for full attention."""
        kinds = self.layer_types
        return self.sliding_window if kinds is not None and kinds[layer] == "sliding_attention" else None

    @property
    def options(self) -> dict[str, object]:
        """Options that differ from their defaults, by name; empty for z-lab's DFlash."""
        names = (field for field in fields(self) if field.name in OPTIONS)
        return {f.name: getattr(self, f.name) for f in names if getattr(self, f.name) != f.default}


# Options beyond z-lab's DFlash. Code that supports fewer refuses the rest by name.
OPTIONS = (
    "sample_from_anchor",
    "markov_rank",
    "draft_vocab_size",
    "layer_types",
    "sliding_window",
    "sliding_is_causal",
    "attention_sinks",
    "attention_value_scale",
    "partial_rotary_factor",
    "mask_embedding",
)
