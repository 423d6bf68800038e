"""The `trace` verb: one decode step on a time axis, as the cost model predicts it.

The model may be named before the flags: `speedstack trace MODEL --gpu H200`. The file opens in Perfetto. Spans are the
plan's phases, so that a measured step can be laid beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from speedstack.plan import StepConfig, make_plan


class TraceConfig(StepConfig):
    """Write a timeline of predicted decode steps."""

    num_steps: int = Field(1, ge=1, le=100, description="Steps in the timeline.")
    out: Path = Field(Path("runs/trace/trace.json"), description="File for the timeline.")


def load_trace_config(path: Path | None, overrides: Sequence[str]) -> TraceConfig:
    """As every verb's; instead of a YAML file, a model directory or a config.json may be named: the `model`."""
    from speedstack.train.config import load_config

    if path is not None and path.suffix not in (".yaml", ".yml"):
        return load_config(TraceConfig, None, ["--model", str(path), *overrides])
    return load_config(TraceConfig, path, overrides)


def trace(config: TraceConfig) -> None:
    """Write the timeline. Raises ValueError as `plan` does for its input, OSError as the file system does."""
    from speedstack.runtime.trace import predicted_tracks, save_trace, total_seconds

    planned = make_plan(config)
    tracks = predicted_tracks(planned.cost, config.num_steps)
    where = f"{config.num_gpus} x {planned.gpu.name}" if config.num_gpus > 1 else planned.gpu.name
    path = save_trace(tracks, f"{planned.spec.model_type} on {where}, predicted", config.out)
    print(
        f"{len(tracks['predicted'])} phases, {1e3 * total_seconds(tracks['predicted']):.3f} ms predicted, "
        f"{1e3 * config.num_steps * planned.cost.roofline_seconds:.3f} ms roofline; open it at ui.perfetto.dev"
    )
    print(f"written: {path}")
