"""The resident kernel's tables, built from a plan, and a readable dump of waits that timed out.

Phases that differ only in layer share a variant, which is compiled once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl

from speedstack.runtime.backends.gpu.base import TooManyKinds
from speedstack.runtime.backends.gpu.bindings.layers import Binding, Constants
from speedstack.runtime.backends.gpu.kernels import resident, sync
from speedstack.runtime.plan.ir import Plan, Signal, Wait

# All variants are one kernel: it needs the registers of the largest and the compile time of all.
MAX_VARIANTS = 48
# Ops whose weights are known before their wait is over.
KNOWN_EARLY = ("qkv", "o_proj", "dense_gate_up", "dense_down", "router", "expert_down", "lm_head", "fuse", "context")
# The drafter op whose weights may be fetched while blocks are still being written.
FIRST_OF_A_DRAFT = "qkv"

_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
_MAX_WAITS = resident.SIGNAL_COUNTERS.value - resident.WAIT_COUNTERS.value
_MAX_SIGNALS = resident.FOLLOWING.value - resident.SIGNAL_COUNTERS.value
_MAX_POINTERS = resident.RECORD.value - resident.POINTERS.value


@dataclass(frozen=True)
class Tasks:
    """phases: int64, one record per phase. kept: tensors that the records point to."""

    variants: tuple[Constants, ...]
    phases: torch.Tensor
    kept: tuple[torch.Tensor, ...]


def build_tasks(plan: Plan, bindings: Sequence[Binding], device: torch.device) -> Tasks:
    """The tables of a plan.

    Raises ValueError for too many waits or signals in a phase, or (TooManyKinds) too many variants.
    """
    numbers: dict[Constants, int] = {}
    records, kept = [], []
    for binding in bindings:
        phase = binding.phase
        if len(phase.waits) > _MAX_WAITS or len(phase.signals) > _MAX_SIGNALS:
            raise ValueError(
                f"backend 'resident' takes at most {_MAX_WAITS} waits and {_MAX_SIGNALS} signals a phase; "
                f"{phase.name} has {len(phase.waits)} and {len(phase.signals)}"
            )
        assert len(binding.pointers) <= _MAX_POINTERS
        record = [0] * resident.RECORD.value
        record[resident.VARIANT.value] = numbers.setdefault(variant_of(binding), len(numbers))
        record[resident.ROTATION.value] = phase.rotation
        for slot, wait in enumerate(phase.waits):
            record[resident.WAIT_COUNTERS.value + slot] = _counter(plan, wait)
        for slot, signal in enumerate(phase.signals):
            record[resident.SIGNAL_COUNTERS.value + slot] = _counter(plan, signal)
        for slot, tensor in enumerate(binding.pointers):
            if tensor.device.type == "cuda" and tensor.data_ptr() % 16:
                raise ValueError(f"a tensor of {phase.name} is not aligned to 16 bytes, as the kernel takes it to be")
            record[resident.POINTERS.value + slot] = 0 if tensor.is_meta else tensor.data_ptr()
            kept.append(tensor)
        records.append(record)
    for record, following in zip(records, [*records[1:], records[0]], strict=True):
        record[resident.FOLLOWING.value] = following[resident.VARIANT.value]
    if len(numbers) > MAX_VARIANTS:
        raise TooManyKinds(
            f"backend 'resident' compiles every kind of phase into one kernel and takes {MAX_VARIANTS} at most; the "
            f"layers of this model, and of its drafter if it has one, make {len(numbers)}: use backend='graph'"
        )
    return Tasks(
        tuple(numbers),
        torch.tensor(records, dtype=torch.int64, device=device),
        tuple(kept),
    )


def variant_of(binding: Binding) -> Constants:
    """The constants of a phase's variant.

    waits, item_waits: (index among the phase's waits, per step, offset, three strides), on entry and per item. signals:
    indices among the phase's signals. item_signals: (index, three strides).
    """
    phase = binding.phase
    waits, signals = list(enumerate(phase.waits)), list(enumerate(phase.signals))
    item_signals = tuple((n, *_strides(signal)) for n, signal in signals if signal.each == "item")
    return Constants(
        **binding.constants.values,
        num_items=phase.num_items,
        num_items_each=math.prod(axis.size for axis in phase.axes[1:]),
        waits=tuple((n, w.per_step, w.offset, 0, 0, 0) for n, w in waits if not w.strides),
        item_waits=tuple((n, w.per_step, w.offset, *_strides(w)) for n, w in waits if w.strides),
        signals=tuple(n for n, signal in signals if signal.each == "program"),
        item_signals=item_signals,
        # Items cut from a step signal too.
        is_skippable=not item_signals,
        may_exit_early=phase.early_exit is not None,
        is_known_early=phase.op in KNOWN_EARLY,
        has_undecided_rows=binding.constants.IS_DRAFT and phase.op == FIRST_OF_A_DRAFT,
        pointer_types=tuple(tl.pointer_type(_TYPES[tensor.dtype]) for tensor in binding.pointers),
    )


def check_early_choices(plan: Plan) -> None:
    """Asserts that reads before a phase's own wait, made to prefetch weights, are safe; the proof does not cover them.

    `expert_down` reads the chosen experts, and drafter phases read whether blocks exist. An earlier phase's wait in the
    same step must cover these reads. Only FIRST_OF_A_DRAFT may race with the writes: its threads agree on the value
    (`sync.agreed`) and only fetch.
    """
    for index, phase in enumerate(plan.phases):
        what = "router." if phase.op == "expert_down" else "blocks"
        producers = {read.producer for read in phase.reads if read.region.buffer.startswith(what)}
        if phase.op not in KNOWN_EARLY or not producers or (what == "blocks" and phase.op == FIRST_OF_A_DRAFT):
            continue
        assert len(producers) == 1, f"{phase.name} reads what one phase wrote"
        producer = producers.pop()
        assert producer is not None
        between = plan.phases[plan.phase_named[producer] + 1 : index]
        whole = Wait(producer, plan.num_programs, plan.num_programs)  # by all programs, in this step
        is_behind = any(whole in one.waits for one in between)
        assert is_behind, f"{phase.name} looks before anything has waited for {producer}"


def explain(plan: Plan, dump: torch.Tensor) -> str:
    """One line per program that gave up: its wait and the value it saw. dump: int32 [programs, DUMP_RECORD]."""
    names = [
        (counter.name, element) for counter in plan.counters for element in range(counter.size)
    ]  # fmt: skip
    lines = []
    for program, record in enumerate(dump.tolist()):
        if not record[sync.HAS_GIVEN_UP.value]:
            continue
        phase = plan.phases[record[sync.PHASE.value]]
        item = record[sync.ITEM.value]
        where = phase.name if item == resident.WHOLE_PHASE.value else f"{phase.name}{list(phase.index(item))}"
        counter, element = names[record[sync.COUNTER.value]]
        lines.append(
            f"  program {program}: step {record[sync.STEP.value]}, {where}: {counter}[{element}] is "
            f"{record[sync.SEEN.value]} and has to reach {record[sync.AWAITED.value]}"
        )
    return "\n".join(lines)


def _strides(what: Wait | Signal) -> tuple[int, ...]:
    return (*what.strides, 0, 0, 0)[:3]


def _counter(plan: Plan, what: Wait | Signal) -> int:
    return plan.counter_base[what.counter] + what.start
