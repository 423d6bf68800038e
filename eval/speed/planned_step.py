"""A decode step as planned for a GPU, and what it costs there. Needs a config.json: no weights, and no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from speedstack.eval.config import DEMO_RUN
from speedstack.support.config import Section

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


class StepConfig(Section):
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


@dataclass(frozen=True)
class Planned:
    """A plan and its cost, with what they were made of."""

    spec: ModelSpec
    plan: Plan
    cost: StepCost
    gpu: Gpu
    formats: WeightFormats
    weights_bytes: float


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
