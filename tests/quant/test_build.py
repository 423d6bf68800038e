"""Compiling C++: cached by what goes in, and one clear line for everything that can go wrong."""

import ctypes
import os
import stat
from pathlib import Path

import pytest

from speedstack.quant.kernels.build import cache_dir, find_compiler, load_library

SOURCE = 'extern "C" int answer() { return ANSWER; }\n'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPEEDSTACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "kernel.cpp"
    path.write_text('#include "answer.h"\n' + SOURCE)
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    return path


def load(source: Path) -> ctypes.CDLL:
    return load_library(source, "the test", [source.with_name("answer.h")])


def test_builds_once_and_again_when_a_header_changes(source: Path, own_cache: Path) -> None:
    assert load(source).answer() == 42
    (built,) = own_cache.iterdir()
    assert built.name.startswith("kernel-") and built.suffix == ".so"
    written = built.stat().st_mtime_ns
    assert load(source).answer() == 42 and built.stat().st_mtime_ns == written
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert load(source).answer() == 43
    assert len(list(own_cache.iterdir())) == 2


def test_a_compiler_error_is_named(source: Path, own_cache: Path) -> None:
    source.write_text("this is not C++\n")
    with pytest.raises(ValueError, match=r"could not build the test: .*error"):
        load(source)
    assert list(own_cache.iterdir()) == []


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="the test needs GCC, and no-such-compiler is not there: install it"):
        load(source)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"needs GCC, and g\+\+ or c\+\+ is not there"):
        find_compiler("the test")


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEEDSTACK_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match=r"the test cannot be built in .*; set SPEEDSTACK_CACHE to a directory"):
        load(source)


def test_a_compiler_that_dies_without_a_word(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(ValueError, match="could not build the test: no message"):
        load(source)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_dir() == Path(os.environ["SPEEDSTACK_CACHE"])
    monkeypatch.delenv("SPEEDSTACK_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "speedstack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "speedstack"
