"""The `plan` verb: a model's decode plan, its cost on a GPU, and the proof that it is safe. Needs a config.json alone.

The model may stand before the flags: `speedstack plan MODEL --gpu H200`. A name that ends in .yaml or .yml is a config
file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from speedstack.eval.results.schema import Document, Record
from speedstack.eval.speed.planned_step import Planned, StepConfig, make_plan
from speedstack.support.config import load_config_of

if TYPE_CHECKING:
    from speedstack.runtime.perf.gpus import Gpu

GIGA, MEGA = 1e9, 1e6


class PlanConfig(StepConfig):
    """Plan a decode step: phases, bytes, FLOPs, roofline, and the proof."""

    json_output: bool = Field(False, description="Print JSON instead of tables; --json for short.")
    out: Path | None = Field(None, description="Write the JSON to this file as well.")


class OpRow(Record):
    """All phases of one kind in a step, on one GPU. seconds: roofline; share: of the step's roofline."""

    op: str
    num_phases: int
    num_items: float
    tile: int
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    flops: float
    balance: float
    roofline_seconds: float
    predicted_seconds: float
    share: float


class ProofRow(Record):
    """The proof's verdict."""

    is_safe: bool
    failure: str | None
    num_phases: int
    num_items: int
    num_steps: int
    num_conflicts: int
    seconds: float


class PlanResult(Document):
    """The verb's output. weight_formats: part -> format, as in `model.weight_formats`."""

    kind: Literal["plan"] = "plan"
    config: dict[str, Any]
    model_type: str
    num_layers: int
    gpu: str
    num_programs: int
    ops: tuple[OpRow, ...]
    weight_formats: dict[str, str] = Field(default={})
    weights_bytes: float
    cache_bytes: int
    buffer_bytes: int
    num_counters: int
    step_memory_bytes: float
    step_flops: float
    roofline_seconds: float
    predicted_seconds: float
    roofline_tokens_per_second: float
    predicted_tokens_per_second: float
    proof: ProofRow
    seconds: float


def load_plan_config(path: Path | None, overrides: Sequence[str]) -> PlanConfig:
    """The verb's config; a model directory or config.json in place of the YAML file becomes `model`.
    `--json` is short for `--json-output`."""
    flags = ["--json-output" if flag == "--json" else flag for flag in overrides]
    return load_config_of(PlanConfig, "model", path, flags)


def plan(config: PlanConfig) -> None:
    """Print the plan. Raises ValueError as `make_plan`, and for a plan that fails the proof."""
    started = time.perf_counter()
    from speedstack.runtime.plan.verify.proof import prove

    planned = make_plan(config)
    proof = prove(planned.plan)
    failure = None if proof.failure is None else f"{proof.failure.kind}: {proof.failure.message}"
    cost, memory = planned.cost, planned.plan.memory_bytes()
    cache = sum(size for name, size in memory.items() if name.endswith("cache"))
    result = PlanResult(
        config=config.model_dump(mode="json"),
        model_type=planned.spec.model_type,
        num_layers=planned.spec.num_layers,
        gpu=planned.gpu.name,
        num_programs=planned.plan.num_programs,
        ops=_rows(planned),
        weight_formats=asdict(planned.formats),
        weights_bytes=planned.weights_bytes,
        cache_bytes=cache,
        buffer_bytes=sum(memory.values()) - cache,
        num_counters=planned.plan.num_counters,
        step_memory_bytes=cost.memory_bytes,
        step_flops=cost.flops,
        roofline_seconds=cost.roofline_seconds,
        predicted_seconds=cost.predicted_seconds,
        roofline_tokens_per_second=cost.tokens_per_second(cost.roofline_seconds),
        predicted_tokens_per_second=cost.tokens_per_second(cost.predicted_seconds),
        proof=ProofRow(
            is_safe=proof.is_safe,
            failure=failure,
            num_phases=proof.num_phases,
            num_items=proof.num_items,
            num_steps=proof.num_steps,
            num_conflicts=proof.num_conflicts,
            seconds=proof.seconds,
        ),
        seconds=time.perf_counter() - started,
    )
    if config.json_output:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        _print(result, config, planned.gpu)
    if config.out is not None:
        path = result.save(config.out)
        if not config.json_output:
            print(f"written: {path}")
    if failure is not None:
        raise ValueError(f"the plan is not safe: {failure}")


