"""The whole suite on a CPU: kernels interpreted, every part run, in processes that have nothing a GPU machine lacks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.speed.worker import INTERPRET

# This project's dependencies but for torch, Triton, transformers and what those two need themselves.
BLOCKED = ("pydantic", "tyro", "lm_eval", "datasets", "deepspeed", "wandb", "matplotlib", "rich", "compressed_tensors")


def environment(folder: Path) -> dict[str, str]:
    """Every Python process started with it finds those packages missing."""
    folder.mkdir()
    code = f"import sys\nfor name in {BLOCKED!r}:\n    sys.modules[name] = None\n"
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {name: value for name, value in os.environ.items() if name != INTERPRET} | {"PYTHONPATH": path}


def test_imports_need_no_more_than_torch_and_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, importlib, pkgutil\n"
        "import speedstack.eval.gpu_suite as suite\n"
        "from speedstack.runtime import Engine\n"
        "for module in pkgutil.iter_modules(suite.__path__):\n"
        "    importlib.import_module(f'{suite.__name__}.{module.name}')\n"
        f"assert all(sys.modules[name] is None for name in {BLOCKED!r})\n"
        "print(Engine.__name__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path / "site"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.strip() == "Engine", result.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_a_cpu_with_interpreted_kernels(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "speedstack.eval.gpu_suite", "--device", "cpu", "--minutes", "12"]
    result = subprocess.run(
        [*command, "--models", "gpt-oss-20b", "--contestants", "resident,graph,transformers", "--out", str(out)],
        env=environment(tmp_path / "site"), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shown = result.stdout[-3000:] + result.stderr[-3000:]
    assert result.returncode == 0, shown
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["is_complete"] and found["scale"] == "tiny"
    sections: dict[str, Any] = {name: record["result"] for name, record in found["sections"].items()}
    assert sections["environment"]["copy"]["median"] > 0
    check_correctness(sections["correctness"])
    check_speed(sections["headline"]["gpt-oss-20b"])
    assert sections["speed"]["gpt-oss-20b"]["cells"] == [], "there is one cell, which is the headline"
    assert {row["operation"] for row in sections["quant"]["timings"]} >= {"quantize", "fake_quantize", "copy"}
    verdicts = {row["target"]: row["verdict"] for row in found["targets"]}
    assert verdicts["pack, of copy"] in ("met", "missed")
    assert "resident / graph" in result.stdout and str(out) in result.stdout
    assert "no figure here is a timing" in result.stdout


def check_correctness(result: dict[str, Any]) -> None:
    assert list(result) == ["resident", "graph"]
    for backend, models in result.items():
        (checks,) = models.values()
        assert list(models) == ["gpt-oss-20b"]
        assert {name: check["passed"] for name, check in checks.items()} == {
            "check_buffers": True, "check_row_invariance": True, "check_text": True, "check_sampling": True,
            "check_edges": True,
        }, backend  # fmt: skip
        buffers = checks["check_buffers"]
        # One launch is a whole step of the resident backend: only what it leaves is compared.
        assert buffers["num_tokens_compared"] > 0
        assert len(buffers["errors"]) > 10 if backend == "graph" else list(buffers["errors"]) == ["logits"]
        assert buffers["largest_error"] <= buffers["tolerance"]
        sampling = checks["check_sampling"]
        assert sampling["num_tokens_compared"] >= 8 if backend == "resident" else sampling["is_drawn_by_host"]
        assert checks["check_edges"]["num_rows_decided"] > checks["check_edges"]["num_rows_lost"] > 0
        assert checks["check_text"]["num_tokens"] > 0 and len(checks["check_row_invariance"]["companies"]) == 6


def check_speed(result: dict[str, Any]) -> None:
    assert result["failed"] == {}
    assert result["num_layers"] == result["num_layers_of_model"] == 2
    (cell,) = result["cells"]
    assert (cell["rows"], cell["context"]) == (2, 14)
    graph, peer = cell["contestants"]["graph"], cell["contestants"]["transformers"]
    for entry in (graph, peer, cell["contestants"]["resident"]):
        assert entry["step_seconds"]["num_repeats"] == 2 and entry["mbu"] > 0
    assert peer["experts_implementation"] == "grouped_mm" and not peer["is_extrapolated"]
    assert len(peer["depth_seconds"]) == 2
    # Two rows choose two of four experts each, and what is read differs from what is expected by those alone.
    counted, expected = graph["active_experts_a_layer"], graph["expected_active_experts_a_layer"]
    assert 2 <= counted <= 4 and expected == 3
    one_expert = 3 * 64 * 32 * 4.25 / 8 + (2 * 32 + 64) * 2  # gate, up and down; biases counted as bfloat16
    difference = 2 * (counted - expected) * one_expert
    assert graph["read_bytes"] - graph["expected_read_bytes"] == pytest.approx(difference)
    assert graph["decode_tokens_per_second"] > 0 and cell["contestants"]["resident"]["decode_tokens_per_second"] > 0
    phases = {phase["phase"]: phase for phase in graph["phases"]}
    kinds = {"attention (window 12)", "attention (global)", "embed", "lm_head", "router", "expert_down"}
    assert kinds <= set(phases) and all(phase["seconds"] > 0 for phase in phases.values())
    assert sum(phase["read_bytes"] for phase in phases.values()) == pytest.approx(graph["expected_read_bytes"])
