"""Which kernels are built and loaded, and one clear line where none can be."""

import logging
import re
from pathlib import Path

import pytest

from speedstack.quant.kernels import build as quant_build
from speedstack.runtime import Engine
from speedstack.runtime.backends.cpu.kernels import build


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and nothing loaded."""
    monkeypatch.setenv("SPEEDSTACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_load", build._load.__wrapped__)
    return tmp_path / "cache"


@pytest.fixture
def an_old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset({"sse4_2", "avx", "fma", "f16c"}))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.VARIABLE, "avx3")


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ("an_old_processor", "backend 'cpu' needs a processor with AVX2 and FMA, or NEON; use backend='reference'"),
        ("no_compiler", "backend 'cpu' needs GCC, and no-such-compiler is not there: install it, or set CXX"),
        ("a_wrong_name", r"SPEEDSTACK_CPU='avx3': this machine has .*; name one, or unset it"),
    ],
)
def test_where_there_are_no_kernels_one_line_says_why(
    problem: str,
    message: str,
    request: pytest.FixtureRequest,
    tiny_packed_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    request.getfixturevalue(problem)
    with pytest.raises(ValueError, match=message) as refused:
        Engine.from_pretrained(tiny_packed_dir, backend="cpu", max_length=32)
    assert "\n" not in str(refused.value)
    with caplog.at_level(logging.WARNING, "speedstack.runtime"):
        engine = Engine.from_pretrained(tiny_packed_dir, max_length=32)
    assert engine.backend_name == "reference"
    (line,) = [record.getMessage() for record in caplog.records if "backend" in record.getMessage()]
    assert re.fullmatch(f"backend auto: reference, because {message}", line)
    assert len(engine.generate([5, 6], max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_sets_by_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    newest = frozenset(build.INSTRUCTION_SETS["avx512"])
    for machine, flags, expected in (
        ("x86_64", newest, ["avx512", "avx2"]),
        ("AMD64", newest - {"avx512bw"}, ["avx2"]),
        ("x86_64", newest - {"fma"}, []),
        ("aarch64", frozenset(), ["neon"]),
        ("arm64", frozenset(), ["neon"]),
        ("riscv64", newest, []),
    ):
        monkeypatch.setattr(build.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(build, "_cpu_flags", lambda flags=flags: flags)
        assert build.available_sets() == expected
        monkeypatch.delenv(build.VARIABLE, raising=False)
        if expected:
            assert build.choose_set() == expected[0]
            monkeypatch.setenv(build.VARIABLE, expected[-1])
            assert build.choose_set() == expected[-1]


@pytest.mark.slow
def test_machines_of_different_sets_share_a_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets, formats = build.available_sets(), {"avx512": 2, "avx2": 3, "neon": 3}
    for processor in ("one", "another"):
        # Both processors have these sets: what the one builds, the other loads.
        monkeypatch.setattr(quant_build, "_cpu_identity", lambda processor=processor: processor)
        for name in sets:
            monkeypatch.setenv(build.VARIABLE, name)
            assert build.load_kernels().speedstack_mxfp4_format() == formats[name]
    assert len(list(own_cache.iterdir())) == len(sets)


def test_code_for_the_machine_at_hand_is_for_its_processor(
    own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel.cpp").write_text('extern "C" int answer() { return 42; }\n')
    for flags, num_built in ((("-shared", "-fPIC"), 1), (("-shared", "-fPIC", "-march=native"), 3)):
        for processor in ("one", "another", "one"):
            monkeypatch.setattr(quant_build, "_cpu_identity", lambda processor=processor: processor)
            assert quant_build.load_library(tmp_path / "kernel.cpp", "the test", flags=flags).answer() == 42
        assert len(list(own_cache.iterdir())) == num_built
