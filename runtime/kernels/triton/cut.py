"""Top-k and top-p: which tokens they keep, and the draw among those. `speedstack.runtime.sampling` is the definition.

Both keep all tokens from some logit on, the edge: the largest for which enough tokens, or enough mass, lie at it or
above. Logits are compared as integers of the same order, and the edge is found by halving the interval where it can
lie. Counts and masses are integers, so that it is the same edge in whatever order they are added.

Few tokens come into question, and the largest logit of each tile says where they are. A token among the k largest lies
in a tile whose largest is among the k largest of those, at or above the least of these. For top-p alone what lies far
below the peak is left out at first, and everything that has mass looked at where that was too little. So one program
reads few tiles for top-k, the whole row once or twice for top-p alone, and after that only what it has noted.

Left out: sharing a row among programs. It would take a phase, and steps that need no cut would wait for it.

See the package for the legend; C candidates, or tiles, at a time. Of a row, candidates are int32: VOCAB tokens, then
their keys, their masses, and the TILES numbers of tiles.
"""

import triton
import triton.language as tl

from speedstack.runtime import sampling
from speedstack.runtime.kernels.triton.noise import gumbel, row_words
from speedstack.runtime.kernels.triton.rows import NO_TOKEN, TEMPERATURE, TOP_K, TOP_P, field

_LEAST_KEY = tl.constexpr(-(2**31))
_OCTAVE_BITS = tl.constexpr(sampling.OCTAVE_BITS)
_FARTHEST = tl.constexpr(sampling.FARTHEST)
_STEPS_A_NAT = tl.constexpr(sampling.STEPS_A_NAT)
_WHOLE_MASS = tl.constexpr(sampling.WHOLE_MASS)
_MASS_COEFFICIENTS = tl.constexpr(sampling.MASS_COEFFICIENTS)
_DEGREE = tl.constexpr(len(sampling.MASS_COEFFICIENTS))
_SHARE_BITS = tl.constexpr(sampling.SHARE_BITS)
_SHARE_MASK = tl.constexpr((1 << sampling.SHARE_BITS) - 1)
# Where top-p looks first, in nats below the peak: a guess. It decides how long a search takes and not what it finds.
_NEAR = tl.constexpr(8.0)
# From where on nothing has mass: 31 halvings, and more than they can be off by.
_MASSLESS = tl.constexpr(22.0)


