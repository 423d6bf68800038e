"""Measured time of each phase of a decode step, by the names that the plan, its cost and its timelines use.

`reference` runs what the phases mean in PyTorch (`runtime.backends.gpu.semantics.layers`), each to its end, by the
host's clock; its plan is cut for one program, so that it has no more pieces than it must. These are an oracle's times:
it gathers the rows of a head group's projection anew in every `qkv`, and walks splits and experts in Python. `graph`
runs the phases' own kernels by the GPU's clock, all phases of one kind behind each other in a CUDA graph, and gives
each their mean: a phase alone is shorter than what it takes to launch it. Triton's interpreter tries the code and times
nothing.

Left out: `resident`, whose phases overlap, and `cpu`, whose operations are not the plan's.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Literal

import torch

from speedstack.eval.speed.device_timing import device_seconds, phase_kinds, replayer
from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.base import formats_of
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.gpu.semantics.layers import StepSemantics
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.plan.step import build_plan

MeasuredBackend = Literal["reference", "graph"]
NUM_WARMUPS = 2
# More than any GPU's L2 cache: what a phase reads comes from memory, as in a step.
FLUSH_BYTES = 512 * 2**20


def step_rows(num_rows: int, num_sequences: int, context: int, vocab_size: int, seed: int = 0) -> Rows:
    """Rows of a step whose last ones attend to `context` positions; tokens are drawn.

    Raises ValueError where the context is shorter than a sequence's rows.
    """
    each = num_rows // num_sequences
    if context < each:
        raise ValueError(f"a context of {context} positions is shorter than the {each} rows of a sequence")
    tokens = torch.randint(0, vocab_size, (num_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    slots = [row // each for row in range(num_rows)]
    return Rows(tokens, slots, [context - each + row % each for row in range(num_rows)])


def reference_phase_seconds(weights: ModelWeights, rows: Rows, num_repeats: int) -> dict[str, float]:
    """Median seconds of each phase in PyTorch on a CPU, over steps after two that are not counted.

    Keys and values of the context are drawn: their values take no time. Raises ValueError for weights elsewhere.
    """
    if weights.embedding_VD.device.type != "cpu":
        raise ValueError("phases of 'reference' are measured on a CPU; on a GPU measure 'graph'")
    context = max(rows.positions) + 1
    plan = build_plan(weights.spec, formats_of(weights), 1, len(rows.tokens), context)
    memory = StepSemantics(plan, weights)
    for keys, values in memory.caches:
        keys.normal_()
        values.normal_()
    semantics = memory.semantics()
    samples: dict[str, list[float]] = {phase.name: [] for phase in plan.phases}
    with torch.no_grad():
        for step in range(NUM_WARMUPS + num_repeats):
            # Sampling goes on to the next position: every step is the same again.
            memory.set_rows(list(rows.tokens), list(rows.slots), list(rows.positions))
            for phase in plan.phases:
                body, started = semantics[phase.op], time.perf_counter()
                for item in range(phase.num_items):
                    for _ in body(phase, phase.index(item), step) or ():
                        pass
                if step >= NUM_WARMUPS:
                    samples[phase.name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}


def graph_phase_seconds(weights: ModelWeights, rows: Rows, num_repeats: int) -> dict[str, float]:
    """Median seconds of each phase's kernel, the mean over phases of its kind.

    Raises ValueError where the backend cannot run.
    """
    context, device = max(rows.positions) + 1, weights.embedding_VD.device
    backend = GraphBackend(weights, None, len(set(rows.slots)), context)
    for cache in backend.memory.caches:
        cache.normal_()
    backend.step(rows, range(len(rows.tokens)))
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    found: dict[str, float] = {}
    for _, launches in phase_kinds(backend.launches, weights.spec):
        run = replayer(launches, device)
        samples = []
        for _ in range(num_repeats):
            flush.zero_()
            samples.append(device_seconds(run, device) / len(launches))
        found |= {launch.phase.name: statistics.median(samples) for launch in launches}
    return {phase.name: found[phase.name] for phase in backend.plan.phases}


def measure_phases(backend: MeasuredBackend, weights: ModelWeights, rows: Rows, num_repeats: int) -> dict[str, float]:
    """Seconds of each phase of a step of `rows`, in the plan's order. Raises ValueError as the backend's own does."""
    measure = reference_phase_seconds if backend == "reference" else graph_phase_seconds
    return measure(weights, rows, num_repeats)


def phase_table(rows: Sequence[tuple[str, int, float, float | None]], where: str) -> str:
    """Lines of text: kinds of phases (name, how many, predicted and measured seconds) and the step."""
    has_measured = any(row[3] is not None for row in rows)
    totals = [sum(row[2] for row in rows), sum(row[3] or 0.0 for row in rows)]
    heads = f"{'':<20}{'phases':>7}{'predicted us':>14}{'share':>8}"
    lines = [heads + (f"{'measured us':>14}{'share':>8}   {where}" if has_measured else "")]
    for name, count, predicted, measured in [*rows, ("step", sum(row[1] for row in rows), totals[0], totals[1])]:
        line = f"{name:<20}{count:>7}{1e6 * predicted:>14.1f}{100 * predicted / totals[0]:>7.1f}%"
        if measured is not None and has_measured:
            line += f"{1e6 * measured:>14.1f}{100 * measured / totals[1]:>7.1f}%"
        lines.append(line)
    return "\n".join(lines)
