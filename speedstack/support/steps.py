"""Steps that run once for the same inputs, across interruptions: found again by a hash of all that decides them.

    <root>/<kind>-<key>/             a step's own directory: its outputs, and its record, step.json

The key is a SHA-256 of the step's kind, code version, settings (with digests of input files), package versions and the
keys of the steps it needs. So it is known before anything runs, and a changed input gives new keys to all dependents.
Paths do not count.

A record exists once a step begins, and is renamed into place at the end with `completion`, a random name. A step is
valid for the completions it was made from: if one has lost a file, it and its dependents are made anew, since the new
one may differ. An interrupted step resumes; every other case starts over with nothing there.

A step may instead have outputs at fixed names; another key then starts it over as well. Another package version makes
another step, since compared rows must be of one software; `other_software` names the old one, which stays.

A lock that ends with the process makes two processes that want the same step make it once. Left out: removing steps
without references; delete the directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from speedstack.support.digests import json_sha256
from speedstack.support.files import write_atomically

_KEY_CHARACTERS = 16


@dataclass(frozen=True, eq=False)
class Step:
    """A piece of work.

    `version` is raised when the code changes its results. `settings` is JSON and decides the result; `places` (paths
    and the like) do not. `software` has package versions by name, `needs` earlier steps by role. `is_exclusive` steps,
    such as timings, run alone.

    `outputs` are paths below the store's root, for a step without a directory of its own, named by its kind. They and
    `decisive`, the files in them that others read, must exist for the step to be valid; in an own directory every file
    must.
    """

    kind: str
    version: int
    settings: Any
    needs: Mapping[str, Step] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    is_exclusive: bool = False
    software: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    decisive: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """SHA-256 of all that decides the result."""
        needs = {role: step.key for role, step in self.needs.items()}
        return json_sha256(self._content(needs) | {"software": self.software})

    @cached_property
    def inputs_key(self) -> str:
        """SHA-256 of the same without software versions, its own and its needs'."""
        return json_sha256(self._content({role: step.inputs_key for role, step in self.needs.items()}))

    def _content(self, needs: Mapping[str, str]) -> dict[str, Any]:
        return {"kind": self.kind, "version": self.version, "settings": self.settings, "needs": needs}

    @property
    def name(self) -> str:
        """The step's name in a store."""
        return self.kind if self.outputs else f"{self.kind}-{self.key[:_KEY_CHARACTERS]}"

    def closure(self) -> list[Step]:
        """This step after all it needs, directly or not; a step may appear twice."""
        return [*(step for need in self.needs.values() for step in need.closure()), self]


