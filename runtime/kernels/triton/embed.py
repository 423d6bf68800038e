"""A row's embedding. See the package for the legend."""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.rows import TOKEN, field


@triton.jit
def embed_item(row, rows_ptr, embedding_ptr, hidden_ptr, D: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr):
    """hidden[:, row] = embedding[token of row]."""
    token = field(rows_ptr, row, TOKEN)
    if token >= 0:
        for start in range(0, D, CHUNK):
            d_B = start + tl.arange(0, CHUNK)
            x_B = tl.load(embedding_ptr + token.to(tl.int64) * D + d_B, mask=d_B < D)
            tl.store(hidden_ptr + d_B * R + row, x_B, mask=d_B < D)
