"""The `plan` verb: a model's decode plan, its cost on a GPU, and the proof that it is safe. Needs a config.json alone.

The model may be named before the flags, where other verbs take a config file: `speedstack plan MODEL --gpu H200`. A
name that ends in .yaml or .yml is a config file here too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from speedstack.eval.config import DEMO_RUN, VerbConfig
from speedstack.eval.results.schema import Document, Record

if TYPE_CHECKING:
    from speedstack.runtime.model.drafter_spec import DrafterSpec
    from speedstack.runtime.model.spec import ModelSpec
    from speedstack.runtime.model.weight_formats import WeightFormats
    from speedstack.runtime.perf.cost import StepCost
    from speedstack.runtime.perf.gpus import Gpu
    from speedstack.runtime.plan.ir import Plan

Format = Literal[
    "checkpoint",
    "float32",
    "bf16",
    "fp8",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "nvfp4",
    "int4_g32",
    "int2_g32",
]
GIGA, MEGA = 1e9, 1e6


class StepConfig(VerbConfig):
    """Which model's step is planned, for which GPU, and what is assumed about it."""

    model: Path = Field(
        DEMO_RUN / "qad" / "export", description="Model directory, or a config.json; no weights needed."
    )
    drafter: Path | None = Field(
        None,
        description="DFlash directory or its config.json, no weights needed: the step drafts as well. draft_us is then "
        "0, and rows hold each sequence's token and its drafts.",
    )
    gpu: str = Field(
        "H200", description="GPU to plan for, by name: H100, H200, H20, B200, A100, L40S, RTX4090, RTX5090."
    )
    num_gpus: int = Field(1, ge=1, description="GPUs that share the model by tensor parallelism.")
    programs_per_sm: int = Field(1, ge=1, le=4, description="Programs of the persistent kernel on a multiprocessor.")
    rows: int = Field(1, ge=1, le=16, description="Tokens computed in a step.")
    sequences: int | None = Field(
        None,
        ge=1,
        description="Sequences they belong to; None: one with a drafter or acceptance_length above 1, else one a row.",
    )
    context: int = Field(1024, ge=1, description="Positions that each row attends to.")
    split_size: int = Field(256, ge=16, description="Positions of the context that one work item attends to.")
    experts: Format = Field(
        "checkpoint", description="Weight format of routed experts; checkpoint: as config.json says."
    )
    attention: Format = Field(
        "checkpoint", description="Weight format of the query, key, value and output projections."
    )
    lm_head: Format = Field("checkpoint", description="Weight format of the LM head.")
    acceptance_length: float = Field(
        1.0, ge=1, description="Tokens that a sequence gains in a step: with a drafter more than one."
    )
    draft_us: float = Field(0.0, ge=0, description="Time of drafting a block, microseconds, added to every step.")
    bandwidth_fraction: float = Field(
        1.0, gt=0, le=1, description="Part of the GPU's memory bandwidth that is reached; a plain copy reaches 0.9."
    )
    handoff_us: float = Field(
        1.0, ge=0, description="Assumed time from a phase's last signal to the next phase's start."
    )
    all_reduce_us: float = Field(8.0, ge=0, description="Assumed time of one exchange among the GPUs.")

    @model_validator(mode="after")
    def _rows_fit(self) -> StepConfig:
        if self.rows % self.num_sequences:
            raise ValueError(f"{self.rows} rows cannot be shared out evenly among {self.num_sequences} sequences")
        limit = self.rows // self.num_sequences
        if self.acceptance_length > limit:
            raise ValueError(
                f"a step of {limit} rows a sequence cannot gain {self.acceptance_length} tokens: raise rows, which "
                "hold the drafted block, or lower acceptance_length"
            )
        if self.drafter is not None and self.draft_us:
            raise ValueError("draft_us is a guess of what drafter has phases for: give one of them")
        if self.drafter is not None and self.num_gpus > 1:
            raise ValueError("a drafter is planned for one GPU: leave out num_gpus, or give draft_us instead")
        if self.drafter is not None and limit < 2:
            raise ValueError("a step with a drafter takes at least two rows a sequence: raise rows")
        return self

    @property
    def num_sequences(self) -> int:
        if self.sequences is not None:
            return self.sequences
        return 1 if self.acceptance_length > 1 or self.drafter is not None else self.rows


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
    """Everything the verb prints. weight_formats: part -> format, as in `model.weight_formats`."""

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


