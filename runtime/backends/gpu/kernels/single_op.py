"""A phase as one kernel, an item a program, for the `graph` backend."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from speedstack.runtime.backends.gpu.kernels.dispatch import begin_phase, run_item


@triton.jit
def phase_kernel(pointers, PHASE: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    """The item at this program's place in the grid, which has the phase's axes.

    With IS_DEPENDENT the kernel is launched while the one before it still runs (programmatic dependent launch), and
    waits before it touches memory. Every program of every kernel waits, so that a kernel that has begun to work knows
    that all before it are done, not only the last.
    """
    if IS_DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    num_first, shared = begin_phase(pointers, PHASE)
    if tl.program_id(0) < num_first:
        run_item(tl.program_id(0), tl.program_id(1), tl.program_id(2), 0, shared, pointers, PHASE)
