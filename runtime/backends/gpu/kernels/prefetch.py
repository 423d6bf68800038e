"""Prefetches weights into the L2 cache.

It reads values only to learn which experts and blocks there are and writes nothing, so it cannot change results. It
fetches whole weight rows, contiguous in memory, of each program's first item: more would not arrive before the wait
ends, and the LM head alone exceeds the cache.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.dispatch import choose_experts, coordinates
from speedstack.runtime.backends.gpu.kernels.layers.experts import nth_expert
from speedstack.runtime.backends.gpu.kernels.rows import has_rows
from speedstack.runtime.backends.gpu.kernels.sync import agreed

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LANES = tl.constexpr(256)  # 16-byte pieces, one per thread of eight warps
_LINE = tl.constexpr(128)  # bytes of a cache line


@triton.jit
def prefetch_item(first, p, PHASE: tl.constexpr, scratch_ptr=None):
    """Prefetches the weights of a program's first item of a phase, if it has one.

    scratch_ptr: set if other programs may be writing the blocks that this reads.
    """
    num_items = PHASE.num_items
    rank_E = tl.zeros((1,), tl.int32)
    if PHASE.op == "expert_down":
        rank_E = choose_experts(p, PHASE)[2]
    if PHASE.IS_DRAFT:
        # In the first phase, this may be the previous step's value.
        is_wanted = has_rows(p[0], PHASE.R).to(tl.int32)
        if scratch_ptr is not None:
            is_wanted = agreed(is_wanted, scratch_ptr)
        num_items = is_wanted * PHASE.num_items
    if first < num_items:
        i, j, _ = coordinates(first, PHASE)
        if PHASE.op == "qkv":
            prefetch_linear_rows(p, 3, i * PHASE.COLUMNS + j * PHASE.T, PHASE.T, PHASE.D, PHASE)
        elif PHASE.op == "o_proj" or PHASE.op == "dense_down":
            prefetch_linear_rows(p, 2, i * PHASE.T, PHASE.D - i * PHASE.T, PHASE.K, PHASE)
        elif PHASE.op == "dense_gate_up":
            left = PHASE.WIDTH - i * PHASE.T
            prefetch_linear_rows(p, 3, i * PHASE.T, left, PHASE.D, PHASE)
            prefetch_linear_rows(p, 3, PHASE.WIDTH + i * PHASE.T, left, PHASE.D, PHASE)
        elif PHASE.op == "router":
            prefetch_rows(p[3], i * PHASE.T, PHASE.E - i * PHASE.T, PHASE.T, PHASE.D)
        elif PHASE.op == "lm_head":
            prefetch_linear_rows(p, 3, i * PHASE.T, PHASE.VOCAB - i * PHASE.T, PHASE.D, PHASE)
        elif PHASE.op == "fuse":
            prefetch_rows(p[2], i * PHASE.T, PHASE.D - i * PHASE.T, PHASE.T, PHASE.TAPS * PHASE.D)
        elif PHASE.op == "context":
            row = i * PHASE.COLUMNS + PHASE.FIRST + j * PHASE.T
            prefetch_rows(p[3], row, PHASE.WIDTH - j * PHASE.T, PHASE.T, PHASE.D)
        elif PHASE.op == "expert_down":
            nth, num_experts = first * 0, tl.max(rank_E, axis=0)
            while nth < num_experts:
                row = nth_expert(nth, rank_E).to(tl.int64) * PHASE.D + i * PHASE.T
                prefetch_expert_rows(p, row, PHASE.D - i * PHASE.T, PHASE.WIDTH, PHASE)
                nth += 1
        else:
            tl.static_assert(False, "no weights to fetch for this op")


@triton.jit
def prefetch_expert_rows(p, row, num_rows, K: tl.constexpr, PHASE: tl.constexpr):
    """T rows of K elements of an expert's weight, or their codes and scales."""
    if PHASE.IS_PACKED:
        prefetch_rows(p[3], row, num_rows, PHASE.T, K // 2)
        prefetch_rows(p[4], row, num_rows, PHASE.T, K // 32)
    else:
        prefetch_rows(p[3], row, num_rows, PHASE.T, K)


@triton.jit
def prefetch_linear_rows(p, WEIGHT: tl.constexpr, row, num_rows, K: tl.constexpr, PHASE: tl.constexpr):
    """T rows of K elements of the weight p[WEIGHT], and their FP8 scales."""
    prefetch_rows(p[WEIGHT], row, num_rows, PHASE.T, K)
    if PHASE.FP8_ROWS > 0:
        first = row // PHASE.FP8_ROWS
        num_scale_rows = (row + tl.minimum(num_rows, PHASE.T) - 1) // PHASE.FP8_ROWS + 1 - first
        prefetch_rows(p[len(p) - 1], first, num_scale_rows, PHASE.T // PHASE.FP8_ROWS + 2, (K + 127) // 128)


@triton.jit
def prefetch_rows(weight_ptr, row, num_rows, T: tl.constexpr, K: tl.constexpr):
    """At most T rows of K elements from `row`, of num_rows; bytes are rounded down to multiples of 16."""
    ROW_BYTES: tl.constexpr = K * weight_ptr.dtype.element_ty.primitive_bitwidth // 8
    PIECE: tl.constexpr = (T * ROW_BYTES + _LANES * _LINE - 1) // (_LANES * _LINE) * _LINE
    begin = weight_ptr.to(tl.int64) + row.to(tl.int64) * ROW_BYTES
    end = begin + tl.minimum(num_rows, T) * ROW_BYTES
    address_L = begin // 16 * 16 + tl.arange(0, _LANES) * PIECE
    num_bytes_L = tl.minimum(end - address_L, PIECE) // 16 * 16
    fetch(address_L, num_bytes_L.to(tl.int32))


@triton.jit
def fetch(address_L, num_bytes_L):
    """Prefetches pieces of memory with positive num_bytes; addresses and sizes are multiples of 16."""
    if _IS_INTERPRETED:
        # The interpreter cannot run assembly: it reads the first and last byte.
        byte_L = address_L.to(tl.pointer_type(tl.uint8))
        tl.load(byte_L, mask=num_bytes_L > 0)
        tl.load(byte_L + num_bytes_L - 1, mask=num_bytes_L > 0)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r",
            [address_L, num_bytes_L],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
