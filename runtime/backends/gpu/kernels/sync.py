"""Waiting for other programs of the same launch, and telling them: acquire and release on a counter.

What goes wrong if written carelessly, and what keeps it right here (each is looked for in the compiled code by
tests/runtime/backends/gpu/resident/test_compiled.py):

- A loop that polls with `tl.load` is deleted, because its loads have no effect; and a plain load may be served for ever
  from a line in the L1 cache. An atomic addition of zero is neither: it becomes one `ld.global.gpu.acquire`, by one
  thread, which reads the L2 cache, and its result reaches the other threads through a barrier.
- Loads of what was waited for must not move above the wait, nor hit lines that the L1 cache took in before it. The
  barrier behind the acquire keeps them in their place, and the acquire drops the multiprocessor's L1 lines
  (CCTL.IVALL). That is not true of non-coherent loads (`ld.global.nc`): pointers to what a launch writes must not be
  promised to be read-only. Ours come out of a table, or are arguments that promise nothing.
- A release orders the stores of its own thread, and what that thread has seen: the barrier before it makes the other
  threads' stores part of that. Triton 3.6.0 leaves that barrier out; later versions put in their own.
- A loop whose body waits must not be software-pipelined, which would load for the next iteration ahead of its wait.
  Triton pipelines `for` loops alone; loops that contain a wait are `while` loops.
"""

import triton
import triton.language as tl

# Fields of a program's record in the dump: who gave up, where, and what for. int32.
DUMP_RECORD = tl.constexpr(8)
HAS_GIVEN_UP = tl.constexpr(0)
STEP = tl.constexpr(1)
PHASE = tl.constexpr(2)
ITEM = tl.constexpr(3)
COUNTER = tl.constexpr(4)
AWAITED = tl.constexpr(5)
SEEN = tl.constexpr(6)
SCRATCH = tl.constexpr(7)  # a word of its own


@triton.jit
def read_counter(counter_ptr):
    return tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")


@triton.jit
def wait_for(counters_ptr, counter, threshold, max_polls, dump_ptr, failed_ptr, step, phase, item):
    """Until the counter has reached the threshold; false, and a record in the dump, after max_polls polls.

    Both are 32 bits and wrap around; what counts is the sign of their difference.
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
    """Adds one: whoever sees it sees what this program has written."""
    tl.debug_barrier()
    tl.atomic_add(counters_ptr + counter, 1, sem="release", scope="gpu")


@triton.jit
def agreed(value, scratch_ptr):
    """What one thread of the program has, for all of its threads: of a value that was read while others wrote.

    Threads that go different ways would wait for each other at different barriers.
    """
    tl.atomic_xchg(scratch_ptr, value, sem="relaxed", scope="gpu")
    return tl.atomic_add(scratch_ptr, 0, sem="relaxed", scope="gpu")
