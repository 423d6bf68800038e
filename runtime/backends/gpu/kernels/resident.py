"""A whole decode step in one kernel, whose programs wait for each other: the plan executed as `plan` describes it.

Every program walks the phases in order. A phase's record says which of the kernel's variants computes it (phases that
differ in layer alone are one variant), the counters that it waits on and signals, and its pointers; all else about a
variant is known at compile time. Rows of the table: int64, see RECORD.

A launch of several rounds ends before the first step for which no sequence is left. Programs find that out behind the
wait of a step's first phase, and leave with every counter as whole steps have left it, for the next launch to go on
from. The proof knows what they read there and that all of them see the same (`Phase.early_exit`).

Why `while` loops, and why what is read comes after the wait: see `counters`. Loops are told not to hoist
(disable_licm), or LLVM computes what any variant needs ahead of all of them, and holds it in registers throughout. The
hint hangs on a loop's one way back to its start. The loops over steps and phases therefore end with one comparison: of
two conditions LLVM may make two ways back, and then it forgets the hint.

Variants are inlined: as functions of their own (`noinline`) they take more registers.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.dispatch import begin_phase, coordinates, run_item
from speedstack.runtime.backends.gpu.kernels.prefetch import prefetch_item
from speedstack.runtime.backends.gpu.kernels.rounds.row_allocation import end_of_live
from speedstack.runtime.backends.gpu.kernels.sync import DUMP_RECORD, SCRATCH, signal, wait_for

# A phase's record: its variant, the rotation of its items, counters of its waits and of its signals, the variant of the
# phase that comes next, then pointers.
RECORD = tl.constexpr(24)
VARIANT = tl.constexpr(0)
ROTATION = tl.constexpr(1)
WAIT_COUNTERS = tl.constexpr(2)
SIGNAL_COUNTERS = tl.constexpr(4)
FOLLOWING = tl.constexpr(6)
POINTERS = tl.constexpr(7)
# Stands for an item in the dump.
WHOLE_PHASE = tl.constexpr(-1)


@triton.jit
def load_pointers(record_ptr, PHASE: tl.constexpr):
    """A phase's pointers out of its record, with the alignment that allocations have."""
    p = ()
    for n in tl.static_range(len(PHASE.pointer_types)):
        address = tl.load(record_ptr + POINTERS + n)
        p = p + (tl.multiple_of(address.to(PHASE.pointer_types[n]), 16),)  # type: ignore  # noqa: RUF005
    return p


@triton.jit
def wait_all(
    record_ptr, i, j, k, step, phase, item, counters_ptr, max_polls, dump_ptr, failed_ptr, PHASE: tl.constexpr,
    IS_ITEM: tl.constexpr,
):  # fmt: skip
    """A phase's waits before an item, or before all; false if one timed out."""
    if IS_ITEM:
        WAITS: tl.constexpr = PHASE.item_waits
    else:
        WAITS: tl.constexpr = PHASE.waits  # type: ignore[no-redef]
    is_alive = max_polls > 0
    for n in tl.static_range(len(WAITS)):
        if is_alive:
            counter = tl.load(record_ptr + WAIT_COUNTERS + WAITS[n][0]).to(tl.int32)
            counter += i * WAITS[n][3] + j * WAITS[n][4] + k * WAITS[n][5]
            threshold = step * WAITS[n][1] + WAITS[n][2]
            is_alive = wait_for(
                counters_ptr, counter, threshold, max_polls, dump_ptr, failed_ptr, step, phase, item
            )  # fmt: skip
    return is_alive


