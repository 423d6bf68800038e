"""Builds programs for the CPU kernels: the layers of a target or a drafter as operations.

Legend: D hidden, F dense intermediate, E experts, K choices a row, R rank of a Markov head, V vocabulary, U draft
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speedstack.runtime.backends.cpu.packed_layout import LANES, Panels, panels
from speedstack.runtime.backends.cpu.program import (
    ARGMAX,
    ATTENTION,
    CHOOSE,
    EMBED,
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    GATE_UP,
    LINEAR,
    LM_HEAD,
    MARKOV,
    QKV,
    ROUTER,
    Program,
)
from speedstack.runtime.model.kv_ring import MAX_ROWS, POSITIONS_PER_BLOCK, ring_length
from speedstack.runtime.model.rope import rotary_tables
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, MoeSpec
from speedstack.runtime.model.weights import AttentionWeights, DenseWeights, LayerWeights, Linear, MoeWeights

UNBOUNDED = 1 << 30  # as many positions as there are


@dataclass
class Buffers:
    """Activations of up to MAX_ROWS rows of one model, [MAX_ROWS, width]."""

    hidden: torch.Tensor
    router: torch.Tensor
    query: torch.Tensor
    attended: torch.Tensor
    dense: torch.Tensor
    expert: torch.Tensor
    choice: torch.Tensor
    choice_weight: torch.Tensor
    context: torch.Tensor
    logits: torch.Tensor
    best: torch.Tensor
    probability: torch.Tensor

    @classmethod
    def of(cls, hidden_size: int, layers: Sequence[LayerSpec], num_tokens: int) -> "Buffers":
        """Buffers wide enough for every layer and for logits of `num_tokens`."""

        def rows(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(MAX_ROWS, width, dtype=dtype)

        attentions = [layer.attention for layer in layers]
        moes = [layer.mlp for layer in layers if isinstance(layer.mlp, MoeSpec)]
        dense = [layer.mlp.intermediate_size for layer in layers if isinstance(layer.mlp, DenseSpec)]
        choices = max((m.top_k for m in moes), default=0)
        return cls(
            hidden=rows(hidden_size),
            router=rows(max((-(-m.num_experts // LANES) * LANES for m in moes), default=0)),
            query=rows(max(a.num_heads * a.qk_head_dim for a in attentions)),
            attended=rows(max(a.num_heads * a.v_head_dim for a in attentions)),
            dense=rows(max(dense, default=0)),
            expert=rows(max((m.top_k * m.intermediate_size for m in moes), default=0)),
            choice=rows(choices, torch.int32),
            choice_weight=rows(choices),
            context=rows(hidden_size),
            logits=rows(-(-num_tokens // LANES) * LANES),
            best=torch.zeros(MAX_ROWS, dtype=torch.int32),
            probability=torch.zeros(MAX_ROWS),
        )


class Assembler:
    """Appends a model's operations to `program`; `caches` collects its key/value rings in `kv_dtype`.

    to_int8: attention and dense MLPs in eight bits (see `panels`).
    """

    def __init__(
        self,
        program: Program,
        buffers: Buffers,
        num_slots: int,
        max_length: int,
        to_int8: bool = False,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.program, self.buffers, self._to_int8, self._kv_dtype = program, buffers, to_int8, kv_dtype
        self.caches: list[torch.Tensor] = []
        self._num_slots, self._max_length = num_slots, max_length

    def new_cache(self, spec: AttentionSpec, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Keys, values and number of blocks of a ring of `length` positions for every slot."""
        blocks = length // POSITIONS_PER_BLOCK
        slots = (self._num_slots, spec.num_kv_heads)
        keys = torch.zeros(*slots, blocks, spec.qk_head_dim, LANES, dtype=self._kv_dtype)
        values = torch.zeros(*slots, length, spec.v_head_dim, dtype=self._kv_dtype)
        self.caches += [keys, values]
        return keys, values, blocks

    def add_qkv(
        self,
        norm_D: torch.Tensor,
        projection_OD: Linear,
        weights: AttentionWeights,
        spec: AttentionSpec,
        eps: float,
        cache: tuple[torch.Tensor, torch.Tensor, int],
        has_queries: bool,
    ) -> None:
        """Norm, projections, rotary embedding and cache append, of hidden states or a drafter's context."""
        b, (keys, values, blocks) = self.buffers, cache
        # A ring may be shorter than the text; a drafter's is longer by a block.
        cos, sin = rotary_tables(spec, max(blocks * POSITIONS_PER_BLOCK, self._max_length), keys.device)
        heads = spec.num_heads if has_queries else 0
        self.program.add(
            QKV,
            [
                *(norm_D.shape[0], heads, spec.num_kv_heads, spec.qk_head_dim, spec.v_head_dim),
                *(2 * cos.shape[-1], blocks, int(keys.dtype == torch.bfloat16)),
            ],
            [eps, spec.value_scale],
            [
                b.hidden if has_queries else b.context,
                norm_D,
                panels(projection_OD, to_int8=self._to_int8),
                b.query,
                keys,
                values,
                weights.q_norm_H,
                weights.k_norm_H,
                cos.contiguous(),
                sin.contiguous(),
                weights.qkv_bias_O,
            ],
        )

    def add_attention(
        self,
        weights: AttentionWeights,
        spec: AttentionSpec,
        cache: tuple[torch.Tensor, torch.Tensor, int],
        reach: int = UNBOUNDED,
    ) -> None:
        """Attention over a cache, and the output projection added to the hidden states.

        A row sees its window up to the end that the step gives it, and at most `reach` later positions.
        """
        b, (keys, values, blocks) = self.buffers, cache
        self.program.add(
            ATTENTION,
            [
                *(spec.num_heads, spec.num_kv_heads, spec.qk_head_dim, spec.v_head_dim),
                *(blocks, spec.window or 0, reach, int(keys.dtype == torch.bfloat16)),
            ],
            [spec.softmax_scale],
            [b.query, keys, values, weights.sinks_N, b.attended],
        )
        D, width = weights.output_DO.shape
        output_panels = panels(weights.output_DO, to_int8=self._to_int8)
        output: list[torch.Tensor | Panels | None] = [b.attended, output_panels, b.hidden]
        self.program.add(LINEAR, [width, D, 1, 0], (), [*output, None, weights.output_bias_D])

    def add_embedding(
        self, embedding_VD: torch.Tensor, mask_token: int = 0, mask_embedding_D: torch.Tensor | None = None
    ) -> None:
        """Rows of the table, float32 or bfloat16; `mask_token` may have its own vector."""
        is_bfloat16 = int(embedding_VD.dtype == torch.bfloat16)
        sizes = [embedding_VD.shape[1], mask_token, is_bfloat16]
        self.program.add(EMBED, sizes, (), [embedding_VD, self.buffers.hidden, mask_embedding_D])

    def add_layer(self, layer: LayerWeights, spec: LayerSpec, eps: float) -> None:
        """A layer of the target; a drafter may tap its last operation."""
        self.program.part = "attention"
        cache = self.new_cache(spec.attention, ring_length(spec.attention.window, self._max_length))
        a = layer.attention
        self.add_qkv(a.norm_D, a.qkv_OD, a, spec.attention, eps, cache, has_queries=True)
        self.add_attention(a, spec.attention, cache)
        if isinstance(layer.mlp, DenseWeights):
            self.program.part = "dense MLP"
            self.add_dense(layer.mlp, eps)
        else:
            assert isinstance(spec.mlp, MoeSpec)
            self.add_moe(layer.mlp, spec.mlp, eps)

    def add_dense(self, mlp: DenseWeights, eps: float) -> None:
        """Norm and SwiGLU, added to the hidden states."""
        b, (D, F) = self.buffers, mlp.down_DF.shape
        gate_up = panels(mlp.gate_up_FD, is_gate_up=True, to_int8=self._to_int8)
        down = panels(mlp.down_DF, to_int8=self._to_int8)
        self.program.add(GATE_UP, [D, F], [eps], [b.hidden, mlp.norm_D, gate_up, b.dense])
        self.program.add(LINEAR, [F, D, 1], (), [b.dense, down, b.hidden])

    def add_moe(self, mlp: MoeWeights, spec: MoeSpec, eps: float) -> None:
        """Norm, router and the chosen experts, added to the hidden states."""
        b, D, E, K = self.buffers, mlp.norm_D.shape[0], spec.num_experts, spec.top_k
        size = spec.intermediate_size
        self.program.part = "norms and router"
        router: list[torch.Tensor | Panels | None] = [b.hidden, mlp.norm_D, panels(mlp.router_ED), b.router]
        self.program.add(ROUTER, [D, E], [eps], [*router, mlp.router_bias_E])
        self.program.add(
            CHOOSE,
            [E, K, int(spec.scoring == "softmax"), int(spec.renormalize)],
            [spec.routed_scale],
            [b.router, mlp.correction_bias_E, b.choice, b.choice_weight],
        )
        gate_up, down = panels(mlp.gate_up_EID, is_gate_up=True), panels(mlp.down_EDI)
        self.program.part = "experts"
        limit = spec.swiglu_limit
        self.program.add(
            EXPERT_GATE_UP,
            [D, size, E, K, int(limit is not None)],
            [eps, limit or 0.0, spec.swiglu_alpha],
            [b.hidden, mlp.norm_D, gate_up, b.choice, b.expert, mlp.gate_up_bias_EI],
        )
        tensors: list[torch.Tensor | Panels | None] = [b.expert, b.hidden, down, b.choice, b.choice_weight]
        self.program.add(EXPERT_DOWN, [size, D, E, K], (), [*tensors, None, mlp.down_bias_ED])

    def add_head(self, norm_D: torch.Tensor, head: Panels, eps: float) -> None:
        """Final norm and LM head of the rows whose logits are wanted."""
        b = self.buffers
        self.program.add(LM_HEAD, [norm_D.shape[0], b.logits.shape[1]], [eps], [b.hidden, norm_D, head, b.logits])

    def add_best(self, num_tokens: int, with_probability: bool = False, first: int = 0, step: int = 1) -> None:
        """Argmax of `num_tokens` logits, for every `step`th wanted row from `first`, and its probability."""
        b = self.buffers
        probability = b.probability if with_probability else None
        self.program.add(ARGMAX, [num_tokens, b.logits.shape[1], first, step], (), [b.logits, b.best, probability])

    def add_markov(
        self,
        w1_VR: torch.Tensor,
        w2: Panels,
        target_ids_U: torch.Tensor | None,
        depth: int,
        num_drafts: int,
        first_slot: int,
    ) -> None:
        """A Markov head's correction of the logits at `depth` of every block, from the best token one depth before.

        Blocks have `num_drafts` wanted rows, the first `first_slot` rows after the anchor's. `target_ids_U`: int32 ids
        of a pruned vocabulary, else None.
        """
        b = self.buffers
        sizes = [w1_VR.shape[1], b.logits.shape[1], depth, num_drafts, first_slot]
        self.program.add(MARKOV, sizes, (), [w1_VR, w2, b.logits, b.best, target_ids_U])
