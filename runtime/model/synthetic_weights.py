"""Weights with a model's shapes, uninitialized or random, for compiling and timing kernels.

On the meta device they take no memory. Random weights are drawn in place, packed experts as bytes, so a model may fill
the device's memory.

Legend: D hidden, O qkv rows, N heads, H head dim, F dense intermediate, E experts, I expert intermediate, V vocabulary.
"""

import math
from typing import Any

import torch

from speedstack.quant.fp8 import ELEMENT_DTYPE, TILE_SIZE, FP8Tensor, joined
from speedstack.quant.mxfp4 import BLOCK_SIZE, MXFP4Tensor
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, ModelSpec, MoeSpec
from speedstack.runtime.model.weights import (
    AttentionWeights,
    DenseWeights,
    LayerWeights,
    Linear,
    ModelWeights,
    MoeWeights,
    Weight,
)


def empty_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, is_packed: bool, has_fp8: bool = False
) -> ModelWeights:
    """Uninitialized weights in `dtype`; routers are float32.

    is_packed: experts in MXFP4. has_fp8: attention, dense MLPs and LM head in FP8.
    """
    shapes = _Shapes(spec.hidden_size, dtype, device, is_packed, has_fp8)
    D, V = spec.hidden_size, spec.vocab_size
    layers = [
        LayerWeights(
            shapes.attention(layer.attention),
            shapes.dense(layer.mlp) if isinstance(layer.mlp, DenseSpec) else shapes.moe(layer.mlp),
        )
        for layer in spec.layers
    ]
    return ModelWeights(spec, shapes.plain(V, D), layers, shapes.plain(D), shapes.linear(V, columns=D))


def random_weights(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, is_packed: bool, seed: int = 0, has_fp8: bool = False
) -> ModelWeights:
    """Like `empty_weights`, with values that keep activations near one and tokens distinct.

    Embeddings are normal. Matrices are normal with variance 1 / columns; those that add to the hidden state are also
    divided by twice the number of layers, as in GPT-2. A token's embedding then dominates its hidden state, so routing
    is nearly independent and uniform: the number of active experts is an upper bound for text. Packed experts have
    uniform codes under two scales with the same variance.
    """
    weights = empty_weights(spec, dtype, device, is_packed, has_fp8)
    filler = _Filler(torch.Generator(device).manual_seed(seed), (2 * spec.num_layers) ** -0.5)
    for owner in (weights, *(part for layer in weights.layers for part in (layer.attention, layer.mlp))):
        for name, value in vars(owner).items():
            filler.fill(name, value)
    return weights


_E2M1_RMS = (68.5 / 8) ** 0.5  # of the eight magnitudes
_E4M3_DEVIATION = 64.0  # of normal elements: a seventh of the largest
_ADDS_TO_HIDDEN = ("output_DO", "down_DF", "down_EDI")


class _Filler:
    def __init__(self, generator: torch.Generator, residual_scale: float) -> None:
        self.generator, self.residual_scale = generator, residual_scale

    def fill(self, name: str, value: Any) -> None:
        """Draws a weight's values in place; other values stay."""
        if isinstance(value, MXFP4Tensor):
            exponent = math.log2(self.deviation(name, value) / _E2M1_RMS)
            value.codes.random_(0, 256, generator=self.generator)
            # An equal mix of 2**e and 2**(e - 1) has 0.625 times the variance of 2**e.
            largest = 127 + round(exponent - math.log2(0.625) / 2)
            value.scales.random_(largest - 1, largest + 1, generator=self.generator)
        elif isinstance(value, FP8Tensor):
            for codes_RI in value.codes_OI.split(1024):
                normal_RI = torch.empty(codes_RI.shape, device=codes_RI.device).normal_(generator=self.generator)
                codes_RI.copy_((normal_RI * _E4M3_DEVIATION).clamp_(-448, 448))
            scale = self.deviation(name, value) / _E4M3_DEVIATION
            value.scales_PQ.uniform_(0.8 * scale, 1.2 * scale, generator=self.generator)
        elif isinstance(value, torch.Tensor):
            if "norm" in name:
                value.uniform_(0.8, 1.2, generator=self.generator)
            else:
                value.normal_(0.0, self.deviation(name, value), generator=self.generator)

    def deviation(self, name: str, value: Weight | FP8Tensor) -> float:
        if name == "embedding_VD":
            return 1.0
        if "bias" in name or "sinks" in name:
            return 0.02
        return value.shape[-1] ** -0.5 * (self.residual_scale if name in _ADDS_TO_HIDDEN else 1.0)


class _Shapes:
    def __init__(
        self, hidden_size: int, dtype: torch.dtype, device: torch.device, is_packed: bool, has_fp8: bool
    ) -> None:
        self.D, self.dtype, self.device, self.is_packed, self.has_fp8 = hidden_size, dtype, device, is_packed, has_fp8

    def plain(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def linear(self, *rows: int, columns: int) -> Linear:
        """Joined matrices with these numbers of rows."""
        if not self.has_fp8:
            return self.plain(sum(rows), columns)
        tiles = -(-columns // TILE_SIZE)
        parts = []
        for num_rows in rows:
            codes = self.plain(num_rows, columns, dtype=ELEMENT_DTYPE)
            parts.append(FP8Tensor(codes, self.plain(-(-num_rows // TILE_SIZE), tiles, dtype=torch.float32)))
        return joined(parts)

    def expert(self, *shape: int) -> Weight:
        if not self.is_packed:
            return self.plain(*shape)
        codes = self.plain(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
        return MXFP4Tensor(codes, self.plain(*shape[:-1], shape[-1] // BLOCK_SIZE, dtype=torch.uint8))

    def attention(self, a: AttentionSpec) -> AttentionWeights:
        sizes = a.num_heads * a.qk_head_dim, a.num_kv_heads * a.qk_head_dim, a.num_kv_heads * a.v_head_dim
        return AttentionWeights(
            norm_D=self.plain(self.D),
            qkv_OD=self.linear(*sizes, columns=self.D),
            output_DO=self.linear(self.D, columns=a.num_heads * a.v_head_dim),
            q_norm_H=self.plain(a.qk_head_dim) if a.has_qk_norm else None,
            k_norm_H=self.plain(a.qk_head_dim) if a.has_qk_norm else None,
            sinks_N=self.plain(a.num_heads) if a.has_sinks else None,
            qkv_bias_O=self.plain(sum(sizes)) if a.has_bias else None,
            output_bias_D=self.plain(self.D) if a.has_bias else None,
        )

    def dense(self, mlp: DenseSpec) -> DenseWeights:
        F = mlp.intermediate_size
        return DenseWeights(
            self.plain(self.D), self.linear(F, F, columns=self.D), self.linear(self.D, columns=F)
        )  # fmt: skip

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
