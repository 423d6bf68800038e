"""SHA-256, as hexadecimal digits, of what results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def json_sha256(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Of JSON, whatever the order of its keys; `default` turns what JSON does not know into what it does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=default).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Of a file's bytes. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_sha256(root: Path, files: Iterable[Path]) -> str:
    """Of the names below `root`, the sizes and the contents of `files`, in this order. Raises OSError as above."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        add_file(digest, file)
    return digest.hexdigest()


def add_file(digest: Any, path: str | Path) -> None:
    """Add a file's bytes to a `hashlib` object. Raises OSError when it cannot be read."""
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: digest)
