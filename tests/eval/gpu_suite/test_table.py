"""Verdicts of targets, from documents made by hand."""

from typing import Any

import pytest

from speedstack.eval.gpu_suite.table import judge, text


def cell(rows: int = 1, **milliseconds: float) -> dict[str, Any]:
    contestants = {
        name: {"step_seconds": {"median": value / 1e3}, "mbu": 2 / value, "is_extrapolated": name == "transformers"}
        for name, value in milliseconds.items()
    }
    return {"rows": rows, "context": 1024, "contestants": contestants}


def document(*cells: dict[str, Any], **quant: float) -> dict[str, Any]:
    timings = [
        {"operation": operation, "contestant": contestant, "fraction_of_copy": fraction}
        for operation, fraction in quant.items()
        for contestant, fraction in (("speedstack", fraction), ("speedstack, PyTorch reference", 0.01))
    ]
    found = {"cells": list(cells), "num_layers": 24, "num_layers_of_model": 48, "failed": {"graph": "killed: late"}}
    return {
        "sections": {
            "environment": {"result": {"copy": {"median": 4.2e12, "best": 4.3e12}}},
            "speed": {"result": {"qwen3-30b-a3b": found}},
            "quant": {"result": {"timings": timings}},
        }
    }


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {row["target"]: row["verdict"] for row in judge(document)}


def test_met_missed_unmeasured() -> None:
    fast = cell(resident=2.0, graph=2.4, transformers=8.0)
    slow = cell(8, resident=4.0, graph=4.2, transformers=11.0)
    assert set(verdicts({}).values()) == {"unmeasured"}
    met = verdicts(document(fast, fake_quantize=0.9, quantize=0.8))
    assert met == dict.fromkeys(met, "met")
    missed = verdicts(document(fast, slow, fake_quantize=0.79, quantize=0.8))
    assert missed == dict.fromkeys(missed, "missed") | {"pack, of copy": "met"}
    half = verdicts(document(fast, cell(resident=2.0)))
    assert half["resident MBU"] == "met" and half["resident / graph"] == "unmeasured"
    assert verdicts(document(slow, cell(resident=2.0)))["resident / graph"] == "missed", "one that misses is enough"
    row = judge(document(fast, slow))[1]
    assert (row["lowest"], row["highest"]) == (pytest.approx(1.05), pytest.approx(1.2))
    assert (row["num_met"], row["num_measured"], row["num_cells"]) == (1, 2, 2)


def test_text_says_how_compiling_went() -> None:
    job = {"backend": "graph", "model": "gpt-oss-20b", "length": 1184, "flavour": "plain", "is_check": False}
    good = {"num_kernels": 13, "seconds": 12.0, "ended": 31.0, "error": None}
    bad = {"num_kernels": 0, "seconds": 2.0, "ended": 40.0, "error": "PTXASError: none"}
    shown = text(document() | {"kernels": [job | good, job | good | {"seconds": 9.0, "ended": 33.0}, job | bad]})
    assert "26 kernels compiled ahead in 33 s, the slowest plan's in 12 s" in shown
    assert "not compiled ahead: graph, gpt-oss-20b, 1184, plain: PTXASError: none" in shown
    assert "compiled ahead" not in text(document())


def test_text_says_what_is_extrapolated_cut_or_missing() -> None:
    fast = cell(resident=2.0, transformers=8.0)
    phase = {"phase": "qkv", "num_phases": 48, "seconds": 48e-5, "predicted_seconds": 48e-6, "roofline_seconds": 24e-6}
    fast["contestants"]["graph"] = {"step_seconds": {"median": 2.4e-3}, "mbu": None, "phases": [phase]}
    shown = text(document(fast, fake_quantize=0.9))
    assert "8.000*" in shown and "* extrapolated from two depths" in shown
    assert "the first 24 of 48 layers" in shown and "qwen3-30b-a3b, graph: killed: late" in shown
    assert "qkv                              48     10.00      1.00      0.50" in shown
    assert "copy: 4.200 TB/s median, 4.300 best" in shown
    assert shown.splitlines()[-1].split() == ["pack,", "of", "copy", "0.80", "unmeasured", "-", "-", "0", "of", "0"]
