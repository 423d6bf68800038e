"""The choice of a dtype for matrix products."""

from pathlib import Path

import pytest
import torch

from speedstack.train.config.recipes import DrafterConfig, PretrainConfig
from speedstack.train.core.precision import _is_fast_cpu, is_bfloat16_faster, resolve_config, resolve_precision


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 fma", False),
    ],
)
def test_bfloat16_is_taken_where_it_is_known_to_be_faster(
    vendor: str, flags: str, expected: bool, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n")
    assert _is_fast_cpu(cpuinfo) is expected


def test_a_cpu_held_to_fewer_instructions_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speedstack.train.core.precision._is_fast_cpu", lambda: True)
    for capability, expected in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert is_bfloat16_faster(torch.device("cpu")) is expected
    assert is_bfloat16_faster(torch.device("cuda"))


def test_a_cpu_that_cannot_be_read_computes_in_float32(tmp_path: Path) -> None:
    assert _is_fast_cpu(tmp_path / "absent") is False


def test_a_run_keeps_the_dtypes_it_started_with() -> None:
    auto, cuda = DrafterConfig(), torch.device("cuda")
    resolved = resolve_config(auto, cuda)
    assert (auto.run.precision, resolved.run.precision, resolved.drafter.target_dtype) == (
        "auto",
        "bfloat16",
        "bfloat16",
    )
    assert resolve_config(resolved, torch.device("cpu")) == resolved
    assert resolve_config(PretrainConfig(), cuda).run.precision == "bfloat16"


def test_auto_follows_the_device_and_a_name_is_obeyed() -> None:
    cpu = torch.device("cpu")
    assert is_bfloat16_faster(torch.device("cuda"))
    assert resolve_precision("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_precision("auto", cpu) == (torch.bfloat16 if is_bfloat16_faster(cpu) else torch.float32)
    assert resolve_precision("float32", torch.device("cuda")) == torch.float32
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
