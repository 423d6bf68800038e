"""Measured phases: the plan's names, a track beside the predicted one, a table; what cannot be measured is refused."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speedstack.cli import main
from speedstack.eval.speed.phase_times import measure_phases, phase_table, step_rows
from speedstack.runtime.backends.gpu.base import formats_of
from speedstack.runtime.model.loading import load_target
from speedstack.runtime.plan.step import build_plan


def events_by_track(out: Path) -> dict[str, list[dict[str, Any]]]:
    events = json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return {names[tid]: [e for e in events if e["ph"] == "X" and e["tid"] == tid] for tid in names}


def test_rows_are_the_last_of_their_sequences() -> None:
    rows = step_rows(6, 2, 20, 512)
    assert rows.slots == [0, 0, 0, 1, 1, 1] and rows.positions == [17, 18, 19] * 2
    with pytest.raises(ValueError, match="2 positions is shorter than the 3 rows"):
        step_rows(6, 2, 2, 512)


def test_every_phase_of_a_gpus_plan_is_measured(tiny_packed_dir: Path) -> None:
    weights = load_target(tiny_packed_dir, "cpu").weights
    seconds = measure_phases("reference", weights, step_rows(2, 1, 24, 512), num_repeats=2)
    plan = build_plan(weights.spec, formats_of(weights), 132, 2, 24)
    assert list(seconds) == [phase.name for phase in plan.phases] and all(value > 0 for value in seconds.values())


def test_the_verb_measures_beside_the_prediction(
    tiny_packed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trace.json"
    arguments = ["trace", str(tiny_packed_dir), "--context", "20", "--num-repeats", "2", "--num-steps", "2"]
    assert main([*arguments, "--measure", "reference", "--out", str(out)]) == 0
    tracks = events_by_track(out)
    (name,) = (name for name in tracks if name.startswith("measured: reference, "))
    predicted, measured = tracks["predicted"], tracks[name]
    assert [event["name"] for event in measured] == [event["name"] for event in predicted]
    assert measured[0]["args"]["predicted us"] == pytest.approx(predicted[0]["dur"], abs=1e-3)
    # One after another, each as long as in the other step.
    half = len(measured) // 2
    assert [event["dur"] for event in measured[:half]] == [event["dur"] for event in measured[half:]]
    for before, after in itertools.pairwise(measured):
        assert after["ts"] == pytest.approx(before["ts"] + before["dur"], abs=1e-2)
    lines = capsys.readouterr().out.splitlines()
    step = next(line for line in lines if line.startswith("step")).split()
    assert step[1] == str(half) and step[3] == step[5] == "100.0%"
    total_us = sum(event["dur"] for event in measured[:half])
    assert float(step[4]) == pytest.approx(total_us, abs=0.1)


def test_without_measuring_there_is_no_such_column() -> None:
    text = phase_table([("embed", 1, 1e-6, None), ("qkv", 3, 3e-6, None)], "")
    assert "measured" not in text and text.splitlines()[-1].split() == ["step", "4", "4.0", "100.0%"]


def test_refusals(tiny_packed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = ["--measure", "reference", "--out", str(tmp_path / "trace.json")]
    for arguments, message in (
        ([str(tiny_packed_dir / "config.json"), *measure, "--context", "20"], "measuring needs weights"),
        ([str(tiny_packed_dir), *measure, "--experts", "mxfp4"], "on one device: leave out experts"),
        ([str(tiny_packed_dir), *measure, "--num-gpus", "2"], "leave out num_gpus"),
        ([str(tiny_packed_dir), *measure, "--context", "300"], "outside the model's 1 to 256 positions"),
        (
            [str(tiny_packed_dir), *measure, "--rows", "4", "--sequences", "1", "--context", "3"],
            "3 positions is shorter",
        ),
    ):
        assert main(["trace", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_measured_one_by_one(tiny_packed_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    command = [sys.executable, "-m", "speedstack", "trace", str(tiny_packed_dir), "--measure", "graph"]
    command += ["--context", "20", "--num-repeats", "1", "--out", str(out)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    tracks = events_by_track(out)
    (name,) = (name for name in tracks if name.startswith("measured: graph, "))
    assert [event["name"] for event in tracks[name]] == [event["name"] for event in tracks["predicted"]]
    assert all(event["dur"] > 0 for event in tracks[name])
