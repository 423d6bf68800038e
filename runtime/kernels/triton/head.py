"""Final norm, LM head and the choice of a token, as `speedstack.runtime.sampling` defines it: Gumbel-max, after top-k
and top-p. See the package for the legend.

Noise is added where the logits are, by all programs; a row's token is then chosen among the best of each tile. Only a
row that top-k or top-p cuts is looked at again, by one program (see `cut`): which tokens it keeps is not known before
all its logits are.
"""

import triton
import triton.language as tl

from speedstack.runtime.kernels.triton.cut import draw, find_edge
from speedstack.runtime.kernels.triton.noise import gumbel, row_words
from speedstack.runtime.kernels.triton.products import BLOCK, inverse_rms, multiply
from speedstack.runtime.kernels.triton.rows import NO_TOKEN, TEMPERATURE, TOKEN, field, is_cut, is_drawn_whole, is_used


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
    """T logits of every row; of each row the largest and its index, ties to the lower, -1 if one is not a number.

    Of a row whose token is drawn among all, the largest of logits / temperature + noise; num_drawn such rows there are.
    best is int32 [tiles, 2, R]: bits of the float32 value, and the index. scaled_ptr, squares_ptr, NP: see
    `products`; scales_ptr, FP8_ROWS: see `products.multiply`.
    """
    r_R = tl.arange(0, R)
    valid_R = is_used(rows_ptr, R)
    first = (tile * T).to(tl.int64)
    logits_TR = multiply(
        scaled_ptr, BLOCK * R, r_R * BLOCK, valid_R, w_ptr, scales_ptr, first, VOCAB - tile * T, D, T, CHUNK, FP8_ROWS
    )  # fmt: skip
    logits_TR *= inverse_rms(squares_ptr, valid_R, eps, D, R, NP)[None, :]
    keep_tile(tile, logits_TR, logits_ptr, best_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB, R, T, HAS_LOGITS)


@triton.jit
def keep_tile(
    tile, logits_TR, logits_ptr, best_ptr, rows_ptr, sampling_ptr, num_drawn, VOCAB: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, HAS_LOGITS: tl.constexpr = True,
):  # fmt: skip
    """What is kept of a tile's logits: see `lm_head_item`. Without HAS_LOGITS the largest alone, and no noise."""
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
            # Four tokens share a draw, and lie in different lanes: the logits are read again.
            tl.debug_barrier()
            score_R, index_R = best_scores(tile, rows_ptr, sampling_ptr, logits_ptr, VOCAB, R, T)
            is_drawn_R = is_drawn_whole(sampling_ptr, r_R, VOCAB)
            largest_R = tl.where(is_drawn_R, score_R, largest_R)
            best_R = tl.where(is_drawn_R & (best_R >= 0), index_R, best_R)
    at_R = best_ptr + tile * (2 * R) + r_R
    tl.store(at_R, largest_R.to(tl.int32, bitcast=True))
    tl.store(at_R + R, best_R)


@triton.jit
def best_scores(tile, rows_ptr, sampling_ptr, logits_ptr, VOCAB: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """Of a tile's logits / temperature + noise, the largest of each row and its index, ties to the lower."""
    tl.static_assert(T % 4 == 0)
    r_R = tl.arange(0, R)
    block_B = tile * (T // 4) + tl.arange(0, T // 4)
    temperature_R = field(sampling_ptr, r_R, TEMPERATURE).to(tl.float32, bitcast=True)
    # Of rows that are not drawn nothing is kept.
    temperature_R = tl.where(temperature_R > 0.0, temperature_R, 1.0)
    words = row_words(block_B[:, None] + r_R[None, :] * 0, r_R[None, :], rows_ptr, sampling_ptr)
    largest_BR = tl.full((T // 4, R), float("-inf"), tl.float32)
    index_BR = tl.full((T // 4, R), NO_TOKEN, tl.int32)
    for lane in tl.static_range(4):
        v_B = block_B * 4 + lane
        at_BR = logits_ptr + v_B.to(tl.int64)[:, None] * R + r_R[None, :]
        logit_BR = tl.load(at_BR, mask=(v_B < VOCAB)[:, None], other=float("-inf"))
        score_BR = tl.math.div_rn(logit_BR, temperature_R[None, :]) + gumbel(words[lane])
        # Where every score is -inf the first of them, as for the host.
        is_better_BR = (score_BR > largest_BR) | ((index_BR == NO_TOKEN) & (v_B < VOCAB)[:, None])
        largest_BR = tl.where(is_better_BR, score_BR, largest_BR)
        index_BR = tl.where(is_better_BR, v_B[:, None], index_BR)
    largest_R = tl.max(largest_BR, axis=0)
    index_R = tl.min(tl.where(largest_BR == largest_R[None, :], index_BR, NO_TOKEN), axis=0)
    return largest_R, index_R


@triton.jit
def sample_item(
    row,
    rows_ptr,
    sampling_ptr,
    logits_ptr,
    best_ptr,
    candidates_ptr,
    token_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """token[row]: the best of all TILES tiles' or, with top-k or top-p, of the tokens that these keep.

    -1 where a logit is not a number. C: tiles, and tokens, at a time.
    """
    if field(rows_ptr, row, TOKEN) >= 0:
        value_C = tl.full((C,), float("-inf"), tl.float32)
        index_C, least_C = tl.full((C,), NO_TOKEN, tl.int32), tl.full((C,), NO_TOKEN, tl.int32)
        for start in range(0, TILES, C):
            tile_C = start + tl.arange(0, C)
            at_C = best_ptr + tile_C * (2 * R) + row
            best_C = tl.load(at_C, mask=tile_C < TILES, other=0).to(tl.float32, bitcast=True)
            place_C = tl.load(at_C + R, mask=tile_C < TILES, other=NO_TOKEN)
            is_better_C = (tile_C < TILES) & ((best_C > value_C) | (index_C == NO_TOKEN))
            value_C = tl.where(is_better_C, best_C, value_C)
            index_C = tl.where(is_better_C, place_C, index_C)
            least_C = tl.minimum(least_C, place_C)
        value = tl.max(value_C, axis=0)
        token = tl.min(tl.where(value_C == value, index_C, NO_TOKEN), axis=0)
        # A tile with what is no number has the index -1.
        token = tl.where(tl.min(least_C, axis=0) < 0, -1, token)
        has_temperature = field(sampling_ptr, row, TEMPERATURE) > 0
        if (token >= 0) & has_temperature & is_cut(sampling_ptr, row, VOCAB):
            tokens_ptr = candidates_ptr + row * (3 * VOCAB + TILES)
            count, edge = find_edge(row, value, sampling_ptr, logits_ptr, best_ptr, tokens_ptr, VOCAB, TILES, T, R, C)
            token = draw(row, rows_ptr, sampling_ptr, tokens_ptr, count, edge, VOCAB, C)
        tl.store(token_ptr + row, token)
