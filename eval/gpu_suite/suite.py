"""Sections in sequence, each with a share of the time, and a file of the results so far."""

import contextlib
import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speedstack.eval.gpu_suite.kernels import Kernels
from speedstack.eval.gpu_suite.scale import Scale
from speedstack.eval.results.failures import one_line
from speedstack.eval.speed.worker import StartWorker
from speedstack.support.files import write_atomically

SCHEMA_VERSION = 1
KIND = "gpu-suite"
COMPLETE, FAILED, OUT_OF_TIME = "complete", "failed", "out of time"


class OutOfTime(Exception):
    """A section's share of the time is used up; its results stand."""


def print_now(line: str) -> None:
    """Print without buffering, so that a log shows how far a killed run came."""
    print(line, flush=True)


@dataclass
class Suite:
    """One run: its settings and its document.

    `document["sections"][name]` holds status, seconds, error and result; `save` writes it. names: the sections that
    run; end: the `time.monotonic` moment at which everything ends.

    Sections share `kernels`, being compiled; `race`, the contestants whose first cell is measured; and `hung`,
    contestants not to start again. `closing` ends the rest.
    """

    scale: Scale
    models: tuple[str, ...]
    contestants: tuple[str, ...]
    minutes: float
    out: Path
    start: StartWorker
    seed: int = 0
    say: Callable[[str], None] = print_now
    document: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    end: float = 0.0
    kernels: Kernels | None = None
    race: Any = None
    hung: set[str] = field(default_factory=set)
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def save(self) -> None:
        """Write the document atomically, with null for numbers that are not finite. Raises OSError."""
        if self.kernels is not None:
            self.document["kernels"] = self.kernels.records()
        write_atomically(self.out, json.dumps(finite(self.document), indent=2, allow_nan=False) + "\n")

    def result(self, section: str) -> dict[str, Any]:
        """A section's results so far; empty if it has not run."""
        found: dict[str, Any] = self.document.get("sections", {}).get(section, {}).get("result", {})
        return found


@dataclass(frozen=True)
class Section:
    """`run(suite, result, deadline)` fills `result` in place. share: of the time, among the sections that run."""

    name: str
    share: float
    run: Callable[[Suite, dict[str, Any], float], None]


def run_sections(suite: Suite, sections: Sequence[Section]) -> bool:
    """Run all, despite failures; returns whether all are complete. Unused time goes to later sections."""
    with suite.closing:
        return _run_sections(suite, sections)


def _run_sections(suite: Suite, sections: Sequence[Section]) -> bool:
    started = time.monotonic()
    end, total = started + 60 * suite.minutes, sum(section.share for section in sections)
    suite.end, suite.names = end, tuple(section.name for section in sections)
    suite.document = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "scale": "tiny" if suite.scale.is_tiny else "released",
        "device": suite.scale.device,
        "minutes": suite.minutes,
        "seed": suite.seed,
        "is_complete": False,
        "kernels": [],
        "sections": {},
    }
    suite.save()
    used_share = 0.0
    for section in sections:
        used_share += section.share / total
        begun = time.monotonic()
        record: dict[str, Any] = {"status": COMPLETE, "seconds": 0.0, "error": None, "result": {}}
        suite.document["sections"][section.name] = record
        suite.say(f"{section.name} ...")
        try:
            if begun >= end:
                raise OutOfTime("nothing was left for it")
            section.run(suite, record["result"], started + used_share * (end - started))
        except OutOfTime as error:
            record |= {"status": OUT_OF_TIME, "error": str(error)}
        except Exception as error:
            # Any failure costs its own section alone.
            traceback.print_exc()
            record |= {"status": FAILED, "error": one_line(error)}
        record["seconds"] = round(time.monotonic() - begun, 2)
        suite.say(f"{section.name}: {record['status']}, {record['seconds']:.0f} s" + _because(record["error"]))
        suite.save()
    suite.document["seconds"] = round(time.monotonic() - started, 2)
    suite.document["is_complete"] = all(record["status"] == COMPLETE for record in suite.document["sections"].values())
    suite.save()
    return bool(suite.document["is_complete"])


def finite(value: Any) -> Any:
    """The value with None for numbers JSON lacks, so that one does not cost the other results."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _because(error: str | None) -> str:
    return "" if error is None else f": {error}"


def free_path(folder: Path, stem: str) -> Path:
    """A path that does not exist, so that a day's second run does not overwrite the first."""
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path
