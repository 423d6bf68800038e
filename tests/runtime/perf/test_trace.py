"""Timelines: phases one after another, under the plan's names, in a format that Perfetto reads."""

import itertools
import json
from pathlib import Path

import pytest

from speedstack.cli import main
from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.perf.cost import Assumptions, step_cost
from speedstack.runtime.perf.gpus import gpu_named
from speedstack.runtime.perf.trace import predicted_tracks, total_seconds
from speedstack.runtime.plan.step import build_plan

QWEN = Path(__file__).parents[2] / "shapes" / "qwen3-30b-a3b.json"


def test_spans_follow_each_other_and_bear_the_plans_names() -> None:
    spec, formats = read_model_config(QWEN)
    plan = build_plan(spec, formats, 132, 1, 1024)
    cost = step_cost(plan, gpu_named("H200"), 1, 1, 1024, Assumptions(draft_us=50))
    tracks = predicted_tracks(cost, num_steps=2)
    spans = tracks["predicted"]
    names = [phase.name for phase in plan.phases]
    assert [span.name for span in spans] == 2 * [*names, "draft"]
    assert [span.name for span in tracks["roofline"]] == 2 * names
    for before, after in itertools.pairwise(spans):
        assert after.start_seconds == pytest.approx(before.start_seconds + before.seconds)
    assert total_seconds(spans) == pytest.approx(2 * (cost.predicted_seconds + 50e-6))
    phases = [span for span in spans if span.category != "draft"]
    assert all(span.seconds >= bound.seconds for span, bound in zip(phases, tracks["roofline"], strict=True))


def test_the_verb_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "trace.json"
    assert main(["trace", str(QWEN), "--experts", "mxfp4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed and "341 phases" in printed
    document = json.loads(out.read_text(encoding="utf-8"))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(events) == 2 * 341
    assert {event["tid"] for event in events} == {1, 2}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    head = next(event for event in events if event["name"] == "lm_head")
    # 151,936 rows of 2,048 weights and a norm, bf16
    assert head["args"]["weights MB"] == pytest.approx((151936 * 2048 * 2 + 4096) / 1e6, abs=1e-3)
    assert main(["trace", str(QWEN), "--rows", "40", "--out", str(out)]) == 2