@dataclass(frozen=True)
class Planned:
    """A plan and its cost, with what they were made of."""

    spec: ModelSpec
    plan: Plan
    cost: StepCost
    gpu: Gpu
    formats: WeightFormats
    weights_bytes: float


def load_plan_config(path: Path | None, overrides: Sequence[str]) -> PlanConfig:
    """As every verb's; instead of a YAML file, a model directory or a config.json may be named, which is then `model`.
    `--json` is short for `--json-output`."""
    from speedstack.train.config.recipes import load_config_of

    flags = ["--json-output" if flag == "--json" else flag for flag in overrides]
    return load_config_of(PlanConfig, "model", path, flags)


def make_plan(config: StepConfig, formats: WeightFormats | None = None) -> Planned:
    """Reads the model's shape, plans one GPU's step and costs it; `formats` are in the place of the checkpoint's.

    Raises ValueError, one line, for bad input.
    """
    from speedstack.runtime.model.config_file import read_model_config
    from speedstack.runtime.model.tensor_parallel import shard
    from speedstack.runtime.perf.cost import Assumptions, step_cost, weights_bytes
    from speedstack.runtime.perf.gpus import gpu_named
    from speedstack.runtime.plan.step import build_plan

    gpu = gpu_named(config.gpu)
    spec, stored_formats = read_model_config(config.model)
    formats = formats or stored_formats
    wanted = {
        "experts": config.experts,
        "attention": config.attention,
        "attention_output": config.attention,
        "lm_head": config.lm_head,
    }
    formats = replace(formats, **{part: chosen for part, chosen in wanted.items() if chosen != "checkpoint"})
    part = shard(spec, config.num_gpus)
    drafter = _drafter_spec(config, spec)
    plan = build_plan(
        part,
        formats,
        gpu.num_sms * config.programs_per_sm,
        config.rows,
        config.context,
        config.split_size,
        is_sharded=config.num_gpus > 1,
        drafter=drafter,
    )
    assumptions = Assumptions(
        config.bandwidth_fraction,
        config.handoff_us,
        config.all_reduce_us,
        config.draft_us,
        config.acceptance_length,
    )
    cost = step_cost(plan, gpu, config.rows, config.num_sequences, config.context, assumptions)
    embedding = formats.num_bytes("embedding", spec.vocab_size * spec.hidden_size)
    return Planned(spec, plan, cost, gpu, formats, weights_bytes(plan, embedding))


def _drafter_spec(config: StepConfig, target: ModelSpec) -> DrafterSpec | None:
    if config.drafter is None:
        return None
    from speedstack.dflash.checkpoint import check_target, load_config
    from speedstack.runtime.model.drafter_spec import drafter_spec, why_not_planned

    drafter = load_config(config.drafter.parent if config.drafter.name == "config.json" else config.drafter)
    check_target(drafter, None, target.hidden_size, target.num_layers, target.vocab_size)
    reason = why_not_planned(drafter)
    if reason is not None:
        raise ValueError(f"{config.drafter} has {reason}, for which a plan has no phases: give draft_us instead")
    num_drafts = config.rows // config.num_sequences - 1
    if num_drafts > drafter.num_proposals:
        raise ValueError(f"{num_drafts} drafts a sequence are more than the drafter's {drafter.num_proposals}")
    return drafter_spec(drafter)


def plan(config: PlanConfig) -> None:
    """Print the plan. Raises ValueError as `make_plan`, and for a plan that the proof rejects."""
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
    # As wide as it needs to be where nobody looks: a file or a pipe must not cut numbers.
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
        f"(items as they divide, {config.handoff_us:g} us a hand-off"
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
