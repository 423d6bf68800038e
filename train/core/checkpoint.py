"""Checkpoints that exist entirely or not at all.

    checkpoints/step-<N>/   files of the trainer ...   COMPLETE.json

COMPLETE.json is written last, by rename, with the size and SHA-256 of every other file, the step, the world size and
the config's hash. A killed process or a full disk thus leaves the newest complete checkpoint, and the run resumes from
it. Incomplete or damaged directories are skipped with a warning. The trainer decides what the files hold.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from speedstack.support.digests import file_sha256
from speedstack.support.files import write_atomically

COMPLETE = "COMPLETE.json"


@dataclass(frozen=True)
class Manifest:
    """Contents of COMPLETE.json. `files` maps a relative file name to its size in bytes and its SHA-256."""

    step: int
    world_size: int
    config_hash: str
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]


class CheckpointStore:
    """The checkpoints of one run, below `directory`; at most `num_kept` complete ones stay.

    `save` runs in the background. Its failures surface at the next `save` or `wait`.
    """

    def __init__(self, directory: Path, *, num_kept: int, world_size: int, config_hash: str) -> None:
        self.directory = directory
        self._num_kept = num_kept
        self._world_size = world_size
        self._config_hash = config_hash
        self._thread: Thread | None = None
        self._error: Exception | None = None

    def path(self, step: int) -> Path:
        """Directory of the checkpoint of `step`, whether it exists or not."""
        return self.directory / f"step-{step}"

    def prepare(self, step: int) -> Path:
        """An empty directory for the files of `step`. Raises OSError where it cannot be made."""
        path = self.path(step)
        try:
            _discard(path)
            path.mkdir(parents=True)
        except OSError as error:
            raise self._write_error(step, error) from error
        return path

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> None:
        """Call `write(directory)` and complete the checkpoint in the background. Raises OSError if the last one failed.

        `state` is JSON for COMPLETE.json. `write` must own everything it reads, because training goes on meanwhile.
        """
        self.wait()

        def work() -> None:
            try:
                path = self.prepare(step)
                try:
                    write(path)
                except OSError as error:
                    raise self._write_error(step, error) from error
                self.complete(step, state)
            except Exception as error:  # Handed to the training thread, which raises it.
                self._error = error

        self._thread = Thread(target=work, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the last `save` is on disk. Raises OSError, in one line, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """`wait` while another error propagates: a failed save becomes a warning."""
        try:
            self.wait()
        except OSError as error:
            warnings.warn(str(error), stacklevel=2)

    def complete(self, step: int, state: dict[str, Any]) -> None:
        """Turn the files in `path(step)` into a checkpoint, and delete the oldest beyond the number kept."""
        path = self.path(step)
        try:
            files = {
                file.relative_to(path).as_posix(): {"bytes": _flushed_size(file), "sha256": file_sha256(file)}
                for file in sorted(path.rglob("*"))
                if file.is_file()
            }
            manifest = Manifest(step, self._world_size, self._config_hash, state, files)
            write_atomically(path / COMPLETE, json.dumps(manifest.__dict__, indent=1) + "\n")
            for old in [step for step in self.steps() if self._is_complete(step)][self._num_kept :]:
                _discard(self.path(old))
        except OSError as error:
            raise self._write_error(step, error) from error

    def steps(self) -> list[int]:
        """Steps that have a directory, complete or not, newest first."""
        if not self.directory.is_dir():
            return []
        numbers = [path.name.removeprefix("step-") for path in self.directory.glob("step-*") if path.is_dir()]
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def newest(self) -> Manifest | None:
        """The newest checkpoint whose files are all intact; damaged ones are skipped with a warning.

        Raises ValueError if it belongs to another configuration or another number of processes.
        """
        for step in self.steps():
            path = self.path(step)
            try:
                manifest = read_manifest(path)
            except ValueError as error:
                warnings.warn(f"skipped a checkpoint: {error}", stacklevel=2)
                continue
            if manifest.config_hash != self._config_hash:
                raise ValueError(f"{path} was written by another configuration: choose another run.name")
            if manifest.world_size != self._world_size:
                raise ValueError(
                    f"{path} was written by {manifest.world_size} processes, this run has {self._world_size}: "
                    f"resume with {manifest.world_size}, or choose another run.name to start anew"
                )
            return manifest
        return None

    def _is_complete(self, step: int) -> bool:
        return (self.path(step) / COMPLETE).is_file()

    def _write_error(self, step: int, error: OSError) -> OSError:
        kept = [older for older in self.steps() if older != step and self._is_complete(older)]
        resume = f"step {kept[0]} is complete and the same command resumes from it" if kept else "none is complete yet"
        return OSError(f"cannot write checkpoint {self.path(step)}: {error.strerror or error}; {resume}")


def read_manifest(path: Path) -> Manifest:
    """The manifest in directory `path`, with every file verified. Raises ValueError if the checkpoint is not whole."""
    try:
        manifest = Manifest(**json.loads((path / COMPLETE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path} is incomplete (no {COMPLETE})") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path / COMPLETE} cannot be read ({error})") from error
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}")
        if file_sha256(file) != entry["sha256"]:
            raise ValueError(f"{file} does not have the SHA-256 it was written with")
    return manifest


def _flushed_size(file: Path) -> int:
    """Size of a file in bytes, after flushing it to disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size


def _discard(path: Path) -> None:
    """Delete a checkpoint. COMPLETE.json goes first, so that an interrupted deletion leaves no corrupt checkpoint."""
    (path / COMPLETE).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)
