"""Timelines of decode steps in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A track is a list of spans. Predicted steps have two: the phases of a step one after another as the cost model has them,
and their roofline, started at the same moments, so that the gap between a phase and its bound is seen. Spans are named
as the plan names its phases; a backend that measures them adds a track of its own by the same names.

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
    """Something that lasted. details: shown when it is selected."""

    name: str
    category: str
    start_seconds: float
    seconds: float
    details: dict[str, Any]


def predicted_tracks(cost: StepCost, num_steps: int = 1) -> dict[str, list[Span]]:
    """Steps of a cost, one after another: a track of predicted phases and one of their rooflines."""
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
    """Steps of measured phases, name -> seconds, one after another; the predicted times are in the details."""
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
    """The document: one process, one thread a track."""
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
    """Write the document, whole or not at all. Raises OSError as the file system does."""
    return write_atomically(path, json.dumps(trace_events(tracks, process)))


def total_seconds(spans: Iterable[Span]) -> float:
    """From the start of the first to the end of the last."""
    spans = list(spans)
    return max(span.start_seconds + span.seconds for span in spans) - min(span.start_seconds for span in spans)