@dataclass(frozen=True)
class StepRecord:
    """Content of a step's record file.

    `needs`: completions by role. `seconds`: total of all processes that recorded one. `files`: required sizes, None if
    the file need only exist. `result`, `files` and `completion` are set at completion.
    """

    kind: str
    version: int
    key: str
    inputs_key: str
    software: dict[str, str]
    settings: Any
    needs: dict[str, str]
    seconds: float = 0.0
    result: Any = None
    files: dict[str, int | None] = field(default_factory=dict)
    completion: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether the step ran to its end."""
        return bool(self.completion)


class StepStore:
    """The steps below `root`; `record` is the path of a step's record, with its name filled in."""

    def __init__(self, root: Path, record: str = "{name}/step.json") -> None:
        self.root = root
        self._record = record

    def path(self, step: Step) -> Path:
        """The step's own directory, existing or not; the root for a step without one."""
        return self.root if step.outputs else self.root / step.name

    def record_path(self, name: str) -> Path:
        """File of a step's record."""
        return self.root / self._record.format(name=name)

    def record(self, step: Step) -> StepRecord | None:
        """The record of a complete or interrupted step; None if it has to begin or start over."""
        record = self._read(step.name)
        if record is None or record.key != step.key or record.needs != self._completions(step):
            return None
        is_whole = all(self._is_there(self.path(step) / file, size) for file, size in record.files.items())
        return record if is_whole or not record.is_complete else None

    def is_done(self, step: Step) -> bool:
        """Whether the step is complete with all its files."""
        record = self.record(step)
        return record is not None and record.is_complete

    def missing(self, steps: Iterable[Step]) -> list[Step]:
        """Those of `steps`, listed after their needs, that must be made, because of a need or by themselves."""
        missing: dict[str, Step] = {}
        for step in steps:
            if not self.is_done(step) or any(need.name in missing for need in step.needs.values()):
                missing[step.name] = step
        return list(missing.values())

    def result(self, step: Step) -> Any:
        """The result of the step's function. Raises ValueError if the step is not complete."""
        record = self.record(step)
        if record is None or not record.is_complete:
            raise ValueError(f"step {step.name} is not in {self.root}")
        return record.result

    def completed(self) -> list[tuple[str, StepRecord]]:
        """Names and records of complete steps, in order of completion."""
        before, after = self._record.split("{name}")
        files = sorted(self.root.glob(self._record.format(name="[!.]*")), key=lambda file: file.stat().st_mtime_ns)
        names = [file.relative_to(self.root).as_posix().removeprefix(before).removesuffix(after) for file in files]
        records = [(name, self._read(name)) for name in names]
        return [(name, record) for name, record in records if record is not None and record.is_complete]

    def other_software(self, steps: Iterable[Step]) -> dict[str, list[str]]:
        """Unfinished `steps` that exist with other software: name -> "torch 2.12.0, is 2.13.0" and so on.

        The list is empty if only a needed step differs.
        """
        wanted = {step.inputs_key: step for step in steps if not self.is_done(step)}
        found: dict[str, list[str]] = {}
        for _, record in self.completed() if wanted else ():
            step = wanted.get(record.inputs_key)
            if step is not None and record.key != step.key:
                then = record.software
                packages = sorted({*then, *step.software})
                found[step.name] = [
                    f"{name} {then.get(name)}, is {step.software.get(name)}"
                    for name in packages
                    if then.get(name) != step.software.get(name)
                ]
        return found

    def make(self, step: Step, run: Callable[[Mapping[str, Path], Path], Any]) -> bool:
        """Make the step with `run(directories of needed steps, directory to fill)`; False if it is there already.

        `run` may find an interrupted call's files, and returns plain JSON. Its exceptions propagate and its files stay.
        Raises ValueError for NaN or infinity in the result.
        """
        with self._claimed(step):
            record = self.record(step)
            if record is not None and record.is_complete:
                return False
            if record is None:
                record = self._start_over(step)
            started, finished = time.monotonic(), dict[str, Any]()
            try:
                result = run({role: self.path(need) for role, need in step.needs.items()}, self.path(step))
                finished = {"result": result, "files": self._files(step), "completion": secrets.token_hex(8)}
            finally:
                # Interrupted steps keep their time, so a report has the sum over processes.
                seconds = record.seconds + time.monotonic() - started
                self._write(step, replace(record, seconds=seconds, **finished))
        return True

    def _start_over(self, step: Step) -> StepRecord:
        """Delete the step's files and record; returns the new record."""
        # The record goes first: if the process ends here, the next one starts over as well.
        self.record_path(step.name).unlink(missing_ok=True)
        for path in [self.root / output for output in step.outputs] or list(self.path(step).iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        record = StepRecord(
            kind=step.kind,
            version=step.version,
            key=step.key,
            inputs_key=step.inputs_key,
            software=dict(step.software),
            settings=step.settings,
            needs=self._completions(step),
        )
        self._write(step, record)
        return record

    def _completions(self, step: Step) -> dict[str, str]:
        """Current completions of the step's needs."""
        records = {role: self._read(need.name) for role, need in step.needs.items()}
        return {role: "" if record is None else record.completion for role, record in records.items()}

    def _files(self, step: Step) -> dict[str, int | None]:
        """Required files, by path below the step's directory."""
        directory, own = self.path(step), self.record_path(step.name)
        if step.outputs:
            paths = (*step.outputs, *step.decisive)
            missing = [path for path in paths if not (directory / path).exists()]
            assert not missing, f"step {step.name} did not write {missing}"
            return dict.fromkeys(paths)
        files = sorted(file for file in directory.rglob("*") if file.is_file() and file != own)
        sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
        # Leftovers of a process killed while writing the record; the next write removes them.
        return {name: size for name, size in sizes.items() if not name.startswith(f".{own.name}-")}

    def _is_there(self, path: Path, size: int | None) -> bool:
        try:
            return size in (None, path.stat().st_size)
        except OSError:
            return False

    def _read(self, name: str) -> StepRecord | None:
        """The record, or None if it cannot be read. Raises ValueError for one that another version wrote."""
        path = self.record_path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or "key" not in content:
            return None
        if content.keys() != {known.name for known in fields(StepRecord)}:
            raise ValueError(
                f"{path} was written by another version of speedstack, which alone can go on there: choose another "
                f"directory, or remove {self.root} to start over"
            )
        return StepRecord(**content)

    def _write(self, step: Step, record: StepRecord) -> None:
        write_atomically(self.record_path(step.name), json.dumps(vars(record), indent=1, allow_nan=False) + "\n")

    @contextmanager
    def _claimed(self, step: Step) -> Iterator[None]:
        """Create and lock the step's own directory. The owner of the root locks the root."""
        if step.outputs:
            yield
            return
        self.path(step).mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path(step), os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