def _rows(planned: Planned) -> tuple[OpRow, ...]:
    tiles = {cost.op: phase.tile for cost, phase in zip(planned.cost.phases, planned.plan.phases, strict=True)}
    total = planned.cost.roofline_seconds
    rows = []
    for op in dict.fromkeys(phase.op for phase in planned.cost.phases):
        phases = [phase for phase in planned.cost.phases if phase.op == op]
        seconds = sum(phase.roofline_seconds for phase in phases)
        rows.append(
            OpRow(
                op=op,
                num_phases=len(phases),
                num_items=sum(phase.num_items for phase in phases),
                tile=tiles[op],
                weight_bytes=sum(phase.weight_bytes for phase in phases),
                kv_bytes=sum(phase.kv_bytes for phase in phases),
                activation_bytes=sum(phase.activation_bytes for phase in phases),
                flops=sum(phase.flops for phase in phases),
                balance=sum(phase.balance for phase in phases) / len(phases),
                roofline_seconds=seconds,
                predicted_seconds=sum(phase.predicted_seconds for phase in phases),
                share=seconds / total,
            )
        )
    return tuple(rows)


def _print(result: PlanResult, config: PlanConfig, gpu: Gpu) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"{config.num_gpus} x {gpu.name}" if config.num_gpus > 1 else gpu.name
    each = " (each GPU)" if config.num_gpus > 1 else ""
    table = Table(title=f"{result.model_type}, {result.num_layers} layers, on {where}: one decode step{each}")
    table.add_column("phase")
    names = ("phases", "items", "tile", "weights MB", "KV MB", "act. MB", "GFLOP", "roofline us", "share", "balance")
    for name in (*names, "predicted us"):
        table.add_column(name, justify="right")
    for row in result.ops:
        table.add_row(
            row.op,
            str(row.num_phases),
            f"{row.num_items:.0f}",
            str(row.tile or "-"),
            f"{row.weight_bytes / MEGA:.1f}",
            f"{row.kv_bytes / MEGA:.1f}",
            f"{row.activation_bytes / MEGA:.2f}",
            f"{row.flops / GIGA:.2f}",
            f"{1e6 * row.roofline_seconds:.1f}",
            f"{100 * row.share:.1f}%",
            f"{100 * row.balance:.0f}%",
            f"{1e6 * row.predicted_seconds:.1f}",
        )
    table.add_section()
    table.add_row(
        "step", str(result.proof.num_phases), f"{sum(row.num_items for row in result.ops):.0f}", "",
        f"{sum(row.weight_bytes for row in result.ops) / MEGA:.1f}",
        f"{sum(row.kv_bytes for row in result.ops) / MEGA:.1f}",
        f"{sum(row.activation_bytes for row in result.ops) / MEGA:.2f}",
        f"{result.step_flops / GIGA:.2f}", f"{1e6 * result.roofline_seconds:.1f}", "100%", "",
        f"{1e6 * result.predicted_seconds:.1f}",
    )  # fmt: skip
    # Wide enough for files and pipes, where numbers must not be cut.
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    formats = (f"{part.replace('_', ' ')} {name}" for part, name in result.weight_formats.items())
    print(f"weights: {', '.join(formats)}")
    resident = result.weights_bytes + result.cache_bytes + result.buffer_bytes
    fits = "" if resident <= gpu.memory_bytes else f", MORE THAN THE {gpu.memory_bytes / GIGA:.0f} GB THERE ARE"
    print(
        f"memory{each}: weights {_size(result.weights_bytes)}, cache {_size(result.cache_bytes)}, "
        f"buffers {_size(result.buffer_bytes)}{fits}; {result.num_counters} counters, "
        f"{result.num_programs} programs"
    )
    is_drafting = config.acceptance_length > 1 or config.drafter is not None
    gain = f", acceptance length {config.acceptance_length:g}" if is_drafting else ""
    sequences = f"{config.num_sequences} sequence{'s' * (config.num_sequences > 1)}"
    print(
        f"roofline: {_time(result.roofline_seconds)} a step, {result.roofline_tokens_per_second:.0f} tokens/s at "
        f"most ({sequences}{gain}, {100 * config.bandwidth_fraction:g}% of the bandwidth)"
    )
    print(
        f"predicted: {_time(result.predicted_seconds)} a step, {result.predicted_tokens_per_second:.0f} tokens/s "
        f"(items as they divide, {config.handoff_us:g} us a synchronization"
        + (f", {config.all_reduce_us:g} us an exchange" if config.num_gpus > 1 else "")
        + ": assumptions, not measurements)"
    )
    if result.proof.is_safe:
        print(
            f"proof: safe. No deadlock, no race, any number of steps, any expert lists: {result.proof.num_items} items "
            f"in {result.proof.num_phases} phases, {result.proof.num_conflicts} conflicts ordered, state repeats after "
            f"{result.proof.num_steps} steps; {result.proof.seconds:.2f} s"
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIGA:.2f} GB" if num_bytes >= GIGA else f"{num_bytes / MEGA:.1f} MB"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} us"
