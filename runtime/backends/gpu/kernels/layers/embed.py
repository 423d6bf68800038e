"""A row's embedding. Legend: see the package."""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK


@triton.jit
def embed_item(
    row,
    token,
    embedding_ptr,
    hidden_ptr,
    norm_ptr,
    scaled_ptr,
    squares_ptr,
    mask_ptr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    MASK: tl.constexpr,
):
    """hidden[:, row] = embedding[token], and the norm's inputs (see `matmul.py`). NP blocks, a power of two.

    Skips an idle row (token -1). The token MASK, if not negative, has its embedding at mask_ptr.
    """
    if token >= 0:
        n_N, b_B = tl.arange(0, NP), tl.arange(0, BLOCK)
        d_NB = n_N[:, None] * BLOCK + b_B[None, :]
        mask_NB = d_NB < D
        x_NB = tl.load(embedding_ptr + token.to(tl.int64) * D + d_NB, mask=mask_NB, other=0.0)
        if MASK >= 0:  # noqa: SIM102
            if token == MASK:
                x_NB = tl.load(mask_ptr + d_NB, mask=mask_NB, other=0.0)
        tl.store(hidden_ptr + d_NB * R + row, x_NB, mask=mask_NB)
        x_NB = x_NB.to(tl.float32)
        scaled_NB = x_NB * tl.load(norm_ptr + d_NB, mask=mask_NB, other=0.0).to(tl.float32)
        at_NB = scaled_ptr + (n_N * (BLOCK * R) + row * BLOCK)[:, None] + b_B[None, :]
        tl.store(at_NB, scaled_NB.to(scaled_ptr.dtype.element_ty), mask=mask_NB)
        tl.store(squares_ptr + n_N * R + row, tl.sum(x_NB * x_NB, axis=1), mask=n_N * BLOCK < D)
