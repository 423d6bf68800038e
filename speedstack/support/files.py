"""Atomic writes of files and directories, and locks on them.

A writer fills a directory of its own beside the target, `.<name>-<random>.partial`, then renames. The system releases
its lock when the process ends. Of two writers the later one wins; the next writer removes what a killed one left.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_RANDOM_DIGITS = 32


def write_atomically(path: str | Path, content: str | bytes) -> Path:
    """Write a file in UTF-8, flushed to disk, with parent directories; line ends stay. Raises OSError."""
    path = Path(path)
    with atomic_path(path) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def atomic_path(path: str | Path, *, replaces_directory: bool = False) -> Iterator[Path]:
    """A free path for a file or directory; it becomes `path` if the block ends without an exception.

    A file at `path` is replaced, a directory only if empty or with `replaces_directory`; a crash between the two
    renames leaves the old one in `.<name>-<random>.old`. Raises OSError.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    with _own_directory(path) as directory:
        partial = directory / path.name
        yield partial
        if replaces_directory and partial.is_dir():
            _rename_over(partial, path)
        else:
            os.replace(partial, path)


@contextmanager
def exclusive(directory: Path, file: str = "") -> Iterator[None]:
    """Lock `directory`, or one file name in it, for the block; the lock ends with the process.

    A hidden file beside it carries the lock and stays, because the locked file may be replaced. Raises ValueError if
    another process has the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / (f".{file}.lock" if file else ".lock"), "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = f"writing {directory / file}" if file else f"working in {directory}"
            raise ValueError(f"another process is {held}; wait for it or pass another --out") from None
        yield


@contextmanager
def _own_directory(path: Path) -> Iterator[Path]:
    """A new directory beside `path`, locked during the block and removed afterwards."""
    while True:
        directory = _beside(path, "partial")
        try:
            handle = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # another process removed it before it was locked
            continue
        try:
            if _lock(handle) is not False and directory.exists():
                try:
                    yield directory
                finally:
                    shutil.rmtree(directory, ignore_errors=True)
                return
        finally:
            os.close(handle)


def _remove_abandoned(path: Path) -> None:
    """Remove directories of killed writers to `path`: those without a lock."""
    for directory in path.parent.glob(f".{glob.escape(path.name)}-{'[0-9a-f]' * _RANDOM_DIGITS}.partial"):
        try:
            handle = os.open(directory, os.O_RDONLY)
        except OSError:  # another process was faster
            continue
        try:
            if _lock(handle):
                shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock an open directory until it is closed. False: another process has it; None: the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _rename_over(source: Path, target: Path) -> None:
    """Rename a directory onto another one, or onto nothing."""
    old = _beside(target, "old")
    replaced: list[Path] = []
    while source.exists():
        with suppress(FileNotFoundError):
            replaced.append(target.rename(old / str(len(replaced))))
        try:
            source.rename(target)
        except OSError as error:
            # Another process may have put its own there since.
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue
            if replaced:
                replaced[-1].rename(target)
            shutil.rmtree(old, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    """A new directory next to `path` that no other process or thread has."""
    directory = path.with_name(f".{path.name}-{secrets.token_hex(_RANDOM_DIGITS // 2)}.{suffix}")
    directory.mkdir()
    return directory
