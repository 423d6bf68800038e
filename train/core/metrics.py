"""The record of a run: metrics.jsonl, one JSON object a line, mirrored to Weights & Biases.

Each line is flushed when written. A resumed run first cuts the file back to its checkpoint. wandb cannot resume an
offline run, so each continuation is a run of its own there, in the group of the run's directory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from speedstack.eval.report.wandb_mirror import Mirror
from speedstack.eval.results.metrics import FILE_NAME, read_metrics
from speedstack.support.files import write_atomically


class MetricsLog:
    """Appends to `<run_directory>/metrics.jsonl`, after dropping all lines after `resume_step`."""

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
