"""The benchmark of the MXFP4 kernels measures what it says, on a shape that takes no time."""

from pathlib import Path

import pytest

from speedstack.eval.microbench import quant, quant_race
from speedstack.eval.microbench.quant import QuantBench, main
from speedstack.eval.microbench.quant_race import COPY, OURS, PEERS, REFERENCE
from speedstack.quant import mxfp4

SMALL = ["--shape", "2,64,64", "--repeats", "2"]


def test_measures_every_contestant_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    main([*SMALL, "--peer-experts", "1", "--out", str(out)])
    result = QuantBench.load(out)
    assert result.shape == (2, 64, 64) and result.scale_rule == mxfp4.DEFAULT_SCALE_RULE and result.device == "cpu"
    names = {OURS, REFERENCE, *PEERS} - {missing.name for missing in result.unavailable}
    assert "compressed-tensors" in names and set(result.peer_versions) == names & set(PEERS)
    rows = {(t.dtype, t.operation, t.contestant): t for t in result.timings}
    expected = {(op, name) for op in ("quantize", "dequantize", "fake_quantize") for name in names} | {("copy", COPY)}
    assert set(rows) == {(dtype, *pair) for dtype in ("bfloat16", "float32") for pair in expected}
    for (dtype, operation, name), row in rows.items():
        assert row.num_experts == (2 if name in (OURS, COPY) else 1)
        weight_bytes = row.num_experts * 64 * 64 * (2 if dtype == "bfloat16" else 4)
        packed_bytes = row.num_experts * 64 * (32 + 2)
        both = operation in ("copy", "fake_quantize")
        assert row.num_bytes == (2 * weight_bytes if both else weight_bytes + packed_bytes)
        assert row.bytes_per_second == pytest.approx(row.num_bytes / row.seconds.median)
        assert row.seconds.num_repeats == 2 and row.seconds.median > 0
        copy_rate = rows[dtype, "copy", COPY].bytes_per_second
        assert row.fraction_of_copy == pytest.approx(row.bytes_per_second / copy_rate)
        if name != COPY:
            ours = rows[dtype, operation, OURS].seconds.median / 2
            assert row.times_ours == pytest.approx(row.seconds.median / row.num_experts / ours)
            # A normal distribution in MXFP4, whatever the rule; and one rule gives one error.
            assert row.relative_squared_error == pytest.approx(0.0131, rel=0.1)
            if name in (REFERENCE, "compressed-tensors"):
                assert row.relative_squared_error == rows[dtype, operation, OURS].relative_squared_error
    printed = capsys.readouterr().out
    assert "compressed-tensors" in printed and str(out) in printed
    for missing in result.unavailable:
        assert f"{missing.name} skipped" in printed


def test_a_peer_that_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scale_rule: mxfp4.ScaleRule) -> quant_race.Library:
        raise ImportError("not today")

    for module in (quant, quant_race):
        monkeypatch.setattr(module, "PEERS", {"torchao": broken})
    import torch

    result = quant.bench((1, 32, 32), torch.device("cpu"), ("float32",), "mse", 1)
    assert [(each.name, each.reason) for each in result.unavailable] == [("torchao", "ImportError: not today")]
    assert {t.contestant for t in result.timings} == {OURS, REFERENCE, COPY}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "2,64"], "--shape is experts,out,in"),
        (["--shape", "2,64,33"], "multiple of 32"),
        (["--shape", "a,b,c"], "invalid literal"),
        (["--dtypes", "float16"], "unknown dtype 'float16'; use bfloat16 or float32"),
        (["--scale-rule", "ceil"], "unknown scale rule 'ceil': choose one of"),
        (["--peer-experts", "3"], "--peer-experts must be between 1 and 2, got 3"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_settings_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
