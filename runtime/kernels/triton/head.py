"""Final norm, LM head and the choice of a token. See the package for the legend.

Sampling is `speedstack.runtime.sampling` without top-k and top-p, which need an order of the whole vocabulary: the same
Philox integers, the same uniform numbers, Gumbel-max. Logarithms may differ in the last bit from PyTorch's.
"""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.products import BLOCK, inverse_rms, multiply
from speedstack.runtime.kernels.triton.rows import POSITION, RECORD, SEED, SEQUENCE, TEMPERATURE, TOKEN, field, is_used

_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def lm_head_item(
    tile,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    logits_ptr,
    best_ptr,
    scales_ptr,
    eps,
    VOCAB: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr,
):
    """T logits of every row; of each row the largest and its index, ties to the lower, -1 if one is not a number.

    best is int32 [tiles, 2, R]: bits of the float32 value, and the index. scaled_ptr, squares_ptr, NP: see
    `products`; scales_ptr, FP8_ROWS: see `products.multiply`.
    """
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    v_T = (tile * T + tl.arange(0, T)).to(tl.int64)
    valid_T = v_T < VOCAB
    logits_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, v_T, valid_T, D, CHUNK, False, FP8_ROWS
    )  # fmt: skip
    logits_TR *= inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    tl.store(logits_ptr + v_T[:, None] * R + r_R[None, :], logits_TR, mask=valid_T[:, None])
    index_TR = tl.where(valid_T, v_T.to(tl.int32), _NONE)[:, None]
    is_broken_TR = valid_T[:, None] & (logits_TR != logits_TR)
    known_TR = tl.where(valid_T[:, None] & (logits_TR == logits_TR), logits_TR, float("-inf"))
    largest_R = tl.max(known_TR, axis=0)
    index_TR = tl.where(known_TR == largest_R[None, :], index_TR, _NONE)
    best_R = tl.min(tl.where(is_broken_TR, -1, index_TR), axis=0)
    at_R = best_ptr + tile * (2 * R) + r_R
    tl.store(at_R, largest_R.to(tl.int32, bitcast=True))
    tl.store(at_R + R, best_R)


@triton.jit
def sample_item(
    row,
    rows_ptr,
    sampling_ptr,
    logits_ptr,
    best_ptr,
    token_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TP: tl.constexpr,
    R: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """token[row]: the largest logit, or with a temperature the largest of logits / temperature + Gumbel noise.

    -1 where a logit is not a number. BLOCKS blocks of four tokens are drawn at a time. TP: TILES as a power of two.
    """
    if field(rows_ptr, row, TOKEN) >= 0:
        t_T = tl.arange(0, TP)
        at_T = best_ptr + t_T * (2 * R) + row
        value_T = tl.load(at_T, mask=t_T < TILES, other=0).to(tl.float32, bitcast=True)
        value_T = tl.where(t_T < TILES, value_T, float("-inf"))
        index_T = tl.load(at_T + R, mask=t_T < TILES, other=_NONE)
        # A tile with what is no number has the index -1, which is the least.
        is_best_T = (value_T == tl.max(value_T, axis=0)) | (index_T < 0)
        token = tl.min(tl.where(is_best_T, index_T, _NONE), axis=0)
        temperature = tl.load(sampling_ptr + row * RECORD + TEMPERATURE).to(tl.float32, bitcast=True)
        if (token >= 0) & (temperature > 0.0):
            token = _gumbel_max(row, rows_ptr, sampling_ptr, logits_ptr, temperature, VOCAB, R, BLOCKS)
        tl.store(token_ptr + row, token)


@triton.jit
def _gumbel_max(
    row, rows_ptr, sampling_ptr, logits_ptr, temperature, VOCAB: tl.constexpr, R: tl.constexpr, BLOCKS: tl.constexpr
):
    record_ptr = sampling_ptr + row * RECORD
    seed_low, seed_high = _word(record_ptr + SEED), _word(record_ptr + SEED + 1)
    sequence_low, sequence_high = _word(record_ptr + SEQUENCE), _word(record_ptr + SEQUENCE + 1)
    position = (field(rows_ptr, row, POSITION) + 1).to(tl.uint32)  # the token's that is chosen
    largest_B = tl.full((BLOCKS,), float("-inf"), tl.float32)
    token_B = tl.full((BLOCKS,), _NONE, tl.int32)
    for start in range(0, (VOCAB + 3) // 4, BLOCKS):
        block_B = start + tl.arange(0, BLOCKS)
        words = uniform_words(block_B, position, sequence_low, sequence_high, seed_low, seed_high)
        for lane in tl.static_range(4):
            v_B = block_B * 4 + lane
            logit_B = tl.load(logits_ptr + v_B.to(tl.int64) * R + row, mask=v_B < VOCAB, other=float("-inf"))
            uniform_B = ((words[lane] >> 9).to(tl.float32) + 0.5) * (2.0**-23)
            score_B = tl.math.div_rn(logit_B, temperature) - tl.log(-tl.log(uniform_B))
            is_larger_B = score_B > largest_B
            largest_B = tl.where(is_larger_B, score_B, largest_B)
            token_B = tl.where(is_larger_B, v_B, token_B)
    largest = tl.max(largest_B, axis=0)
    token = tl.min(tl.where(largest_B == largest, token_B, _NONE), axis=0)
    # Where every score is -inf none is larger than what there was before: the first of them, as for the host.
    return tl.where(token == _NONE, 0, token)


@triton.jit
def uniform_words(block_B, position, sequence_low, sequence_high, seed_low, seed_high):
    """Four uint32 words a block of four tokens: Philox4x32-10 of (block, position, sequence), keyed by the seed."""
    c0_B = block_B.to(tl.uint32)
    zero_B = c0_B * 0
    c1_B, c2_B, c3_B = zero_B + position, zero_B + sequence_low, zero_B + sequence_high
    k0, k1 = seed_low, seed_high
    return tl.philox_impl(c0_B, c1_B, c2_B, c3_B, k0, k1)


@triton.jit
def _word(ptr):
    return tl.load(ptr).to(tl.uint32, bitcast=True)
