"""Steps that run once for the same inputs: a directory each, found again by a hash of all that decides its content.

    <root>/<kind>-<key>/            a finished step: what it made, and step.json
    <root>/.<kind>-<key>.partial/   one that is being made; after a kill it is continued there, not thrown away

The key is a SHA-256 of the step's kind, the version of its code, its settings (digests of files it reads among them),
the versions of the packages that compute it and the keys of the steps that it needs, so it is known before anything has
run, and a changed input gives new keys to all that depends on it. Where files lie does not count. A finished directory
appears by a rename, after step.json, which lists its files; one that has lost a file since is made anew.

Another version of a package makes another step: a table whose rows are compared is of one software. What was made with
the old one stays, is named by `other_software`, and is found again when that is installed again.

A step is made under a lock that the system takes back when its process ends, however that ends: two processes that
want the same step make it once. Left out: removing steps that no row refers to; delete the directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from speedstack.support.digests import json_sha256
from speedstack.support.files import write_atomically

RECORD = "step.json"
_KEY_CHARACTERS = 16


@dataclass(frozen=True, eq=False)
class Step:
    """A piece of work.

    `version` is raised when the code of a kind changes its results. `settings` is JSON and decides the result; `places`
    are paths and the like that do not. `software` has the versions of the packages that the numbers come from, by name.
    `needs` are earlier steps, by what they are to this one. `is_exclusive`: to be run while no other step runs, as
    timings want.
    """

    kind: str
    version: int
    settings: Mapping[str, Any]
    needs: Mapping[str, Step] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    is_exclusive: bool = False
    software: Mapping[str, str] = field(default_factory=dict)

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
        """Directory name of the finished step."""
        return f"{self.kind}-{self.key[:_KEY_CHARACTERS]}"

    def closure(self) -> list[Step]:
        """This step after all that it needs, directly or not; a step may be in the list twice."""
        return [*(step for need in self.needs.values() for step in need.closure()), self]


class StepStore:
    """The steps below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: Step) -> Path:
        """Directory of the finished step, whether it exists or not."""
        return self.root / step.name

    def partial(self, step: Step) -> Path:
        """Directory in which it is made."""
        return self.root / f".{step.name}.partial"

    def is_done(self, step: Step) -> bool:
        """Whether the finished step is there with all its files."""
        return self._record(step) is not None

    def result(self, step: Step) -> dict[str, Any]:
        """What the step's function returned. Raises ValueError where the step is not finished."""
        record = self._record(step)
        if record is None:
            raise ValueError(f"step {step.name} is not in {self.root}")
        result: dict[str, Any] = record["result"]
        return result

    def other_software(self, steps: Iterable[Step]) -> dict[str, list[str]]:
        """Of unfinished `steps` those that are there of other software: name -> "torch 2.12.0, is 2.13.0" and so on.

        Where only a step that one of them needs was made otherwise, the list is empty.
        """
        wanted = {step.inputs_key: step for step in steps if not self.is_done(step)}
        found: dict[str, list[str]] = {}
        for file in sorted(self.root.glob(f"[!.]*/{RECORD}")) if wanted else ():
            try:
                record = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            step = wanted.get(str(record.get("inputs_key"))) if isinstance(record, dict) else None
            if step is not None:
                then = record["software"]
                packages = sorted({*then, *step.software})
                found[step.name] = [
                    f"{name} {then.get(name)}, is {step.software.get(name)}"
                    for name in packages
                    if then.get(name) != step.software.get(name)
                ]
        return found

    def make(self, step: Step, run: Callable[[Mapping[str, Path], Path], dict[str, Any]]) -> bool:
        """Have `run(directories of needed steps, directory to fill)` make the step, unless it is there: False then.

        `run` finds in the directory what an interrupted call left, and returns a result of plain JSON types. What it
        raises goes through, and what it has left stays. Raises ValueError where the result holds NaN or infinity.
        """
        with self._claimed(step) as partial:
            if partial is None:
                return False
            started = time.monotonic()
            # Of a call that was killed between writing it and the rename.
            (partial / RECORD).unlink(missing_ok=True)
            result = run({role: self.path(need) for role, need in step.needs.items()}, partial)
            files = (path for path in partial.rglob("*") if path.is_file())
            record = {
                "kind": step.kind,
                "version": step.version,
                "key": step.key,
                "inputs_key": step.inputs_key,
                "software": step.software,
                "settings": step.settings,
                "needs": {role: need.name for role, need in step.needs.items()},
                "result": result,
                "seconds": time.monotonic() - started,
                "files": {path.relative_to(partial).as_posix(): path.stat().st_size for path in sorted(files)},
            }
            write_atomically(partial / RECORD, json.dumps(record, indent=1, allow_nan=False) + "\n")
            # Something is there only if it has lost a file.
            shutil.rmtree(self.path(step), ignore_errors=True)
            os.replace(partial, self.path(step))
        return True

    def _record(self, step: Step) -> dict[str, Any] | None:
        directory = self.path(step)
        try:
            record: dict[str, Any] = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            sizes = {name: (directory / name).stat().st_size for name in record["files"]}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if sizes == record["files"] and record["key"] == step.key else None

    @contextmanager
    def _claimed(self, step: Step) -> Iterator[Path | None]:
        """The directory to make the step in, locked; None where the step is finished, perhaps by who had the lock."""
        partial = self.partial(step)
        while True:
            if self.is_done(step):
                yield None
                return
            partial.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(partial, os.O_RDONLY)
            except FileNotFoundError:  # renamed by another process since
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # Who held the lock may have renamed the directory: then this is the lock of another one.
                if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                    yield None if self.is_done(step) else partial
                    return
            finally:
                os.close(handle)
