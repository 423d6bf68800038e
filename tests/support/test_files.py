"""Files and directories that appear whole: several writers at once, failures, and what killed processes leave."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from speedstack.support import files
from speedstack.support.files import atomic_path, write_atomically


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def fill(directory: Path, content: str) -> None:
    directory.mkdir()
    (directory / content).write_text(content)


def abandoned(path: Path, digit: str) -> Path:
    """What a writer to `path` leaves that is killed."""
    directory = path.with_name(f".{path.name}-{digit * 32}.partial")
    directory.mkdir()
    (directory / path.name).write_text("half")
    return directory


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    assert write_atomically(path, "first") == path
    write_atomically(path, "zwölf\r\n")
    assert path.read_bytes() == "zwölf\r\n".encode()
    write_atomically(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff" and names(path.parent) == ["file.json"]
    (tmp_path / "ordinary").write_text("")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert path.read_text() == "before" and names(tmp_path) == ["file"]


def test_a_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with atomic_path(path) as partial:
        assert not partial.exists()
        fill(partial, "first")
    with pytest.raises(OSError), atomic_path(path) as partial:
        fill(partial, "second")
    assert names(path) == ["first"]
    with atomic_path(path, replaces_directory=True) as partial:
        fill(partial, "second")
        assert names(path) == ["first"]
    assert names(path) == ["second"] and names(tmp_path) == ["model"]


def test_many_writers_at_once(tmp_path: Path) -> None:
    """Nobody fails, nothing is mixed, nothing is left: files and directories."""
    errors: list[Exception] = []

    def work(writer: int) -> None:
        try:
            for turn in range(10):
                write_atomically(tmp_path / "file", str(writer) * 1000)
                assert len(set((tmp_path / "file").read_text())) == 1
                with atomic_path(tmp_path / "directory", replaces_directory=True) as partial:
                    fill(partial, f"{writer}-{turn}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(names(tmp_path / "directory")) == 1 and names(tmp_path) == ["directory", "file"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    """Not what somebody has a lock on, nor what belongs to another name."""
    path = tmp_path / "a[b]"
    abandoned(path, "0")
    alive = abandoned(path, "1")
    others = [abandoned(tmp_path / name, "0") for name in ("a[b]-c", "a", "ab")]
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    write_atomically(path, "whole")
    os.close(handle)
    assert names(tmp_path) == sorted([path.name, alive.name, *(other.name for other in others)])


def test_a_killed_process_leaves_nothing_for_long(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from speedstack.support.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and not path.exists() and len(names(tmp_path)) == 1
    write_atomically(path, "whole")
    assert names(tmp_path) == ["file"]


def test_a_directory_that_was_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making its directory and locking it a writer looks dead to another one; it makes another directory."""
    path, made, make = tmp_path / "file", list[Path](), files._beside

    def make_and_lose(path: Path, suffix: str) -> Path:
        made.append(make(path, suffix))
        if len(made) == 1:
            files._remove_abandoned(path)
        return made[-1]

    monkeypatch.setattr(files, "_beside", make_and_lose)
    write_atomically(path, "whole")
    assert path.read_text() == "whole" and len(made) == 2 and names(tmp_path) == ["file"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing works; nobody can tell there what is abandoned, so nothing is removed."""

    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    path = tmp_path / "file"
    left = abandoned(path, "0")
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_atomically(path, "whole")
    assert path.read_text() == "whole" and names(tmp_path) == sorted([left.name, "file"])
