"""The token after a row (`speedstack.runtime.rounds.sampling`): Gumbel-max after top-k and top-p.

`lm_head` has added noise and kept each tile's best token, which top-k or top-p may drop. A tile is scanned again only
if its best token is dropped, beats the best kept token, and the tile has a kept token. The expected number of dropped
tokens that beat it is the ratio of dropped to kept mass.

Legend: see the package; C tiles, or tokens, at a time.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.rounds.gumbel import gumbel, row_words
from speedstack.runtime.backends.gpu.kernels.rounds.logit_histogram import peak_of
from speedstack.runtime.backends.gpu.kernels.rounds.topk_topp import find_edge, key_of
from speedstack.runtime.backends.gpu.kernels.rows import NO_TOKEN, TEMPERATURE, TOKEN, field, has_topk_or_topp


@triton.jit
def sample_item(
    row,
    rows_ptr,
    sampling_ptr,
    logits_ptr,
    best_ptr,
    peaks_ptr,
    bins_ptr,
    chains_ptr,
    notes_ptr,
    token_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    SP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """token[row]: the best token of all TILES tiles that top-k and top-p keep; -1 for NaN logits.

    Other pointers: see `lm_head.keep_tile`, `logit_histogram` and `topk_topp.py`.
    """
    if field(rows_ptr, row, TOKEN) >= 0:
        is_part, edge = has_topk_or_topp(rows_ptr, sampling_ptr, row, VOCAB), row * 0
        temperature = tl.where(is_part, field(sampling_ptr, row, TEMPERATURE).to(tl.float32, bitcast=True), 1.0)
        notes_ptr += row * (2 * VOCAB + TILES)
        if is_part:
            peak = peak_of(row, peaks_ptr, temperature, TILES, R, C)
            edge = find_edge(
                row, peak, sampling_ptr, logits_ptr, bins_ptr, chains_ptr, notes_ptr, VOCAB, SLICE, SLICES, SP, R, C
            )
        value_C = tl.full((C,), float("-inf"), tl.float32)
        token_C, least_C = tl.full((C,), NO_TOKEN, tl.int32), tl.full((C,), NO_TOKEN, tl.int32)
        for start in range(0, TILES, C):
            tile_C = start + tl.arange(0, C)
            best_C, index_C, is_kept_C = _best_of(
                tile_C, row, best_ptr, logits_ptr, temperature, edge, is_part, TILES, R
            )  # fmt: skip
            is_better_C = is_kept_C & ((best_C > value_C) | (token_C == NO_TOKEN))
            value_C = tl.where(is_better_C, best_C, value_C)
            token_C = tl.where(is_better_C, index_C, token_C)
            least_C = tl.minimum(least_C, index_C)
        value, token = _first_of_largest(value_C, token_C)
        # A tile with NaN has the index -1.
        token = tl.where(tl.min(least_C, axis=0) < 0, -1, token)
        if is_part & (token >= 0):
            tiles_ptr = notes_ptr + 2 * VOCAB
            num_tiles = row * 0
            # Without a kept token the largest is -inf, which every tile reaches.
            for start in range(0, TILES, C):
                tile_C = start + tl.arange(0, C)
                best_C, _, is_kept_C = _best_of(
                    tile_C, row, best_ptr, logits_ptr, temperature, edge, is_part, TILES, R
                )  # fmt: skip
                is_open_C = (tile_C < TILES) & (is_kept_C == 0) & (best_C >= value)
                peak_C = tl.load(peaks_ptr + tile_C * R + row, mask=is_open_C, other=0.0)
                is_open_C = is_open_C & (key_of(tl.math.div_rn(peak_C, temperature)) >= edge)
                tl.store(tiles_ptr + num_tiles + tl.cumsum(is_open_C.to(tl.int32), axis=0) - 1, tile_C, mask=is_open_C)
                num_tiles += tl.sum(is_open_C.to(tl.int32), axis=0)
            tl.debug_barrier()
            other, other_token = _best_in(
                row, num_tiles, tiles_ptr, rows_ptr, sampling_ptr, logits_ptr, temperature, edge, VOCAB, T, R, C
            )  # fmt: skip
            is_other = (other > value) | ((other == value) & (other_token < token)) | (token == NO_TOKEN)
            token = tl.where(is_other, other_token, token)
        tl.store(token_ptr + row, token)


@triton.jit
def _best_of(tile_C, row, best_ptr, logits_ptr, temperature, edge, is_part, TILES: tl.constexpr, R: tl.constexpr):
    """Each tile's largest score, its token, and whether the row keeps that token; C tiles."""
    at_C = best_ptr + tile_C * (2 * R) + row
    best_C = tl.load(at_C, mask=tile_C < TILES, other=0).to(tl.float32, bitcast=True)
    index_C = tl.load(at_C + R, mask=tile_C < TILES, other=NO_TOKEN)
    is_token_C = (tile_C < TILES) & (index_C >= 0)
    is_compared_C = is_token_C & (tile_C < tl.where(is_part, TILES, 0))
    logit_C = tl.load(logits_ptr + index_C.to(tl.int64) * R + row, mask=is_compared_C, other=0.0)
    is_kept_C = (key_of(tl.math.div_rn(logit_C, temperature)) >= edge) | (is_compared_C == 0)
    return best_C, index_C, is_token_C & is_kept_C


@triton.jit
def _best_in(
    row, num_tiles, tiles_ptr, rows_ptr, sampling_ptr, logits_ptr, temperature, edge, VOCAB: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The largest score of a kept token in these tiles, and the token; NO_TOKEN without one."""
    value_C, token_C = tl.full((C,), float("-inf"), tl.float32), tl.full((C,), NO_TOKEN, tl.int32)
    for start in range(0, num_tiles * T, C):
        i_C = start + tl.arange(0, C)
        v_C = tl.load(tiles_ptr + i_C // T, mask=i_C < num_tiles * T, other=0) * T + i_C % T
        is_token_C = (i_C < num_tiles * T) & (v_C < VOCAB)
        logit_C = tl.load(logits_ptr + v_C.to(tl.int64) * R + row, mask=is_token_C, other=0.0)
        x_C = tl.math.div_rn(logit_C, temperature)
        words = row_words(v_C // 4, row, rows_ptr, sampling_ptr)
        lane_C = v_C % 4
        even_C, odd_C = tl.where(lane_C < 2, words[0], words[2]), tl.where(lane_C < 2, words[1], words[3])
        score_C = x_C + gumbel(tl.where(lane_C % 2 == 0, even_C, odd_C))
        is_better_C = is_token_C & (key_of(x_C) >= edge) & ((score_C > value_C) | (token_C == NO_TOKEN))
        value_C = tl.where(is_better_C, score_C, value_C)
        token_C = tl.where(is_better_C, v_C, token_C)
    return _first_of_largest(value_C, token_C)


@triton.jit
def _first_of_largest(value_C, token_C):
    """The largest value and its lowest token; NO_TOKEN without one."""
    value = tl.max(value_C, axis=0)
    return value, tl.min(tl.where(value_C == value, token_C, NO_TOKEN), axis=0)
