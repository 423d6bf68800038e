"""Steps that run once for the same inputs, whatever ends the process: found again by a hash of all that decides them.

    <root>/<kind>-<key>/             a step's own directory: what it makes, and its record, step.json

The key is a SHA-256 of the step's kind, the version of its code, its settings (digests of files it reads among them),
the versions of the packages that compute it and the keys of the steps that it needs, so it is known before anything has
run, and a changed input gives new keys to all that depends on it. Where files lie does not count.

A record is there from the moment that a step begins. It has `completion`, a random name of that one completion, once
all that the step makes is there: written last, by rename. A step stands with the completions that it was made from: one
that has lost a file is made anew, and so is what was made from it, since nothing says that the new one is the same. A
step that was interrupted goes on over what it left; in every other case it starts over, and what is there goes.

A step may have its outputs where people look for them instead, at names that do not change with its key; then another
key starts it over as well.

Another version of a package makes another step: a table whose rows are compared is of one software. What was made with
the old one stays, is named by `other_software`, and is found again when that is installed again.

A step with a directory of its own is made under a lock that the system takes back when its process ends, however that
ends: two processes that want the same step make it once. Left out: removing steps that nobody refers to any more;
delete the directory.
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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from speedstack.support.digests import json_sha256
from speedstack.support.files import write_atomically

_KEY_CHARACTERS = 16


@dataclass(frozen=True, eq=False)
class Step:
    """A piece of work.

    `version` is raised when the code of a kind changes its results. `settings` is JSON and decides the result; `places`
    are paths and the like that do not. `software` has the versions of the packages that the numbers come from, by name.
    `needs` are earlier steps, by what they are to this one. `is_exclusive`: to be run while no other step runs, as
    timings want.

    `outputs` are paths below the store's root, for a step without a directory of its own, which is called by its kind.
    They and `decisive`, the files in them that others read, have to exist for the step to stand; of a directory of its
    own that is every file.
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
        """SHA-256 of what decides the result."""
        needs = {role: step.key for role, step in self.needs.items()}
        return json_sha256(self._content(needs) | {"software": self.software})

    @cached_property
    def inputs_key(self) -> str:
        """SHA-256 of the same without the software, its own and that of what it needs."""
        return json_sha256(self._content({role: step.inputs_key for role, step in self.needs.items()}))

    def _content(self, needs: Mapping[str, str]) -> dict[str, Any]:
        return {"kind": self.kind, "version": self.version, "settings": self.settings, "needs": needs}

    @property
    def name(self) -> str:
        """What it is called among the others of a store."""
        return self.kind if self.outputs else f"{self.kind}-{self.key[:_KEY_CHARACTERS]}"

    def closure(self) -> list[Step]:
        """This step after all that it needs, directly or not; a step may be in the list twice."""
        return [*(step for need in self.needs.values() for step in need.closure()), self]


