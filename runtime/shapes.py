"""Weights of a model's shapes without their values: what a plan's kernels are built and compiled for.

On the meta device they take no memory, so that kernels of a model of any size can be compiled anywhere; on a GPU they
hold whatever lies there until someone fills them.

Legend: D hidden, O qkv rows, N heads, H head dim, F dense intermediate, E experts, I expert intermediate, V vocabulary.
"""

import torch

from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor
from speedstack.runtime.spec import AttentionSpec, DenseSpec, ModelSpec, MoeSpec
from speedstack.runtime.weights import AttentionWeights, DenseWeights, LayerWeights, ModelWeights, MoeWeights, Weight


def empty_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device, is_packed: bool) -> ModelWeights:
    """Uninitialized weights. is_packed: experts in MXFP4; else in `dtype`, as all the rest but the routers is."""
    shapes = _Shapes(spec.hidden_size, dtype, device, is_packed)
    D, V = spec.hidden_size, spec.vocab_size
    layers = [
        LayerWeights(
            shapes.attention(layer.attention),
            shapes.dense(layer.mlp) if isinstance(layer.mlp, DenseSpec) else shapes.moe(layer.mlp),
        )
        for layer in spec.layers
    ]
    return ModelWeights(spec, shapes.plain(V, D), layers, shapes.plain(D), shapes.plain(V, D))


class _Shapes:
    def __init__(self, hidden_size: int, dtype: torch.dtype, device: torch.device, is_packed: bool) -> None:
        self.D, self.dtype, self.device, self.is_packed = hidden_size, dtype, device, is_packed

    def plain(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def expert(self, *shape: int) -> Weight:
        if not self.is_packed:
            return self.plain(*shape)
        codes = self.plain(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
        return MXFP4Tensor(codes, self.plain(*shape[:-1], shape[-1] // BLOCK_SIZE, dtype=torch.uint8))

    def attention(self, a: AttentionSpec) -> AttentionWeights:
        rows = a.num_heads * a.qk_head_dim + a.num_kv_heads * (a.qk_head_dim + a.v_head_dim)
        return AttentionWeights(
            norm_D=self.plain(self.D),
            qkv_OD=self.plain(rows, self.D),
            output_DO=self.plain(self.D, a.num_heads * a.v_head_dim),
            q_norm_H=self.plain(a.qk_head_dim) if a.has_qk_norm else None,
            k_norm_H=self.plain(a.qk_head_dim) if a.has_qk_norm else None,
            sinks_N=self.plain(a.num_heads) if a.has_sinks else None,
            qkv_bias_O=self.plain(rows) if a.has_bias else None,
            output_bias_D=self.plain(self.D) if a.has_bias else None,
        )

    def dense(self, mlp: DenseSpec) -> DenseWeights:
        F = mlp.intermediate_size
        return DenseWeights(self.plain(self.D), self.plain(2 * F, self.D), self.plain(self.D, F))

    def moe(self, moe: MoeSpec) -> MoeWeights:
        E, I, wide = moe.num_experts, moe.intermediate_size, torch.float32  # noqa: E741
        return MoeWeights(
            norm_D=self.plain(self.D),
            router_ED=self.plain(E, self.D, dtype=wide),
            correction_bias_E=self.plain(E, dtype=wide) if moe.has_correction_bias else None,
            gate_up_EID=self.expert(E, 2 * I, self.D),
            down_EDI=self.expert(E, self.D, I),
            router_bias_E=self.plain(E, dtype=wide) if moe.has_bias else None,
            gate_up_bias_EI=self.plain(E, 2 * I) if moe.has_bias else None,
            down_bias_ED=self.plain(E, self.D) if moe.has_bias else None,
        )
