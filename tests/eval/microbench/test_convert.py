"""The memory benchmark, on a checkpoint of a few megabytes: what it builds is a model, what it reports is plausible."""

from pathlib import Path

import pytest

from speedstack.eval.microbench import convert
from speedstack.eval.results.microbench import ConversionResult
from speedstack.quant.checkpoint import load_model

SIZES = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_experts": 8}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_measures_every_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_SIZES", convert._TINY | SIZES)
    monkeypatch.setattr(convert, "_CHAIN", (("plain", "compressed-tensors"), ("compressed-tensors", "plain")))
    result = convert.measure(tmp_path)
    assert [cost.name for cost in result.conversions][1:] == [
        "plain to compressed-tensors",
        "compressed-tensors to plain",
    ]
    assert load_model(tmp_path / "plain").config.num_experts == 8
    assert 9 <= result.conversions[1].num_source_shards <= 11
    assert all(cost.peak_bytes > 0 and cost.seconds > 0 for cost in result.conversions)
    path = result.save(tmp_path / "result.json")
    assert ConversionResult.load(path) == result
