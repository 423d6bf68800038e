"""Digests lie in files of finished runs: their values stay."""

import hashlib
from pathlib import Path

import pytest

from speedstack.support.digests import add_file, file_sha256, files_sha256, json_sha256


def test_json_counts_without_the_order_of_its_keys() -> None:
    text = '{"a": [1, 2.5, null], "b": "\\u00f6"}'
    assert json_sha256({"b": "ö", "a": (1, 2.5, None)}) == hashlib.sha256(text.encode()).hexdigest()
    assert json_sha256(Path("x"), default=str) == json_sha256("x")
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_sha256(Path("x"))


def test_files_count_by_their_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(b"before")
    add_file(digest, tmp_path / "file")
    assert digest.hexdigest() == hashlib.sha256(b"before" + content).hexdigest()


def test_a_directory_counts_by_names_sizes_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"")
    files = [tmp_path / "sub" / "a", tmp_path / "b"]
    assert files_sha256(tmp_path, files) == hashlib.sha256(b"sub/a\0003\0one" + b"b\0000\0").hexdigest()
