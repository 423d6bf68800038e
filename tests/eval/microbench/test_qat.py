"""The measure of what fake-quant costs counts what it says it counts."""

import json
import sys
from pathlib import Path

import pytest
import torch

from speedstack.eval.microbench.qat import LayerShape, QatCost, main, measure_layers, measure_steps
from speedstack.quant.checkpoint import load_model
from speedstack.quant.experts import expert_parameters

SHAPE = LayerShape(
    hidden_size=64, intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_layers=3, num_tokens=16
)
NUM_WEIGHTS = 4 * 3 * 64 * 32


def test_kept_bytes_are_those_of_the_formats() -> None:
    packed, plain = measure_layers("packed", SHAPE), measure_layers("plain", SHAPE)
    assert packed.kept_weight_bytes == NUM_WEIGHTS * 17 // 32
    assert plain.kept_weight_bytes == NUM_WEIGHTS * 2
    assert packed.kept_other_bytes > 0 and packed.peak_bytes >= 0


def test_steps_are_timed_both_ways(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir)
    step = measure_steps(model, "float32", num_steps=2, num_sequences=2, sequence_length=16)
    assert len(step.fake_quant_ms) == len(step.plain_ms) == 2
    assert min(step.fake_quant_ms + step.plain_ms) > 0
    assert step.ratio == pytest.approx(sum(step.fake_quant_ms) / sum(step.plain_ms)), "a median of two is their mean"
    assert step.num_expert_parameters == sum(weight.numel() for weight in expert_parameters(model).values())
    assert step.num_tokens == 32 and step.num_parameters > step.num_expert_parameters


@pytest.mark.slow
def test_result_file(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost.json"
    size = ["--num-experts", "8", "--num-layers", "1", "--num-tokens", "32", "--num-steps", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_qat", "--model", str(tiny_model_dir), "--out", str(path), *size])
    assert main() == 0
    assert f"written: {path}" in capsys.readouterr().out
    result = QatCost.load(path)
    assert {layer.way for layer in result.layers} == {"packed", "plain"}
    assert [step.precision for step in result.steps] == ["float32", "bfloat16"]
    assert json.loads(path.read_text())["layer_shape"]["num_experts"] == 8
    assert torch.tensor([layer.peak_bytes for layer in result.layers]).min() > 0