@dataclass(frozen=True)
class StepRecord:
    """What the file says of a step.

    `needs`: completions by role. `seconds` adds up all processes that worked on the step and could say so. `files`:
    sizes of those that have to be there, None for what has only to exist. `result`, `files` and `completion` are of a
    step that is complete.
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
        """The step ran to its end."""
        return bool(self.completion)


class StepStore:
    """The steps below `root`; `record` is the path of a step's record there, by its name."""

    def __init__(self, root: Path, record: str = "{name}/step.json") -> None:
        self.root = root
        self._record = record

    def path(self, step: Step) -> Path:
        """The step's own directory, whether it exists or not; the root for one without."""
        return self.root if step.outputs else self.root / step.name

    def record_path(self, name: str) -> Path:
        """File of a step's record."""
        return self.root / self._record.format(name=name)

    def record(self, step: Step) -> StepRecord | None:
        """Of a step that is complete, or was interrupted; None where it has to start over, or to begin."""
        record = self._read(step.name)
        if record is None or record.key != step.key or record.needs != self._completions(step):
            return None
        is_whole = all(self._is_there(self.path(step) / file, size) for file, size in record.files.items())
        return record if is_whole or not record.is_complete else None

    def is_done(self, step: Step) -> bool:
        """Whether the finished step is there with all that it made."""
        record = self.record(step)
        return record is not None and record.is_complete

    def missing(self, steps: Iterable[Step]) -> list[Step]:
        """Those of `steps`, each after what it needs, that are to be made: with what is to be made from them."""
        missing: dict[str, Step] = {}
        for step in steps:
            if not self.is_done(step) or any(need.name in missing for need in step.needs.values()):
                missing[step.name] = step
        return list(missing.values())

    def result(self, step: Step) -> Any:
        """What the step's function returned. Raises ValueError where the step is not finished."""
        record = self.record(step)
        if record is None or not record.is_complete:
            raise ValueError(f"step {step.name} is not in {self.root}")
        return record.result

    def completed(self) -> list[tuple[str, StepRecord]]:
        """Names and records of all complete steps, in the order in which they were completed."""
        before, after = self._record.split("{name}")
        files = sorted(self.root.glob(self._record.format(name="[!.]*")), key=lambda file: file.stat().st_mtime_ns)
        names = [file.relative_to(self.root).as_posix().removeprefix(before).removesuffix(after) for file in files]
        records = [(name, self._read(name)) for name in names]
        return [(name, record) for name, record in records if record is not None and record.is_complete]

    def other_software(self, steps: Iterable[Step]) -> dict[str, list[str]]:
        """Of unfinished `steps` those that are there of other software: name -> "torch 2.12.0, is 2.13.0" and so on.

        Where only a step that one of them needs was made otherwise, the list is empty.
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
        """Have `run(directories of needed steps, directory to fill)` make the step, unless it is there: False then.

        `run` finds in the directory what an interrupted call left, and returns a result of plain JSON types. What it
        raises goes through, and what it has left stays. Raises ValueError where the result holds NaN or infinity.
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
                # An interrupted step keeps its time, so that the sum over processes is right in a report.
                seconds = record.seconds + time.monotonic() - started
                self._write(step, replace(record, seconds=seconds, **finished))
        return True

    def _start_over(self, step: Step) -> StepRecord:
        """Begin with nothing there."""
        # No record while outputs go: whatever ends the process here, the next one starts over as well.
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
        """Of what the step needs, as it is there now."""
        records = {role: self._read(need.name) for role, need in step.needs.items()}
        return {role: "" if record is None else record.completion for role, record in records.items()}

    def _files(self, step: Step) -> dict[str, int | None]:
        """What has to be there from now on, by its path below the step's directory."""
        directory, own = self.path(step), self.record_path(step.name)
        if step.outputs:
            paths = (*step.outputs, *step.decisive)
            missing = [path for path in paths if not (directory / path).exists()]
            assert not missing, f"step {step.name} did not write {missing}"
            return dict.fromkeys(paths)
        files = sorted(file for file in directory.rglob("*") if file.is_file() and file != own)
        sizes = {file.relative_to(directory).as_posix(): file.stat().st_size for file in files}
        # What a process that was killed while it wrote the record has left goes when it is written the next time.
        return {name: size for name, size in sizes.items() if not name.startswith(f".{own.name}-")}

    def _is_there(self, path: Path, size: int | None) -> bool:
        try:
            return size in (None, path.stat().st_size)
        except OSError:
            return False

    def _read(self, name: str) -> StepRecord | None:
        """A record that cannot be read counts as none."""
        try:
            return StepRecord(**json.loads(self.record_path(name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, step: Step, record: StepRecord) -> None:
        write_atomically(self.record_path(step.name), json.dumps(vars(record), indent=1, allow_nan=False) + "\n")

    @contextmanager
    def _claimed(self, step: Step) -> Iterator[None]:
        """The step's own directory, there and locked. The root of steps without one is its owner's to lock."""
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
