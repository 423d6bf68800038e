"""The `trace` verb: one decode step on a time axis, as the cost model predicts it, and as it was measured here.

The model may stand before the flags: `speedstack trace MODEL --gpu H200 --measure reference`. The file opens in
Perfetto, with the plan's phases as spans in all tracks; the table sums them by kind. The prediction is for `gpu`, the
measurement is from this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from speedstack.eval.speed.planned_step import Planned, StepConfig, make_plan
from speedstack.support.config import load_config_of

if TYPE_CHECKING:
    from speedstack.runtime.model.weights import ModelWeights

# Settings of steps that are only planned and cannot run here.
_PLANNED_ONLY = ("drafter", "num_gpus", "programs_per_sm", "split_size", "experts", "attention", "lm_head")


class TraceConfig(StepConfig):
    """Write a timeline of decode steps, predicted and measured."""

    measure: Literal["none", "reference", "graph"] = Field(
        "none",
        description="Time the phases here, with the model's weights: reference in PyTorch on a CPU, graph as Triton "
        "kernels on a GPU.",
    )
    num_repeats: int = Field(9, ge=1, description="Repeats of every measured phase, of which the median counts.")
    num_steps: int = Field(1, ge=1, le=100, description="Steps in the timeline.")
    out: Path = Field(Path("runs/trace/trace.json"), description="File for the timeline.")

    @model_validator(mode="after")
    def _measured_as_it_is(self) -> TraceConfig:
        changed = [name for name in _PLANNED_ONLY if getattr(self, name) != type(self).model_fields[name].default]
        if self.measure != "none" and changed:
            raise ValueError(f"measure times the checkpoint as it is, on one device: leave out {', '.join(changed)}")
        return self


def load_trace_config(path: Path | None, overrides: Sequence[str]) -> TraceConfig:
    """The verb's config; a model directory or config.json in place of the YAML file becomes `model`."""
    return load_config_of(TraceConfig, "model", path, overrides)


def trace(config: TraceConfig) -> None:
    """Write the timeline and print the table.

    Raises ValueError as `plan`, and for a model that cannot be measured here; OSError.
    """
    from speedstack.eval.speed.phase_times import phase_table
    from speedstack.runtime.perf.trace import measured_track, predicted_tracks, save_trace, total_seconds

    planned = make_plan(config)
    tracks = predicted_tracks(planned.cost, config.num_steps)
    where = f"{config.num_gpus} x {planned.gpu.name}" if config.num_gpus > 1 else planned.gpu.name
    title, measured, place = f"{planned.spec.model_type} on {where}, predicted", dict[str, float](), ""
    if config.measure != "none":
        measured, place = _measure(config)
        tracks[f"measured: {place}"] = measured_track(measured, planned.cost, config.num_steps)
        title += ", and measured"
    path = save_trace(tracks, title, config.out)
    print(phase_table(_kinds(planned, measured), place))
    print(
        f"{len(tracks['predicted'])} phases, {1e3 * total_seconds(tracks['predicted']):.3f} ms predicted on {where}, "
        f"{1e3 * config.num_steps * planned.cost.roofline_seconds:.3f} ms roofline; open it at ui.perfetto.dev"
    )
    print(f"written: {path}")


def _measure(config: TraceConfig) -> tuple[dict[str, float], str]:
    """Seconds of every phase, and a description of backend and machine."""
    from speedstack.eval.results.environment import describe_environment
    from speedstack.eval.results.table import plural
    from speedstack.eval.speed.phase_times import measure_phases, step_rows

    assert config.measure != "none"
    weights = _weights(config)
    rows = step_rows(config.rows, config.num_sequences, config.context, weights.spec.vocab_size)
    seconds = measure_phases(config.measure, weights, rows, config.num_repeats)
    machine = describe_environment()
    if weights.embedding_VD.device.type == "cuda":
        return seconds, f"{config.measure}, {machine.gpus[0]}"
    return seconds, f"{config.measure}, {machine.cpu_model}, {plural(machine.num_threads, 'thread')}"


def _weights(config: TraceConfig) -> ModelWeights:
    import torch

    from speedstack.runtime.model.loading import load_target

    if not config.model.is_dir():
        raise ValueError(f"measuring needs weights: {config.model} is no model directory")
    device = "cuda" if config.measure == "graph" and torch.cuda.is_available() else "cpu"
    return load_target(config.model, device).weights


def _kinds(planned: Planned, measured: dict[str, float]) -> list[tuple[str, int, float, float | None]]:
    """Phases by operation in step order: name, count, predicted and measured seconds."""
    kinds = []
    for op in dict.fromkeys(phase.op for phase in planned.cost.phases):
        phases = [phase for phase in planned.cost.phases if phase.op == op]
        seconds = sum(measured[phase.name] for phase in phases) if measured else None
        kinds.append((op, len(phases), sum(phase.predicted_seconds for phase in phases), seconds))
    return kinds
