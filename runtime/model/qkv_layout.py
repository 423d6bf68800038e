"""Layout of qkv projections for the kernels: rows grouped by key/value head.

Legend: O rows, I columns, P and Q the tiles of a scale.
"""

import math

import torch

from speedstack.quant.fp8 import FP8Tensor
from speedstack.runtime.model.spec import AttentionSpec


def grouped_fp8_qkv(weight: FP8Tensor, spec: AttentionSpec, columns: int) -> FP8Tensor:
    """`grouped_qkv` for FP8. Tiles get as few rows as keep each inside one tile of `weight`."""
    tile_rows = math.gcd(weight.tile_rows, spec.qk_head_dim, spec.v_head_dim, columns)
    codes = grouped_qkv(weight.codes_OI.view(torch.uint8), spec, columns).view(weight.codes_OI.dtype)
    scales = grouped_qkv(weight.with_tile_rows(1).scales_PQ, spec, columns)[::tile_rows]
    return FP8Tensor(codes, scales.contiguous(), tile_rows)


def grouped_qkv(weight_OD: torch.Tensor, spec: AttentionSpec, columns: int) -> torch.Tensor:
    """Rows of a qkv projection or bias by key/value head: its queries, key, value, then zeros up to `columns`."""
    sizes = [
        spec.num_heads * spec.qk_head_dim,
        spec.num_kv_heads * spec.qk_head_dim,
        spec.num_kv_heads * spec.v_head_dim,
    ]
    parts = [part.unflatten(0, (spec.num_kv_heads, -1)) for part in weight_OD.split(sizes)]
    grouped = torch.cat(parts, dim=1)
    padding = grouped.new_zeros(spec.num_kv_heads, columns - grouped.shape[1], *grouped.shape[2:])
    return torch.cat([grouped, padding], dim=1).flatten(0, 1).contiguous()
