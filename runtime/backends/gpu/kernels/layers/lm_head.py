"""Final norm, LM head, and the best token of each vocabulary tile for every row. Legend: see the package.

All programs add noise to their own logits; `sample` then chooses among the tiles' best. Top-k and top-p need all logits
first: see `logit_histogram`.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.layers.matmul import BLOCK, inverse_rms, multiply
from speedstack.runtime.backends.gpu.kernels.rounds.gumbel import gumbel, row_words
from speedstack.runtime.backends.gpu.kernels.rows import NO_TOKEN, TEMPERATURE, field, is_drawn, is_used


@triton.jit
def lm_head_item(
    tile,
    rows_ptr,
    scaled_ptr,
    squares_ptr,
    w_ptr,
    logits_ptr,
    best_ptr,
    sampling_ptr,
    peaks_ptr,
    scales_ptr,
    num_drawn,
    eps,
    VOCAB: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NP: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8_ROWS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):
    """T logits of every row; per row the largest and its index, ties to the lower, -1 if one is NaN.

    For a row with a temperature (num_drawn of them), the largest of logits / temperature + noise; peaks, float32
    [tiles, R], then gets the largest logits. best is int32 [tiles, 2, R]: float32 bits, and the index. Other
    parameters: see `matmul.py`.
    """
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    first = (tile * T).to(tl.int64)
    logits_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, first, VOCAB - tile * T, D, T, CHUNK, FP8_ROWS
    )  # fmt: skip
    logits_TR *= inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    keep_tile(
        tile, logits_TR, logits_ptr, best_ptr, peaks_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB, R, T, HAS_LOGITS
    )


@triton.jit
def keep_tile(
    tile, logits_TR, logits_ptr, best_ptr, peaks_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, HAS_LOGITS: tl.constexpr = True,
):  # fmt: skip
    """Stores a tile's results (see `lm_head_item`). Without HAS_LOGITS only the largest, without noise."""
    r_R = tl.arange(0, R)
    v_T = (tile * T + tl.arange(0, T)).to(tl.int64)
    valid_T = v_T < VOCAB
    if HAS_LOGITS:
        tl.store(logits_ptr + v_T[:, None] * R + r_R[None, :], logits_TR, mask=valid_T[:, None])
    index_TR = tl.where(valid_T, v_T.to(tl.int32), NO_TOKEN)[:, None]
    is_broken_TR = valid_T[:, None] & (logits_TR != logits_TR)
    known_TR = tl.where(valid_T[:, None] & (logits_TR == logits_TR), logits_TR, float("-inf"))
    largest_R = tl.max(known_TR, axis=0)
    index_TR = tl.where(known_TR == largest_R[None, :], index_TR, NO_TOKEN)
    best_R = tl.min(tl.where(is_broken_TR, -1, index_TR), axis=0)
    if HAS_LOGITS:  # noqa: SIM102
        if num_drawn > 0:
            # Four tokens in different lanes share a draw: read the logits again.
            tl.debug_barrier()
            score_R, index_R = best_scores(tile, rows_ptr, sampling_ptr, logits_ptr, VOCAB, R, T)
            is_drawn_R = is_drawn(sampling_ptr, r_R)
            tl.store(peaks_ptr + tile * R + r_R, largest_R)
            largest_R = tl.where(is_drawn_R, score_R, largest_R)
            best_R = tl.where(is_drawn_R & (best_R >= 0), index_R, best_R)
    at_R = best_ptr + tile * (2 * R) + r_R
    tl.store(at_R, largest_R.to(tl.int32, bitcast=True))
    tl.store(at_R + R, best_R)


@triton.jit
def best_scores(tile, rows_ptr, sampling_ptr, logits_ptr, VOCAB: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Per row, the largest of a tile's logits / temperature + noise and its index, ties to the lower."""
    tl.static_assert(T % 4 == 0)
    r_R = tl.arange(0, R)
    block_B = tile * (T // 4) + tl.arange(0, T // 4)
    temperature_R = field(sampling_ptr, r_R, TEMPERATURE).to(tl.float32, bitcast=True)
    # Results of greedy rows are discarded.
    temperature_R = tl.where(temperature_R > 0.0, temperature_R, 1.0)
    words = row_words(block_B[:, None] + r_R[None, :] * 0, r_R[None, :], rows_ptr, sampling_ptr)
    largest_BR = tl.full((T // 4, R), float("-inf"), tl.float32)
    index_BR = tl.full((T // 4, R), NO_TOKEN, tl.int32)
    for lane in tl.static_range(4):
        v_B = block_B * 4 + lane
        at_BR = logits_ptr + v_B.to(tl.int64)[:, None] * R + r_R[None, :]
        logit_BR = tl.load(at_BR, mask=(v_B < VOCAB)[:, None], other=float("-inf"))
        score_BR = tl.math.div_rn(logit_BR, temperature_R[None, :]) + gumbel(words[lane])
        # If every score is -inf, the first token, as on the host.
        is_better_BR = (score_BR > largest_BR) | ((index_BR == NO_TOKEN) & (v_B < VOCAB)[:, None])
        largest_BR = tl.where(is_better_BR, score_BR, largest_BR)
        index_BR = tl.where(is_better_BR, v_B[:, None], index_BR)
    largest_R = tl.max(largest_BR, axis=0)
    index_R = tl.min(tl.where(largest_BR == largest_R[None, :], index_BR, NO_TOKEN), axis=0)
    return largest_R, index_R
