"""Timelines of decode steps in the Trace Event Format, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Predicted steps have two tracks with the same start times: the cost model's phases and their rooflines. A backend that
measures phases adds a track with the same span names.

Source of the format: Google, "Trace Event Format" (complete events, ph "X"; times in microseconds).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedstack.runtime.perf.cost import PhaseCost, StepCost
from speedstack.support.files import write_atomically


@dataclass(frozen=True)
class Span:
    """A time span. details: shown when it is selected."""

    name: str
    category: str
    start_seconds: float
    seconds: float
    details: dict[str, Any]


def predicted_tracks(cost: StepCost, num_steps: int = 1) -> dict[str, list[Span]]:
    """Consecutive steps as a track of predicted phases and one of their rooflines."""
    predicted, roofline = list[Span](), list[Span]()
    now = 0.0
    for step in range(num_steps):
        for phase in cost.phases:
            details = _details(phase) | {"step": step}
            predicted.append(Span(phase.name, phase.op, now, phase.predicted_seconds, details))
            roofline.append(Span(phase.name, phase.op, now, phase.roofline_seconds, details))
            now += phase.predicted_seconds
        if cost.draft_seconds:
            predicted.append(Span("draft", "draft", now, cost.draft_seconds, {"step": step}))
            now += cost.draft_seconds
    return {"predicted": predicted, "roofline": roofline}


def measured_track(seconds: Mapping[str, float], cost: StepCost, num_steps: int = 1) -> list[Span]:
    """Consecutive steps of measured phases, name -> seconds, with the predicted times as details."""
    predicted = {phase.name: phase for phase in cost.phases}
    spans, now = list[Span](), 0.0
    for step in range(num_steps):
        for name, measured in seconds.items():
            phase = predicted[name]
            details = {"step": step, "predicted us": round(1e6 * phase.predicted_seconds, 3)}
            spans.append(Span(name, phase.op, now, measured, details))
            now += measured
    return spans


def _details(phase: PhaseCost) -> dict[str, Any]:
    return {
        "weights MB": round(phase.weight_bytes / 1e6, 3),
        "KV MB": round(phase.kv_bytes / 1e6, 3),
        "GFLOP": round(phase.flops / 1e9, 3),
        "items": round(phase.num_items, 1),
        "balance": round(phase.balance, 3),
        "roofline us": round(1e6 * phase.roofline_seconds, 3),
    }


def trace_events(tracks: dict[str, list[Span]], process: str) -> dict[str, Any]:
    """The trace document: one process, one thread per track."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": process}}]
    for thread, (track, spans) in enumerate(tracks.items(), start=1):
        events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": thread, "args": {"name": track}})
        events += (_event(span, thread) for span in spans)
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _event(span: Span, thread: int) -> dict[str, Any]:
    start, duration = 1e6 * span.start_seconds, 1e6 * span.seconds
    names = {"ph": "X", "pid": 1, "tid": thread, "name": span.name, "cat": span.category}
    return names | {"ts": round(start, 4), "dur": round(duration, 4), "args": span.details}


def save_trace(tracks: dict[str, list[Span]], process: str, path: Path) -> Path:
    """Writes the document atomically. Raises OSError."""
    return write_atomically(path, json.dumps(trace_events(tracks, process)))


def total_seconds(spans: Iterable[Span]) -> float:
    """Seconds from the first start to the last end."""
    spans = list(spans)
    return max(span.start_seconds + span.seconds for span in spans) - min(span.start_seconds for span in spans)