@triton.jit
def run_phase(
    record_ptr,
    phase,
    step,
    local_step,
    num_programs,
    counters_ptr,
    max_polls,
    dump_ptr,
    failed_ptr,
    num_made_ptr,
    sequences_ptr,
    PHASES: tl.constexpr,
    NUMBER: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    """One program's part of a phase. False if it timed out or the launch is over; and the next phase's variant."""
    PHASE: tl.constexpr = PHASES[NUMBER]
    p = load_pointers(record_ptr, PHASE)
    first = (tl.program_id(0) + num_programs - tl.load(record_ptr + ROTATION).to(tl.int32)) % num_programs
    if PREFETCHES:  # noqa: SIM102
        if PHASE.is_known_early:
            # What rows chose has been known since the wait of `expert_gate_up`, which every program has behind it.
            if PHASE.has_undecided_rows:
                scratch_ptr = dump_ptr + tl.program_id(0) * DUMP_RECORD + SCRATCH
                prefetch_item(first, p, PHASE, scratch_ptr)
            else:
                prefetch_item(first, p, PHASE)
    is_alive = wait_all(
        record_ptr, 0, 0, 0, step, phase, WHOLE_PHASE, counters_ptr, max_polls, dump_ptr, failed_ptr, PHASE, False
    )  # fmt: skip
    if PHASE.may_exit_early:
        is_alive = is_alive & (is_over(sequences_ptr, PHASE.R) == 0)
        # Every step, because a store ahead of the loops costs registers in them.
        if tl.program_id(0) == 0:
            tl.store(num_made_ptr, local_step + is_alive.to(tl.int32))
    if is_alive:
        num_first, shared = begin_phase(p, PHASE)
        if PHASE.is_skippable:
            num_items = num_first * PHASE.num_items_each
        else:
            num_items = PHASE.num_items
        item = first
        while tl.condition((item < num_items) & is_alive, disable_licm=True):
            i, j, k = coordinates(item, PHASE)
            is_alive = wait_all(
                record_ptr, i, j, k, step, phase, item, counters_ptr, max_polls, dump_ptr, failed_ptr, PHASE, True
            )  # fmt: skip
            if is_alive:
                if i < num_first:
                    run_item(i, j, k, local_step, shared, p, PHASE)
                for n in tl.static_range(len(PHASE.item_signals)):
                    counter = tl.load(record_ptr + SIGNAL_COUNTERS + PHASE.item_signals[n][0]).to(tl.int32)
                    counter += i * PHASE.item_signals[n][1] + j * PHASE.item_signals[n][2]
                    signal(counters_ptr, counter + k * PHASE.item_signals[n][3])
            item += num_programs
    # What comes next cannot begin without it: it arrives while the signal is held back for what was stored.
    following = tl.load(record_ptr + FOLLOWING).to(tl.int32)
    if is_alive:
        for n in tl.static_range(len(PHASE.signals)):
            signal(counters_ptr, tl.load(record_ptr + SIGNAL_COUNTERS + PHASE.signals[n]).to(tl.int32))
    return is_alive, following


@triton.jit
def is_over(sequences_ptr, R: tl.constexpr):
    """Whether there were sequences to decode without the host, and none is left."""
    live, is_allocated = end_of_live(sequences_ptr, R)
    return (live == 0) & is_allocated


# Numbers that say how much there is, so that one kernel serves every launch, and models of any number of layers.
_UNSPECIALIZED = ["num_phases", "num_programs", "first_step", "num_steps", "max_polls"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def resident_kernel(
    phases_ptr,
    counters_ptr,
    dump_ptr,
    failed_ptr,
    num_made_ptr,
    sequences_ptr,
    num_phases,
    num_programs,
    first_step,
    num_steps,
    max_polls,
    PHASES: tl.constexpr,
    PREFETCHES: tl.constexpr,
):
    """Steps first_step to first_step + num_steps of a plan, or fewer: num_made_ptr takes how many were made.

    A program leaves when it timed out, or when no sequence is left.
    phases_ptr: a table of RECORDs. counters_ptr: as the steps before left them. dump_ptr, failed_ptr: see
    `counters.wait_for`, which polls max_polls times. sequences_ptr: the records of sequences. PHASES: the variants.
    PREFETCHES: programs fetch what they need.
    """
    local_step = num_steps * 0
    is_alive = num_steps > 0
    while tl.condition(local_step < num_steps, disable_licm=True):
        phase = num_phases * 0
        variant = tl.load(phases_ptr + VARIANT).to(tl.int32)
        while tl.condition(phase < num_phases, disable_licm=True):
            following = variant
            for number in tl.static_range(len(PHASES)):
                if variant == number:
                    is_alive, following = run_phase(
                        phases_ptr + phase * RECORD, phase, first_step + local_step, local_step, num_programs,
                        counters_ptr, max_polls, dump_ptr, failed_ptr, num_made_ptr, sequences_ptr, PHASES, number,
                        PREFETCHES,
                    )  # fmt: skip
            variant = following
            phase = tl.where(is_alive, phase + 1, num_phases)
        local_step = tl.where(is_alive, local_step + 1, num_steps)
