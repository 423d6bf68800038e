"""SHA-256, as hexadecimal digits, of results' inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def json_sha256(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Digest of JSON, whatever the order of its keys; `default` converts types that JSON lacks."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=default).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Digest of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(root: Path, files: Iterable[Path]) -> str:
    """Digest of names below `root`, sizes and contents of `files`, in this order. Raises OSError."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        add_file(digest, file)
    return digest.hexdigest()


def add_file(digest: Any, path: str | Path) -> None:
    """Add a file's bytes to a `hashlib` object. Raises OSError."""
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
