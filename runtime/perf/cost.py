"""Cost of a plan's step: a roofline per phase. For `rows` rows of `sequences` sequences with `context` positions each,

    bytes    = weight_bytes + active experts * expert_bytes + sequences * visible positions * kv_bytes
    flops    = rows * (row_flops + visible positions * position_flops)
    roofline = max(bytes / bandwidth, flops / peak)

with visible = min(context, window) and E * (1 - (1 - K / E) ** rows) active experts, expected under uniform independent
routing. Trained routers are less uniform, so this is an upper bound. Activations stay in L2: counted, not charged.
`predicted` adds, under stated assumptions,

    predicted = roofline / balance + handoff (+ all_reduce)
    balance   = items / (programs * ceil(items / programs))       how evenly the items divide
    handoff   = from the last signal of a phase to the first wait that sees it
    all_reduce= one exchange among GPUs, where partial sums are

Sampling (noise, top-k, top-p) is not counted. Tokens per second = sequences * acceptance_length / (step + draft).
"""

import math
from dataclasses import dataclass

from speedstack.runtime.perf.gpus import Gpu
from speedstack.runtime.plan.ir import Phase, Plan

EMBEDDING = ("embed", "block")  # ops that read a few rows of a matrix


@dataclass(frozen=True)
class Assumptions:
    """bandwidth_fraction: of the GPU's figure that is reached; a copy reaches about 0.9. The three times are guesses to
    be replaced by measurements: published synchronizations of programs lie between 0.9 and 8 us."""

    bandwidth_fraction: float = 1.0
    handoff_us: float = 1.0
    all_reduce_us: float = 8.0
    draft_us: float = 0.0
    acceptance_length: float = 1.0


@dataclass(frozen=True)
class PhaseCost:
    """One phase of one step. op: without a drafter's `D.`. num_items: expected, with dynamic axes cut."""

    name: str
    op: str
    layer: int | None
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    flops: float
    num_items: float
    balance: float
    roofline_seconds: float
    predicted_seconds: float

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class StepCost:
    """One step on one GPU, or on each of several."""

    phases: tuple[PhaseCost, ...]
    sequences: int
    acceptance_length: float
    draft_seconds: float

    @property
    def memory_bytes(self) -> float:
        return sum(phase.memory_bytes for phase in self.phases)

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def roofline_seconds(self) -> float:
        return sum(phase.roofline_seconds for phase in self.phases)

    @property
    def predicted_seconds(self) -> float:
        return sum(phase.predicted_seconds for phase in self.phases)

    def tokens_per_second(self, step_seconds: float) -> float:
        return self.sequences * self.acceptance_length / (step_seconds + self.draft_seconds)


def active_experts(num_experts: int, top_k: int, rows: int) -> float:
    """Expected distinct experts of `rows` rows that choose uniformly and independently."""
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** rows)


def step_cost(
    plan: Plan, gpu: Gpu, rows: int, sequences: int, context: int, assumptions: Assumptions | None = None
) -> StepCost:
    """Cost of a step of `rows` rows.

    Raises ValueError if rows exceed the plan's or are not a multiple of the sequences, or the context is too long.
    """
    if not 1 <= rows <= plan.rows:
        raise ValueError(f"{rows} rows are outside the plan's 1 to {plan.rows}")
    if not 1 <= sequences <= rows or rows % sequences:
        raise ValueError(f"{rows} rows cannot be shared out evenly among {sequences} sequences")
    if not 1 <= context <= plan.max_context:
        raise ValueError(f"context {context} is outside the plan's 1 to {plan.max_context} positions")
    assumed = assumptions or Assumptions()
    phases = tuple(_phase_cost(plan, phase, gpu, rows, sequences, context, assumed) for phase in plan.phases)
    return StepCost(phases, sequences, assumed.acceptance_length, assumed.draft_us * 1e-6)


def _phase_cost(
    plan: Plan, phase: Phase, gpu: Gpu, rows: int, sequences: int, context: int, assumed: Assumptions
) -> PhaseCost:
    work = phase.work
    experts = active_experts(work.num_experts, work.top_k, rows) if work.num_experts else 0.0
    visible = context if work.window is None else min(context, work.window)
    weight_bytes = work.weight_bytes + work.repeated_bytes + experts * work.expert_bytes
    if phase.op in EMBEDDING:  # one row of the table for each row of the step
        weight_bytes *= rows / plan.rows
    kv_bytes = sequences * visible * work.kv_bytes
    flops = rows * (work.row_flops + visible * work.position_flops)
    sizes = {"row": rows, "sequence": sequences, "expert": experts, "split": math.ceil(visible / plan.split_size)}
    num_items = math.prod(sizes.get(axis.name, axis.size) if axis.is_dynamic else axis.size for axis in phase.axes)
    balance = num_items / (plan.num_programs * math.ceil(num_items / plan.num_programs))
    bandwidth = gpu.bandwidth * assumed.bandwidth_fraction
    roofline = max((weight_bytes + kv_bytes) / bandwidth, flops / gpu.bf16_flops)
    all_reduce = assumed.all_reduce_us * 1e-6 if work.all_reduce_bytes else 0.0
    return PhaseCost(
        name=phase.name,
        op=f"D.{phase.op}" if phase.name.startswith("D") else phase.op,
        layer=phase.layer,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
        activation_bytes=rows * work.activation_bytes,
        flops=flops,
        num_items=num_items,
        balance=balance,
        roofline_seconds=roofline,
        predicted_seconds=roofline / balance + assumed.handoff_us * 1e-6 + all_reduce,
    )


def weights_bytes(plan: Plan, embedding_bytes: float) -> float:
    """Bytes of all weights in a GPU's memory, with every expert and the whole embedding."""
    parts = (phase.work for phase in plan.phases if phase.op not in EMBEDDING)
    return embedding_bytes + sum(work.weight_bytes + work.num_experts * work.expert_bytes for work in parts)
