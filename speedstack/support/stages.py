"""Resumable stages: a list of jobs, each run at most once for the same inputs, whatever interrupts the process.

`stages/<name>.json` holds a stage's key from the moment it starts and, once its outputs exist, `completion`, a random
name of that one completion; both writes are renames. The key is a hash of the stage's own settings and of the
completions it builds on, so a changed setting, and a stage that was made anew, repeat exactly what depends on them. A
stage that finds its own key without a completion was interrupted: it runs again over what it left and is expected to
continue from there. Another key, or a lost output, means starting over: the old outputs go.
Left out: hashes of the outputs themselves. A stage's outputs are its own business, only that they exist is checked.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speedstack.support.digests import json_sha256
from speedstack.support.files import write_atomically
from speedstack.support.progress import Advance, StageProgress

RECORDS = "stages"


@dataclass(frozen=True)
class Stage:
    """A piece of work. `run(advance)` returns one line on what came out.

    `settings` is everything that decides the result, as JSON; `needs` names earlier stages; `outputs` are paths in the
    job's directory, which are removed to start over. Every one of them must exist when the stage is done, and so must
    `decisive`, the files in them that later stages read.
    """

    name: str
    run: Callable[[Advance], str]
    settings: Any
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    expected_seconds: float
    decisive: tuple[str, ...] = ()

    def missing(self, directory: Path) -> list[str]:
        """What a completed stage must have left in `directory` and is not there."""
        return [path for path in (*self.outputs, *self.decisive) if not (directory / path).exists()]


@dataclass(frozen=True)
class StageRecord:
    """What `stages/<name>.json` says. `seconds` adds up all processes that worked on the stage and could say so."""

    name: str
    key: str
    completion: str = ""
    seconds: float = 0.0
    summary: str = ""

    @property
    def complete(self) -> bool:
        """The stage ran to its end."""
        return bool(self.completion)


def run_stages(directory: Path, stages: Sequence[Stage], progress: StageProgress) -> list[StageRecord]:
    """Bring every stage to completion, in order; returns their records.

    Raises whatever a stage raises; the next call goes on there.
    """
    records: dict[str, StageRecord] = {}
    for stage in stages:
        key = _key(stage, records)
        record = read_record(directory, stage.name)
        if record is None or record.key != key or (record.complete and stage.missing(directory)):
            # No record while outputs go: whatever ends the process here, the next one starts over as well.
            _record_path(directory, stage.name).unlink(missing_ok=True)
            for output in stage.outputs:
                _remove(directory / output)
            record = StageRecord(stage.name, key)
            _write_record(directory, record)
        if record.complete:
            progress.skip(stage.name, record.seconds)
        else:
            record = _run_one(directory, stage, record, progress)
        records[stage.name] = record
    return list(records.values())


def read_record(directory: Path, name: str) -> StageRecord | None:
    """The record of stage `name`; None if it never started. A record that cannot be read counts as none."""
    try:
        return StageRecord(**json.loads(_record_path(directory, name).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def read_records(directory: Path) -> list[StageRecord]:
    """The records of all completed stages below `directory`, in the order in which they were completed."""
    files = sorted((directory / RECORDS).glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    records = [read_record(directory, file.stem) for file in files]
    return [record for record in records if record is not None and record.complete]


@contextmanager
def exclusive(directory: Path, file: str = "") -> Iterator[None]:
    """Hold `directory`, or only the file of this name in it; the system lets go when the process ends, however it ends.

    What is locked is a hidden file beside, which stays: the one that is held may be replaced meanwhile. Raises
    ValueError when another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / (f".{file}.lock" if file else ".lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = f"writing {directory / file}" if file else f"working in {directory}"
            raise ValueError(f"another process is {held}; wait for it or pass another --out") from None
        yield


def _run_one(directory: Path, stage: Stage, record: StageRecord, progress: StageProgress) -> StageRecord:
    started = time.monotonic()
    summary, completion = "", ""
    try:
        with progress.stage(stage.name) as advance:
            summary = stage.run(advance)
        missing = stage.missing(directory)
        assert not missing, f"stage {stage.name} did not write {missing}"
        completion = secrets.token_hex(8)
    finally:
        # An interrupted stage keeps its time, so that the sum over processes is right in the report.
        seconds = record.seconds + time.monotonic() - started
        record = StageRecord(stage.name, record.key, completion, seconds, summary)
        _write_record(directory, record)
    return record


def _key(stage: Stage, records: Mapping[str, StageRecord]) -> str:
    inputs = {
        "stage": stage.name,
        "settings": stage.settings,
        "needs": {name: records[name].completion for name in stage.needs},
    }
    return json_sha256(inputs)


def _record_path(directory: Path, name: str) -> Path:
    return directory / RECORDS / f"{name}.json"


def _write_record(directory: Path, record: StageRecord) -> None:
    path = _record_path(directory, record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(vars(record), indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
