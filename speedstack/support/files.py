"""Files that are never seen half-written."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is never seen half-written: a temporary file, flushed to disk, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
