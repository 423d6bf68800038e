"""A phase as one kernel, one item per program, for the `graph` backend."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from speedstack.runtime.backends.gpu.kernels.dispatch import begin_phase, run_item


@triton.jit
def phase_kernel(pointers, PHASE: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    """Runs the item at this program's grid index; the grid is the phase's axes.

    IS_DEPENDENT: launched while the previous kernel runs (programmatic dependent launch). Every program of every kernel
    waits before it accesses memory, so all earlier kernels, not only the last, are done then.
    """
    if IS_DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    num_first, shared = begin_phase(pointers, PHASE)
    if tl.program_id(0) < num_first:
        run_item(tl.program_id(0), tl.program_id(1), tl.program_id(2), 0, shared, pointers, PHASE)