@triton.jit
def key_of(x):
    """An int32 for each float32 that is a number, in the same order; the two zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def mass_of(x, peak):
    """`sampling.masses`, as int32."""
    steps = (tl.where(x == peak, 0.0, tl.minimum(peak - x, _FARTHEST)) * _STEPS_A_NAT).to(tl.int32)
    # As a part of 2**32, so that the upper half of a product is what the definition shifts down.
    fraction = steps.to(tl.uint32) << (32 - _OCTAVE_BITS)
    zero = fraction * 0
    mass = zero + _MASS_COEFFICIENTS[_DEGREE - 1]
    for n in tl.static_range(_DEGREE - 1):
        mass = (zero + _MASS_COEFFICIENTS[_DEGREE - 2 - n]) - tl.umulhi(mass, fraction)
    mass = (zero + _WHOLE_MASS) - tl.umulhi(mass, fraction)
    return (mass >> tl.minimum(steps >> _OCTAVE_BITS, 31).to(tl.uint32)).to(tl.int32)


@triton.jit
def share_of(total, share):
    """total * share / 2**24, rounded up, without overflow."""
    return (total >> _SHARE_BITS) * share + (((total & _SHARE_MASK) * share + _SHARE_MASK) >> _SHARE_BITS)


@triton.jit
def find_edge(
    row,
    peak,
    sampling_ptr,
    logits_ptr,
    best_ptr,
    tokens_ptr,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """How many candidates are noted at tokens_ptr, and from which key on, an int64, a row's top-k and top-p keep them.

    peak: the row's largest logit. best: the largest of each of TILES tiles of T tokens. All logits are numbers.
    """
    temperature = field(sampling_ptr, row, TEMPERATURE).to(tl.float32, bitcast=True)
    top_k, share = field(sampling_ptr, row, TOP_K), field(sampling_ptr, row, TOP_P)
    is_ranked = (top_k > 0) & (top_k < VOCAB)
    tiles_ptr = tokens_ptr + 3 * VOCAB
    peak = tl.math.div_rn(peak, temperature)
    highest = key_of(peak).to(tl.int64)
    bound = key_of(peak - _NEAR)
    if is_ranked:
        bound = _least_of_largest(row, best_ptr, temperature, top_k, highest, TILES, R, C)
    count, total = top_k * 0, highest * 0
    is_found = count > 0
    while is_found == 0:
        # What was noted in vain may still be read.
        tl.debug_barrier()
        num_tiles = _list_tiles(row, best_ptr, tiles_ptr, temperature, peak, bound, is_ranked, TILES, R, C)
        tl.debug_barrier()
        count, total, noted = _note(
            row, logits_ptr, tokens_ptr, tiles_ptr, num_tiles * T, temperature, peak, bound, VOCAB, T, R, C
        )
        is_found = is_ranked | (noted >= share_of(total, share))
        bound = tl.where(is_found, bound, _LEAST_KEY)
    tl.debug_barrier()
    low = bound.to(tl.int64)
    for cut in range(2):
        is_top_p = cut == 1
        if tl.where(is_top_p, share > 0, is_ranked):
            needed = top_k.to(tl.int64)
            if is_top_p:
                if is_ranked:
                    total = _weigh(tokens_ptr, count, low, is_top_p, VOCAB, C)
                needed = share_of(total, share)
            high = highest
            while low < high:
                middle = (low + high + 1) >> 1
                is_enough = _weigh(tokens_ptr, count, middle, is_top_p, VOCAB, C) >= needed
                low = tl.where(is_enough, middle, low)
                high = tl.where(is_enough, high, middle - 1)
    return count, low


@triton.jit
def _scaled_tiles(row, best_ptr, tile_C, temperature, TILES: tl.constexpr, R: tl.constexpr):
    """The largest logit of each of these tiles divided by the temperature; -inf for those that there are not."""
    largest_C = tl.load(best_ptr + tile_C * (2 * R) + row, mask=tile_C < TILES, other=0).to(tl.float32, bitcast=True)
    return tl.where(tile_C < TILES, tl.math.div_rn(largest_C, temperature), float("-inf"))


@triton.jit
def _least_of_largest(
    row, best_ptr, temperature, top_k, highest, TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """The least of the `top_k` largest keys of C groups of tiles; where there are fewer, the least key of all."""
    lane_C = tl.arange(0, C)
    x_C = tl.full((C,), float("-inf"), tl.float32)
    for start in range(0, TILES, C):
        x_C = tl.maximum(x_C, _scaled_tiles(row, best_ptr, start + lane_C, temperature, TILES, R))
    key_C = key_of(x_C)
    low, high = highest * 0 + _LEAST_KEY, highest
    while low < high:
        middle = (low + high + 1) >> 1
        is_enough = tl.sum(((lane_C < TILES) & (key_C >= middle)).to(tl.int32), axis=0) >= top_k
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _list_tiles(
    row, best_ptr, tiles_ptr, temperature, peak, bound, is_ranked, TILES: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    """Lists tiles, in ascending order, that have tokens from `bound` on or, where top-p alone cuts, any mass."""
    num_tiles = bound * 0
    for start in range(0, TILES, C):
        tile_C = start + tl.arange(0, C)
        x_C = _scaled_tiles(row, best_ptr, tile_C, temperature, TILES, R)
        has_mass_C = (x_C == peak) | (peak - x_C < _MASSLESS)
        is_listed_C = (tile_C < TILES) & tl.where(is_ranked, key_of(x_C) >= bound, has_mass_C)
        place_C = num_tiles + tl.cumsum(is_listed_C.to(tl.int32), axis=0) - 1
        tl.store(tiles_ptr + place_C, tile_C, mask=is_listed_C)
        num_tiles += tl.sum(is_listed_C.to(tl.int32), axis=0)
    return num_tiles


@triton.jit
def _note(
    row, logits_ptr, tokens_ptr, tiles_ptr, num_tokens, temperature, peak, bound, VOCAB: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Notes tokens of the listed tiles whose keys reach `bound`: how many, the mass of all in the tiles, and theirs."""
    count = num_tokens * 0
    total_C, noted_C = tl.zeros((C,), tl.int64), tl.zeros((C,), tl.int64)
    for start in range(0, num_tokens, C):
        i_C = start + tl.arange(0, C)
        v_C = tl.load(tiles_ptr + i_C // T, mask=i_C < num_tokens, other=0) * T + i_C % T
        is_token_C = (i_C < num_tokens) & (v_C < VOCAB)
        logit_C = tl.load(logits_ptr + v_C.to(tl.int64) * R + row, mask=is_token_C, other=float("-inf"))
        x_C = tl.math.div_rn(logit_C, temperature)
        key_C, mass_C = key_of(x_C), tl.where(is_token_C, mass_of(x_C, peak), 0)
        is_noted_C = is_token_C & (key_C >= bound)
        at_C = tokens_ptr + count + tl.cumsum(is_noted_C.to(tl.int32), axis=0) - 1
        tl.store(at_C, v_C, mask=is_noted_C)
        tl.store(at_C + VOCAB, key_C, mask=is_noted_C)
        tl.store(at_C + 2 * VOCAB, mass_C, mask=is_noted_C)
        count += tl.sum(is_noted_C.to(tl.int32), axis=0)
        total_C += mass_C
        noted_C += tl.where(is_noted_C, mass_C, 0)
    return count, tl.sum(total_C, axis=0), tl.sum(noted_C, axis=0)


@triton.jit
def _weigh(tokens_ptr, count, edge, is_mass, VOCAB: tl.constexpr, C: tl.constexpr):
    """Candidates whose keys reach the edge: their mass, or how many they are; int64."""
    sum_C = tl.zeros((C,), tl.int64)
    for start in range(0, count, C):
        i_C = start + tl.arange(0, C)
        key_C = tl.load(tokens_ptr + VOCAB + i_C, mask=i_C < count, other=0)
        is_in_C = (i_C < count) & (key_C >= edge)
        mass_C = tl.load(tokens_ptr + 2 * VOCAB + i_C, mask=is_in_C & is_mass, other=1)
        sum_C += tl.where(is_in_C, mass_C, 0)
    return tl.sum(sum_C, axis=0)


@triton.jit
def draw(row, rows_ptr, sampling_ptr, tokens_ptr, count, edge, VOCAB: tl.constexpr, C: tl.constexpr):
    """The token drawn among the candidates whose keys reach the edge."""
    largest_C = tl.full((C,), float("-inf"), tl.float32)
    token_C = tl.full((C,), NO_TOKEN, tl.int32)
    for start in range(0, count, C):
        i_C = start + tl.arange(0, C)
        v_C = tl.load(tokens_ptr + i_C, mask=i_C < count, other=0)
        key_C = tl.load(tokens_ptr + VOCAB + i_C, mask=i_C < count, other=0)
        words = row_words(v_C // 4, row, rows_ptr, sampling_ptr)
        lane_C = v_C % 4
        even_C, odd_C = tl.where(lane_C < 2, words[0], words[2]), tl.where(lane_C < 2, words[1], words[3])
        word_C = tl.where(lane_C % 2 == 0, even_C, odd_C)
        score_C = tl.where((i_C < count) & (key_C >= edge), value_of(key_C) + gumbel(word_C), float("-inf"))
        is_larger_C = score_C > largest_C
        largest_C = tl.where(is_larger_C, score_C, largest_C)
        token_C = tl.where(is_larger_C, v_C, token_C)
    largest = tl.max(largest_C, axis=0)
    token = tl.min(tl.where(largest_C == largest, token_C, NO_TOKEN), axis=0)
    # Where every score is -inf none is larger than what there was before: the first of them, as for the host.
    return tl.where(token == NO_TOKEN, 0, token)
