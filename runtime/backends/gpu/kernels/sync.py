"""Synchronization of programs in one launch: acquire and release on a counter.

Pitfalls, each checked in the compiled code by tests/runtime/backends/gpu/resident/test_compiled.py:

- A polling `tl.load` is deleted because it has no effect, and a plain load may hit a stale L1 line for ever. An atomic
  add of zero becomes one `ld.global.gpu.acquire` by one thread, which reads L2; a barrier passes its result to the
  other threads.
- Loads after a wait must not move above it or hit older L1 lines. The barrier keeps their order, and the acquire
  invalidates L1 (CCTL.IVALL). Non-coherent loads (`ld.global.nc`) ignore both, so pointers to data written in the
  launch must not be marked read-only. Ours come from a table or from unmarked arguments.
- A release orders only its own thread's stores and what that thread has seen, so a barrier must precede it. Triton
  3.6.0 omits that barrier; later versions insert it.
- A loop that waits must not be software-pipelined, which would load before the wait. Triton pipelines only `for` loops,
  so these are `while` loops.
"""

import triton
import triton.language as tl

# Fields of a program's dump record, int32: who gave up, where, and waiting for what.
DUMP_RECORD = tl.constexpr(8)
HAS_GIVEN_UP = tl.constexpr(0)
STEP = tl.constexpr(1)
PHASE = tl.constexpr(2)
ITEM = tl.constexpr(3)
COUNTER = tl.constexpr(4)
AWAITED = tl.constexpr(5)
SEEN = tl.constexpr(6)
SCRATCH = tl.constexpr(7)  # scratch word


@triton.jit
def read_counter(counter_ptr):
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def wait_for(counters_ptr, counter, threshold, max_polls, dump_ptr, failed_ptr, step, phase, item):
    """Waits until the counter reaches the threshold; after max_polls polls returns false and writes the dump.

    Both are 32-bit and wrap around; the sign of their difference decides.
    """
    seen = read_counter(counters_ptr + counter)
    num_polls = max_polls * 0
    while (seen - threshold < 0) & (num_polls < max_polls):
        seen = read_counter(counters_ptr + counter)
        num_polls += 1
    is_reached = seen - threshold >= 0
    if not is_reached:
        record_ptr = dump_ptr + tl.program_id(0) * DUMP_RECORD
        tl.store(record_ptr + HAS_GIVEN_UP, 1)
        tl.store(record_ptr + STEP, step)
        tl.store(record_ptr + PHASE, phase)
        tl.store(record_ptr + ITEM, item)
        tl.store(record_ptr + COUNTER, counter)
        tl.store(record_ptr + AWAITED, threshold)
        tl.store(record_ptr + SEEN, seen)
        tl.store(failed_ptr, 1)
    return is_reached


@triton.jit
def signal(counters_ptr, counter):
    """Adds one; a program that sees it also sees this program's writes."""
    tl.debug_barrier()
    tl.atomic_add(counters_ptr + counter, 1, sem="release", scope="gpu")


@triton.jit
def agreed(value, scratch_ptr):
    """One thread's value, for all threads of the program, when others may be writing it.

    Threads that branch differently would wait at different barriers.
    """
    tl.atomic_xchg(scratch_ptr, value, sem="relaxed", scope="gpu")
    return tl.atomic_add(scratch_ptr, 0, sem="relaxed", scope="gpu")
