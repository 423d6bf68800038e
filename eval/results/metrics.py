"""Reads a run's metrics.jsonl, which `train` writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


def read_metrics(run_directory: Path, on_problem: Callable[[str], object] = warnings.warn) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl, none for a missing file; a truncated last line is dropped.

    Other invalid lines are dropped and reported to `on_problem`. Raises OSError if the file cannot be read.
    """
    path = Path(run_directory) / FILE_NAME
    if not path.is_file():
        return []
    whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    lines = [_parse(line) for line in whole]
    if broken := [number for number, line in enumerate(lines, start=1) if line is None]:
        on_problem(
            f"{path}: {len(broken)} of {len(lines)} lines, the first in line {broken[0]}, are no JSON object with kind "
            "and step: left out"
        )
    return [line for line in lines if line is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line's record, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or type(record.get("step")) is not int:
        return None
    return record
