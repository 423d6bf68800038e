"""A whole decode step as one kernel whose programs wait for each other, as `plan/ir.py` describes.

Every program walks the phases in order. A phase's record (int64, see RECORD) names its variant, the counters it waits
on and signals, and its pointers; the rest of a variant is known at compile time. Phases that differ only in layer share
a variant.

A launch of several rounds ends before the first step without a sequence. Programs learn this after the first phase's
wait and leave with whole counters, from which the next launch continues (`Phase.early_exit`).

`sync.py` explains the `while` loops and why reads come after waits. Loops use disable_licm, or LLVM hoists what any
variant needs and keeps it in registers throughout. The hint is lost if a loop gets two back edges, so the loops over
steps and phases end with one comparison: LLVM may split two conditions into two.

Variants are inlined: as separate functions (`noinline`) they take more registers.
"""

import triton
import triton.language as tl

from speedstack.runtime.backends.gpu.kernels.dispatch import begin_phase, coordinates, run_item
from speedstack.runtime.backends.gpu.kernels.prefetch import prefetch_item
from speedstack.runtime.backends.gpu.kernels.rounds.row_allocation import end_of_live
from speedstack.runtime.backends.gpu.kernels.sync import DUMP_RECORD, SCRATCH, signal, wait_for

# A phase's record: variant, rotation, wait counters, signal counters, next phase's variant, pointers.
RECORD = tl.constexpr(24)
VARIANT = tl.constexpr(0)
ROTATION = tl.constexpr(1)
WAIT_COUNTERS = tl.constexpr(2)
SIGNAL_COUNTERS = tl.constexpr(4)
FOLLOWING = tl.constexpr(6)
POINTERS = tl.constexpr(7)
# In the dump, instead of an item.
WHOLE_PHASE = tl.constexpr(-1)


@triton.jit
def load_pointers(record_ptr, PHASE: tl.constexpr):
    """A phase's pointers from its record, with the alignment of allocations."""
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
    """A phase's waits before an item, or on entry; false after a timeout."""
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
    """One program's part of a phase. Returns False after a timeout or the launch's end, and the next variant."""
    PHASE: tl.constexpr = PHASES[NUMBER]
    p = load_pointers(record_ptr, PHASE)
    first = (tl.program_id(0) + num_programs - tl.load(record_ptr + ROTATION).to(tl.int32)) % num_programs
    if PREFETCHES:  # noqa: SIM102
        if PHASE.is_known_early:
            # Known since the wait of `expert_gate_up`, which every program has passed.
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
        # In every step: a store before the loops costs registers in them.
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
    # Loaded here so that it arrives while the signal waits for the stores.
    following = tl.load(record_ptr + FOLLOWING).to(tl.int32)
    if is_alive:
        for n in tl.static_range(len(PHASE.signals)):
            signal(counters_ptr, tl.load(record_ptr + SIGNAL_COUNTERS + PHASE.signals[n]).to(tl.int32))
    return is_alive, following


@triton.jit
def is_over(sequences_ptr, R: tl.constexpr):
    """Whether all sequences decoded without the host are finished, and there were any."""
    live, is_allocated = end_of_live(sequences_ptr, R)
    return (live == 0) & is_allocated


# Not specialized, so that one kernel serves every launch and any number of layers.
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
    """Runs steps first_step to first_step + num_steps of a plan; num_made_ptr receives how many were made.

    Ends early on a timeout or when no sequence is left. phases_ptr: table of RECORDs. counters_ptr: as earlier steps
    left them. dump_ptr, failed_ptr, max_polls: see `sync.wait_for`. PHASES: the variants.
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
