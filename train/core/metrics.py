"""The record of a run: metrics.jsonl, one JSON object a line, mirrored to Weights & Biases.

The file is the truth: a line is flushed when it is written, and a resumed run first cuts the file back to the
checkpoint it continues from, so that the record reads as if nothing had happened. wandb cannot resume an offline run,
so every continuation is a run of its own there, in the group of the run's directory.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from speedstack.eval.report.wandb_mirror import Mirror
from speedstack.train.core.checkpoint import write_atomically

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to `<run_directory>/metrics.jsonl`, from which it first drops all that comes after `resume_step`."""

    def __init__(self, run_directory: Path, mirror: Mirror, *, resume_step: int) -> None:
        path = run_directory / FILE_NAME
        kept = [line for line in read_metrics(run_directory) if line["step"] <= resume_step] if resume_step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.evaluated_steps = frozenset(line["step"] for line in kept if line["kind"] == "eval")
        self._file = path.open("a", encoding="utf-8")
        self._mirror = mirror

    def write(self, kind: Literal["train", "eval"], step: int, values: dict[str, float]) -> None:
        """Append one line; `step` counts the optimizer steps done. Raises OSError if it cannot be written."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        self._mirror.log({f"{kind}/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(run_directory: Path, on_problem: Callable[[str], object] = warnings.warn) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl; a last line that a kill cut off is dropped, no file is no lines.

    `on_problem` is told of other lines that are none of ours, as a full disk leaves them: how many there are, and the
    first. They are left out. Raises OSError where the file cannot be read.
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
    """The record that a line is, None for one that is not."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str) or type(record.get("step")) is not int:
        return None
    return record
