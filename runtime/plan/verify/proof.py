"""Proves that a plan can neither deadlock nor race, whatever the interleaving, expert lists and number of steps.

**What is claimed.** Call *sequential* the order step by step, phase by phase, item by item. If the proof accepts, every
execution on `num_programs` programs that run their task lists in order makes progress for ever, and every read sees
what it sees in the sequential order. The memory model is that of the kernels: a signal releases what its program did
before it, a wait acquires what was released by the signals it counted.

**How.** Every program has a clock: a vector with, for each program, the last of its events known to have happened
before (Lamport's happens-before, Mattern's vectors). Phases are walked in sequential order. A wait whose threshold is
the number of signals that come up to some earlier phase joins the clocks of all those signals. Then

- *no deadlock*: every wait's threshold is reached by signals that lie before it in the sequential order. That order
  extends every program's own; so of the events that have not happened, the first in it is never blocked.
- *no fooled wait*: a counter counts, it does not say whose signals it counted. Hence signals of a later phase or step
  must not arrive before all of an earlier one did: each must know, by its clock, all of them. This is what makes the
  join above true, by induction over the wall-clock order of the waits that pass: were a wait the first to pass without
  one of its signals, a later signal would have stood in for it, and the waits behind that one were not fooled.
- *no race*: of two items that touch a common byte, one of them writing, the one later in the sequential order knows the
  earlier one by its clock. Execution is then equivalent to the sequential one.
- *one end*: what says whether a launch is over (`Phase.early_exit`) is read by every program on entering a step's first
  phase, items or not, and these reads are ordered like all others: all programs find the same, and leave together
  between two steps, where every counter has counted whole ones.
- *right value*: in the sequential order, the last writer of what a phase reads is the producer that the read names, and
  it wrote all of it. Two buffers that share memory while both are alive fail here.

**Unknown lists.** Dynamic axes are taken at full size for conflicts, a superset of what any run touches; a wait inside
an item that may not exist teaches its program nothing; signals do not depend on lists. What different items of a phase
share out by a list (`Region.exclusive`) is disjoint by the definition of the list, and the whole region against any
other phase.

**All steps.** Everything that a step's verdicts depend on is finite once step numbers are counted from the current
step: clocks, accesses not yet known to all, the counts and clocks behind each counter. The walk goes on until this
state comes back; since thresholds grow with the step exactly as counters do (checked), every later step repeats one
that was proved. A plan whose state does not come back within `walk.MAX_STEPS` is rejected.

Left out: the arithmetic of the items, which the tests of the kernels cover, and the bound of 2^31 on the distance of
two counters that are compared, which holds as no program can be two steps ahead.
"""

import time
from dataclasses import dataclass

from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.verify.access_tables import check_well_formed
from speedstack.runtime.plan.verify.happens_before import Failure, Rejected, Walk


@dataclass(frozen=True)
class Proof:
    """The verdict. num_steps: steps walked until the state came back. num_conflicts: pairs of accesses compared."""

    failure: Failure | None
    num_phases: int
    num_items: int
    num_steps: int
    num_waits: int
    num_conflicts: int
    seconds: float

    @property
    def is_safe(self) -> bool:
        return self.failure is None


def prove(plan: Plan) -> Proof:
    """Checks a plan; see the module. Never raises for a wrong plan: the verdict says what is wrong.

    Raises ValueError for a plan that is not well-formed: unknown names, indices outside a counter or buffer.
    """
    check_well_formed(plan)
    started = time.perf_counter()
    walk = Walk(plan)
    failure = None
    try:
        walk.run()
    except Rejected as rejected:
        failure = rejected.failure
    return Proof(
        failure=failure,
        num_phases=len(plan.phases),
        num_items=sum(phase.num_items for phase in plan.phases),
        num_steps=walk.num_steps,
        num_waits=walk.num_waits,
        num_conflicts=walk.num_conflicts,
        seconds=time.perf_counter() - started,
    )
