"""Proves that a plan can neither deadlock nor race, for any interleaving, expert lists and number of steps.

**Claim.** The *sequential* order runs step by step, phase by phase, item by item. If the proof accepts, every execution
on `num_programs` programs, each running its task list in order, makes progress, and every read sees what it sees in the
sequential order. A signal releases what its program did before; a wait acquires what the counted signals released.

**Method.** Every program has a vector clock: the last known event of each program (Lamport's happens-before, Mattern's
vectors). Phases are walked in sequential order. A wait whose threshold is the number of signals up to some earlier
phase joins the clocks of all those signals. Checks:

- *no deadlock*: signals that precede a wait in the sequential order reach its threshold. That order extends every
  program's own, so the first event that has not happened is never blocked.
- *no fooled wait*: a counter does not say whose signals it counted, so signals of a later phase or step must know, by
  their clocks, all signals of earlier ones. By induction over the wall-clock order of passing waits, the join is then
  true: in the first wait to pass too early, a later signal would have replaced a missing one, although the waits behind
  that signal were not fooled.
- *no race*: of two items that access a common byte, one writing, the later one knows the earlier one. Execution is then
  equivalent to the sequential one.
- *one end*: every program reads `Phase.early_exit` on entering a step's first phase, with items or not. These reads are
  ordered like all others, so all programs agree and leave between two steps, with whole counters.
- *right value*: the last writer of a read region is the named producer, and it wrote all of it. This rejects live
  buffers that share memory.

**Unknown lists.** Dynamic axes count at full size for conflicts. A wait inside an item that may not exist teaches
nothing. Signals do not depend on lists. Items that divide a `Region.exclusive` by a list are disjoint by the list's
definition; against other phases the whole region counts.

**All steps.** Relative to the current step, the state (clocks, open accesses, counts and clocks per counter) is finite.
The walk continues until the state repeats. Thresholds grow like their counters (checked), so every later step repeats a
proved one. A plan whose state does not repeat within `happens_before.MAX_STEPS` is rejected.

Left out: the items' arithmetic, which the kernel tests cover, and the bound of 2^31 between compared counters, which
holds because no program can be two steps ahead.
"""

import time
from dataclasses import dataclass

from speedstack.runtime.plan.ir import Plan
from speedstack.runtime.plan.verify.access_tables import check_well_formed
from speedstack.runtime.plan.verify.happens_before import Failure, Rejected, Walk


@dataclass(frozen=True)
class Proof:
    """The verdict. num_steps: steps until the state repeated. num_conflicts: pairs of accesses compared."""

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
    """Proves a plan safe, or returns the reason why not. Raises ValueError only for a plan that is not well-formed."""
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
