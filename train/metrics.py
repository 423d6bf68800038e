"""The record of a run: metrics.jsonl, one JSON object a line, mirrored to Weights & Biases.

The file is the truth: a line is flushed when it is written, and a resumed run first cuts the file back to the
checkpoint it continues from, so that the record reads as if nothing had happened. wandb cannot resume an offline run,
so every continuation is a run of its own there, in the group of the run's name.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from speedstack.eval.wandb_mirror import start_run
from speedstack.train.checkpoint import write_atomically

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to `<run_directory>/metrics.jsonl`, from which it first drops all that comes after `resume_step`."""

    def __init__(
        self,
        run_directory: Path,
        *,
        resume_step: int,
        wandb_mode: Literal["disabled", "offline", "online"] = "disabled",
        config: dict[str, Any] | None = None,
    ) -> None:
        path = run_directory / FILE_NAME
        kept = [line for line in read_metrics(run_directory) if line["step"] <= resume_step] if resume_step else []
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.evaluated_steps = frozenset(line["step"] for line in kept if line["kind"] == "eval")
        self._file = path.open("a", encoding="utf-8")
        self._wandb_run = start_run(wandb_mode, run_directory, run_directory.name, config)

    def write(self, kind: Literal["train", "eval"], step: int, values: dict[str, float]) -> None:
        """Append one line; `step` counts the optimizer steps done. Raises OSError if it cannot be written."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb_run is not None:
            self._wandb_run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Flush to disk and finish the mirror."""
        os.fsync(self._file.fileno())
        self._file.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's metrics.jsonl; a last line that a kill cut off is dropped, no file is no lines."""
    path = Path(run_directory) / FILE_NAME
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
