"""Workers answer, fail in one line, and are killed when they are late or stuck. Targets are standard modules."""

import importlib
import os
import time

import pytest

from speedstack.eval.speed.worker import (
    INTERPRET,
    KILLED,
    NEVER_BEGAN,
    InterpretedWorker,
    LocalWorker,
    ProcessWorker,
    StartWorker,
    WorkerFailed,
    call,
)


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


@pytest.mark.parametrize("start", [LocalWorker, ProcessWorker])
def test_calls_return_and_errors_are_one_line(start: StartWorker) -> None:
    worker = start(importlib.import_module, "math")
    try:
        assert call(worker, soon(), "sqrt", 9.0) == 3.0
        with pytest.raises(WorkerFailed, match=r"^ValueError: "):
            call(worker, soon(), "sqrt", -1.0)
        assert worker.is_alive and call(worker, soon(), "sqrt", 4.0) == 2.0
        with pytest.raises(WorkerFailed, match=NEVER_BEGAN):
            call(worker, time.monotonic() - 1, "sqrt", 4.0)
        assert not worker.is_alive
    finally:
        worker.close()


def test_who_cannot_be_made_says_why() -> None:
    worker = ProcessWorker(importlib.import_module, "no_such_module")
    try:
        with pytest.raises(WorkerFailed, match=r"^ModuleNotFoundError: "):
            call(worker, soon(), "anything")
    finally:
        worker.close()


def test_kernels_of_a_worker_are_interpreted_and_those_here_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "0"):
        monkeypatch.delenv(INTERPRET, raising=False)
        if before is not None:
            monkeypatch.setenv(INTERPRET, before)
        worker = InterpretedWorker(importlib.import_module, "os")
        try:
            assert call(worker, soon(), "getenv", INTERPRET) == "1" and os.environ.get(INTERPRET) == before
        finally:
            worker.close()


def test_a_stuck_call_is_killed_and_others_go_on() -> None:
    stuck, other = (ProcessWorker(importlib.import_module, name) for name in ("time", "math"))
    try:
        call(stuck, soon(), "time")
        started = time.monotonic()
        stuck.begin("sleep", 600)
        other.begin("sqrt", 16.0)
        assert other.finish(soon()) == 4.0
        with pytest.raises(WorkerFailed, match=f"^{KILLED} "):
            stuck.finish(soon(0.5))
        assert not stuck.is_alive and time.monotonic() - started < 60
    finally:
        stuck.close()
        other.close()


def test_a_process_that_dies_is_told_from_an_error() -> None:
    worker = ProcessWorker(importlib.import_module, "os")
    try:
        with pytest.raises(WorkerFailed, match=r"its process died \(exit code 7\)"):
            call(worker, soon(), "_exit", 7)
        assert not worker.is_alive
    finally:
        worker.close()
