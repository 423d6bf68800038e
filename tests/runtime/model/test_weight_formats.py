"""Weight formats as the plan counts them: what a config.json says, and how many bits each takes."""

import math
from dataclasses import replace
from typing import Any

import pytest

from speedstack.quant.formats import FORMATS
from speedstack.runtime.model.weight_formats import WeightFormats, formats_from_fields, weight_format


def test_formats_of_checkpoints() -> None:
    def formats(**fields: Any) -> WeightFormats:
        return formats_from_fields({"model_type": "qwen3_moe", **fields})

    assert formats() == WeightFormats()
    assert formats(torch_dtype="float32").experts == "float32"
    packed = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    assert formats(quantization_config=packed) == WeightFormats(experts="mxfp4")
    assert formats(quantization_config={"quant_method": "fp8"}).attention_output == "fp8"
    fp8 = WeightFormats("fp8", "fp8", "fp8", "bf16", "fp8")
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("model.layers.0.self_attn.o_proj", {"attention_output": "bf16"}),
        ("model.layers.0.self_attn.q_proj", {"attention": "bf16"}),
        ("model.layers.0.self_attn", {"attention": "bf16", "attention_output": "bf16"}),
        ("model.layers.0.mlp.up_proj", {"dense": "bf16"}),
        ("model.layers.0.mlp", {"dense": "bf16"}),
        ("model.layers.1", {"attention": "bf16", "attention_output": "bf16", "dense": "bf16"}),
        ("model.layers.1.mlp.experts.0.gate_proj", {"experts": "bf16"}),
        # What is none of the parts, or of a prediction head and no layer of the model.
        *((f"model.layers.1.mlp.{name}", {}) for name in ("shared_experts.gate_proj", "gate", "shared_expert_gate")),
        ("lm_head", {}),
        ("model.layers.2.self_attn", {}),
        ("model.mtp.layers.0.self_attn.q_proj", {}),
    )
    for name, changed in cases:
        quantization = {"quant_method": "fp8", "ignored_layers": [name]}
        assert formats(num_hidden_layers=2, quantization_config=quantization) == replace(fp8, **changed), name
    with pytest.raises(ValueError, match="'awq' is not known"):
        formats(quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="dtype 'int8'"):
        formats(dtype="int8")
    # 4 bits and a byte for 32; a float32 for 128 x 128
    assert WeightFormats(experts="mxfp4").num_bytes("experts", 1024) == 1024 * 4.25 / 8
    assert math.isclose(WeightFormats(lm_head="fp8").num_bytes("lm_head", 128**2), 128**2 + 4)
    for name, chosen in FORMATS.items():
        assert WeightFormats(experts=weight_format(name)).num_bytes("experts", 8) == chosen.bits_per_weight
    with pytest.raises(ValueError, match="knows no number format 'fp3'"):
        weight_format("fp3")
