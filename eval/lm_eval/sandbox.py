"""Runs an untrusted Python program: one that a model wrote, followed by its tests.

Protected: a process and session of its own, isolated mode, no environment, an empty temporary working directory, no
output, limits of memory, processor time, file size and open files, and a time limit that kills its children too. On
Linux a seccomp filter, inherited and irremovable, refuses sockets, signals to other processes, ptrace, io_uring and
leaving the session; without it nothing runs.

Not protected: the file system, which the program can read and write as the user. Run an evaluation of programs worse
than a small model's in a container.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

CHILD = Path(__file__).resolve().with_name("sandbox_child.py")
ISOLATION = "limits of time, memory and files; seccomp filter without sockets and signals; file system not confined"
# The child's exit status if it ran nothing; only the nonce tells a program's own exit from it.
CANNOT_ISOLATE = 97


@dataclass(frozen=True)
class Limits:
    """Limits of one program. `memory_bytes` bounds the address space; libraries reserve more of it than they use."""

    seconds: float = 10.0
    memory_bytes: int = 2 << 30
    file_bytes: int = 16 << 20
    num_files: int = 64


@dataclass(frozen=True)
class Outcome:
    """`passed`: it ran to its end. `failed`: it raised, exited early or hit a limit of memory or files."""

    status: Literal["passed", "failed", "timed out"]

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run `source` to its end or to a limit. Raises OSError, and runs nothing, without seccomp filters."""
    limits = limits or Limits()
    # The child reports completion with a word unknown to the program: exiting early is not passing.
    nonce = secrets.token_hex(16)
    task = json.dumps({"source": source, "nonce": nonce, "limits": asdict(limits)}).encode()
    # A file, not a pipe, so that the limit on file sizes applies.
    with tempfile.TemporaryDirectory(prefix="program-") as directory, tempfile.TemporaryFile() as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            env={"HOME": directory, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            cwd=directory,
            start_new_session=True,
        )
        try:
            process.communicate(task, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome("timed out")
        finally:
            # The program's children may remain even if it has ended.
            _kill_group(process.pid)
            process.wait()
        if process.returncode == CANNOT_ISOLATE:
            raise OSError("this machine cannot keep a program from the network (no seccomp filters): nothing was run")
        answer.seek(0)
        return Outcome("passed" if answer.read(len(nonce) + 1) == nonce.encode() else "failed")


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
